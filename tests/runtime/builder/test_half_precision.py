"""TensorRT-RTX builds checkpoints in bfloat16 and float16 in every precision, and computes in the asked type."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llamas import ONE_BLOCK
from stageline.exporter.commands.cli import main
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.engines import verify_emulated
from stageline.models.errors import EngineError
from stageline.runtime.builder import network
from stageline.runtime.builder.build import WantedEngine, build
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import StageFile
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.lower import PRECISIONS, QUANTISED, Precision, lower
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload
from transformers import AutoModelForCausalLM

LOAD = Workload(micro_batch=2, length=8, slots=2, capacity=16)
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed")


def stage_of(bundle: Bundle) -> StageFile:
    (stage,) = bundle.manifest.stages
    return StageFile(0, bundle.path / stage.file, bundle.path, stage.caches)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [BERT, ONE_BLOCK], ids=["encoder", "generator"])
def test_every_precision_multiplies_in_its_type(
    config: dict[str, object], dtype: str, export_once: Callable[..., Path]
) -> None:
    bundle = Bundle.open(export_once(config, dtype=dtype))
    trt = TENSORRT_RTX.load()
    half = trt.bfloat16 if dtype == "bfloat16" else trt.float16
    types = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16} | dict.fromkeys(QUANTISED, half)
    for precision in PRECISIONS:
        for stripped in (False, True) if precision in ("fp16", "bf16") else (False,):
            lowered = lower(stage_of(bundle), precision, LOAD.capacity, stripped)
            parsed = network.parse(trt, lowered, stripped)
            layers = [parsed.definition.get_layer(place) for place in range(parsed.definition.num_layers)]
            products = {layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY}
            assert products == {types[precision]}, (precision, stripped)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "int8")])
def test_an_encoder_in_half_precision_builds(
    dtype: str, precision: Precision, export_once: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(export_once(BERT, dtype=dtype), tmp_path / "bundle")
    (outcome,) = build(Bundle.open(path), [WantedEngine(TENSORRT_RTX, "sm89", precision)], LOAD, Options())
    assert outcome.error is None
    assert outcome.record is not None
    assert outcome.record.cache_dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lowered_checkpoint_gives_what_transformers_gives_in_float32(dtype: str, tmp_path: Path) -> None:
    synthesize(ONE_BLOCK, tmp_path / "checkpoint", seed=4, dtype=dtype)
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    tokens = np.random.default_rng(3).integers(3, 50, (3, 12))
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits.numpy()
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    inputs = Signature.of(bundle.manifest).check_inputs(given)[0]
    closest: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2, "int8": 6e-2}
    for precision, most in closest.items():
        got = EmulatedStage(lower(stage_of(bundle), precision, 16, stripped=False), 3, 16).run(inputs)["logits"]
        assert np.abs(got - want).max() <= most * np.abs(want).max().clip(min=1), precision


def test_a_bfloat16_bundle_is_verified_in_bfloat16_unless_another_is_asked_for(
    export_once: Callable[..., Path],
) -> None:
    path = export_once(ONE_BLOCK, dtype="bfloat16")
    done = verify_emulated(path, None, layers=False, seed=1, progress=lambda step: None)
    assert {(c.precision, c.tolerance) for c in done} == {("bf16", 6e-2)}
    done = verify_emulated(path, "int8", layers=False, seed=1, progress=lambda step: None)
    assert {(c.precision, c.tolerance) for c in done} == {("int8", 6e-2)}
    assert all(c.passed for c in done)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("stripped", [False, True])
def test_a_value_beyond_float16_stops_a_build_in_it_and_bf16_keeps_it(
    stripped: bool, export_once: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(export_once(ONE_BLOCK, dtype="bfloat16"), tmp_path / "bundle")
    name = "model.layers.0.mlp.up_proj.weight"
    bundle = Bundle.open(path)
    entry, manifest = bundle.tensors[name], bundle.manifest
    data = np.memmap(entry.file, np.uint16, "r+", entry.offset, (1,))
    data[:] = 0x47C3  # 99840 in bfloat16
    data.flush()
    file = entry.file.relative_to(path).as_posix()
    files = tuple(file_entry(path, file) if one.path == file else one for one in manifest.files)
    write_manifest(path, manifest.model_copy(update={"files": files}))
    wanted = [WantedEngine(TENSORRT_RTX, "sm89", precision) for precision in ("fp16", "bf16")]
    half, wide = build(Bundle.open(path), wanted, LOAD, Options(stripped=stripped))
    assert half.error == (
        f"tensor '{name}' has 1 value beyond the range of float16 (65504), the largest 99840; choose --precision bf16"
    )
    assert wide.error is None
    assert main(["verify", str(path), "--engine", "tensorrt", "--emulated", "--precision", "fp16"]) == 1
    assert half.error in capsys.readouterr().err.splitlines()[-1]


@needs_rtx
def test_turing_computes_no_bfloat16_and_so_no_quantised_bfloat16_bundle(export_once: Callable[..., Path]) -> None:
    bundle = Bundle.open(export_once(ONE_BLOCK, dtype="bfloat16"))
    with pytest.raises(EngineError, match=r"sm75 .Turing. does not compute in bf16; choose --precision fp16"):
        build(bundle, [WantedEngine(TENSORRT_RTX, "sm75", "int8")], LOAD, Options())
