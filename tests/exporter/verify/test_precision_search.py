"""The search for nodes that must stay float32: it finds what was planted, and engines are built from what it found."""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stageline.exporter.commands.cli import main
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.engines import verify_emulated
from stageline.exporter.verify.precision_search import smallest
from stageline.models.errors import BundleError
from stageline.runtime.builder.build import WantedEngine, build
from stageline.runtime.bundle.float32_nodes import write_float32_nodes
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload

LOAD = Workload(micro_batch=2, length=8, slots=2, capacity=16)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
PLANTED = "2/node_linear_5"
"""The up projection of block 2."""


def planted(folder: Path, factor: float) -> Path:
    """A bfloat16 bundle whose third MLP computes what it did by way of values `factor` times as large."""
    synthesize(LLAMA, folder / "checkpoint", seed=3, dtype="bfloat16")
    file = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] *= factor
    tensors["model.layers.2.mlp.down_proj.weight"] /= factor
    save_file(tensors, file, {"format": "pt"})
    return export(folder / "checkpoint", folder / "bundle", stages=2).path


@pytest.fixture(scope="module")
def overflowing(made_once: Callable[..., Path]) -> Path:
    """Values that float16 cannot hold, of weights that it can; do not change it."""
    return made_once("overflowing", lambda folder: planted(folder, 2.0**18)) / "bundle"


def search(bundle: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["verify", str(bundle), "--find-precision", "--precision", precision, "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON has no Infinity


def test_a_planted_overflow_is_found_and_the_stage_then_passes(
    overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(overflowing, tmp_path / "bundle"))
    before = verify_emulated(bundle, "fp16", layers=False, seed=5, progress=lambda step: None)
    assert [c.passed for c in before] == [True, False]
    found = search(bundle, "fp16", capsys)
    assert found["stages"][0]["first"] is None
    assert found["stages"][0]["nodes"] == []
    assert found["stages"][1]["first"]["value"] == "2/linear_5"
    assert found["stages"][1]["first"]["max_error"] is None
    nodes = found["stages"][1]["nodes"]
    assert PLANTED in nodes
    assert {name.split("/")[0] for name in nodes} == {"2"}
    assert len(nodes) <= 4
    for left_out in nodes:  # it is 1-minimal
        write_float32_nodes(Bundle.open(bundle), "fp16", set(nodes) - {left_out})
        done = verify_emulated(bundle, "fp16", layers=False, seed=found["seed"], progress=lambda step: None)
        assert not all(c.passed for c in done), left_out
    write_float32_nodes(Bundle.open(bundle), "fp16", nodes)
    recut(bundle, 4)  # what is kept is part of the model, not of the cut
    after = verify_emulated(bundle, "fp16", layers=False, seed=6, progress=lambda step: None)
    assert all(c.passed for c in after)
    assert main(["inspect", str(bundle)]) == 0
    assert f"in float32 in engines of fp16: {', '.join(sorted(nodes))}" in capsys.readouterr().out


def test_weights_beyond_the_range_stay_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(planted(tmp_path, 2.0**22), "fp16", capsys)
    assert found["stages"][1]["first"]["value"] == "model.layers.2.mlp.up_proj.weight"
    assert PLANTED in found["stages"][1]["nodes"]


def test_nothing_is_kept_where_nothing_is_needed(
    overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(overflowing, tmp_path / "bundle"))
    assert all(stage["first"] is None for stage in search(bundle, "bf16", capsys)["stages"])
    assert Bundle.open(bundle).manifest.float32_nodes is None


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed")
def test_engines_are_built_with_what_was_found(overflowing: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(overflowing, tmp_path / "bundle"))
    nodes = ("2/node_linear_4", PLANTED, "2/node_linear_6")
    wanted = [WantedEngine(TENSORRT_RTX, "sm89", "fp16")]
    keys = []
    for kept in ((), nodes):
        opened = write_float32_nodes(Bundle.open(bundle), "fp16", kept)
        outcomes = build(opened, wanted, LOAD, Options())
        assert [outcome.error for outcome in outcomes] == [None, None]
        records = [outcome.record for outcome in outcomes if outcome.record]
        assert [record.float32_nodes for record in records] == [kept, kept]
        keys.append([record.key for record in records])
        report = json.loads((bundle / records[1].report.path).read_text())
        types = {layer["name"]: layer["dtypes"] for layer in report["layers"]}
        assert types[PLANTED] == (["FLOAT"] if kept else ["HALF"])
        assert types["3/node_linear_5"] == ["HALF"]
    assert keys[0][0] == keys[1][0]  # the stage without such nodes is kept
    assert keys[0][1] != keys[1][1]


def test_a_node_that_no_stage_has_is_named(overflowing: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(overflowing, tmp_path / "bundle"))
    opened = write_float32_nodes(Bundle.open(bundle), "fp16", ["2/typo"])
    with pytest.raises(BundleError, match="keeps '2/typo' in float32, which no stage has; search again: stageline ver"):
        build(opened, [WantedEngine(TENSORRT_RTX, "sm89", "fp16")], LOAD, Options())


def test_other_precisions_are_refused(overflowing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(overflowing), "--find-precision", "--precision", "int8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "int8 keeps no nodes in float32; choose fp16 or bf16" in line


@given(st.data())
def test_the_smallest_set_cannot_lose_an_element(data: st.DataObject) -> None:
    """Of random functions that are true for some sets and all larger ones."""
    names = [str(number) for number in range(data.draw(st.integers(1, 24)))]
    enough = data.draw(st.lists(st.sets(st.sampled_from(names)), min_size=1, max_size=4))

    def passes(chosen: Collection[str]) -> bool:
        return any(one <= set(chosen) for one in enough)

    found = smallest(names, passes)
    assert passes(found)
    assert not any(passes([other for other in found if other != name]) for name in found)
    assert list(found) == sorted(found, key=int)
