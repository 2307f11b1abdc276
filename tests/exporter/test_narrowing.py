"""A change of dtype never loses a value without a word."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from stageline.exporter.export import export
from stageline.exporter.narrowing import Narrowing
from stageline.exporter.synthesize import synthesize
from stageline.models.errors import ExportError
from stageline.models.safetensors_file import read_header

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def narrowed(values: Any, dtype: str, stored: Any = np.float32) -> list[str]:
    """What is said of an array that is stored as `stored` and converted to `dtype`."""
    narrowing = Narrowing(Path("c"), dtype)
    narrowing.converted("w", np.asarray(values, np.float64).astype(stored))
    return narrowing.check()


@given(
    arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False)),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_values_are_rounded_as_torch_rounds_them_or_refused(values: np.ndarray[Any, Any], dtype: str) -> None:
    expected = torch.from_numpy(values).to(TYPES[dtype])
    narrowing = Narrowing(Path("c"), dtype)
    got = torch.frombuffer(bytearray(narrowing.converted("w", values)), dtype=TYPES[dtype])
    assert torch.equal(got, expected)
    lost = int((np.isfinite(values) & ~torch.isfinite(expected.float()).numpy()).sum())
    finite = values[np.isfinite(values)]
    gone = finite.any() and not expected.float().numpy()[np.isfinite(values)].any()
    if lost:
        with pytest.raises(ExportError, match=f"so {lost} value"):
            narrowing.check()
    elif gone:
        with pytest.raises(ExportError, match="would become zero"):
            narrowing.check()
    else:
        narrowing.check()


def test_what_overflows_is_counted_and_named() -> None:
    narrowing = Narrowing(Path("c"), "float16")
    narrowing.converted("a", np.float32([1e5, 65504, 65519, -7e4]))
    narrowing.converted("b", np.float32([1]))
    narrowing.converted("a", np.float32([2e5]))  # a later part of the same tensor
    with pytest.raises(ExportError) as caught:
        narrowing.check()
    assert str(caught.value) == (
        "float16 ends at 65,504, so 3 values of c would become infinite: 3 of a (to 200,000); export with --dtype "
        "bfloat16 or float32"
    )


def test_bfloat16_and_float32_overflow_too() -> None:
    with pytest.raises(ExportError, match=r"so 1 value of c would become infinite.*export with --dtype float32"):
        narrowed([3.4e38], "bfloat16")
    with pytest.raises(ExportError, match="no --dtype holds them"):
        narrowed([1e300], "float32", np.float64)


def test_a_tensor_that_would_vanish_is_refused() -> None:
    with pytest.raises(ExportError, match=r"all values of w \(up to 1e-08\) in c would become zero"):
        narrowed([1e-8, -1e-9, 0], "float16", ml_dtypes.bfloat16)


def test_small_values_beside_normal_ones_are_no_loss_worth_a_word() -> None:
    assert narrowed([1e-9, 1], "float16") == []
    assert narrowed([0, 0], "float16") == []


def test_a_tensor_of_subnormal_values_only_is_noted() -> None:
    assert narrowed([3e-5, 1e-6], "float16") == [
        "values below 6.1e-05 lose digits in float16, and w hold no others",
    ]


def test_infinity_in_the_checkpoint_is_noted_and_not_called_an_overflow() -> None:
    assert narrowed([np.inf, np.nan, 1], "float16") == [
        "the checkpoint itself holds values that are infinite or no number: 2 in w",
    ]


def checkpoint(folder: Path, dtype: str, **tensors: torch.Tensor) -> Path:
    """A Llama of random weights in `dtype`, with some tensors replaced."""
    synthesize(LLAMA, folder, seed=1, dtype=dtype)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    return folder


def test_an_export_that_would_overflow_leaves_nothing(tmp_path: Path) -> None:
    embeddings = torch.full((99, 32), 1e5, dtype=torch.bfloat16)
    checkpoint(tmp_path / "c", "bfloat16", **{"model.embed_tokens.weight": embeddings})
    with pytest.raises(ExportError, match=r"so 3,168 values of .* 3168 of model.embed_tokens.weight \(to 99,840\)"):
        export(tmp_path / "c", tmp_path / "b", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_a_linked_tensor_that_the_stages_would_cast_is_looked_at(tmp_path: Path) -> None:
    norm = torch.full((32,), 1e5)  # float32 among float16
    checkpoint(tmp_path / "c", "float16", **{"model.norm.weight": norm})
    with pytest.raises(ExportError, match=r"32 of model.norm.weight \(to 100,000\)"):
        export(tmp_path / "c", tmp_path / "b")


def test_float64_is_converted_to_what_engines_have(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", "float32")
    file = folder / "model.safetensors"
    stored = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    bundle = export(folder, tmp_path / "b")
    assert bundle.manifest.dtype == "float32"
    (weights,) = bundle.manifest.weight_files
    assert {entry.dtype for entry in read_header(tmp_path / "b" / weights).values()} == {"float32"}
    written = load_file(tmp_path / "b" / weights)
    assert all(torch.equal(written[name], stored[name].float()) for name in written)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "c")
    export(tmp_path / "c", tmp_path / "b", dtype="float16")
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "c", dtype=torch.float16)
    expected = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in model.state_dict().items()}
    assert set(expected.values()) == {"float16", "float32"}
    header = read_header(tmp_path / "b" / "weights" / "model.safetensors")
    assert {name: entry.dtype for name, entry in header.items()} == {name: expected[name] for name in header}
