"""Builds within a bound of host memory: how many run together, what is refused, and the cut that fits."""

import shutil
from pathlib import Path

import pytest
from stageline.exporter.commands.cli import main
from stageline.models.errors import EngineError
from stageline.runtime.builder import memory
from stageline.runtime.builder.build import WantedEngine, build
from stageline.runtime.builder.memory import at_a_time, build_bytes, check_fits, cut_within, recut_within
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.lower import Precision
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.workload import Workload

LOAD = Workload(micro_batch=2, length=8, slots=2, capacity=16)
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Six blocks in one stage, where only weights take memory."""
    monkeypatch.setattr(memory, "_BASE_BYTES", 0.0)
    monkeypatch.setattr(memory, "_BLOCK_BYTES", 0.0)
    return Bundle.open(shutil.copytree(tiny_llama, tmp_path / "bundle"))


def test_estimates_grow_with_the_weights_in_the_type_that_is_computed_in(llama: Bundle) -> None:
    whole = build_bytes(llama, 0, "bf16")
    weights = llama.weight_bytes
    assert whole == pytest.approx(weights + 2.1 * weights)
    assert build_bytes(llama, 0, "fp32") == pytest.approx(weights + 2.7 * 2 * weights)
    embeddings = llama.tensors["model.embed_tokens.weight"].size_bytes
    norms = sum(entry.size_bytes for entry in llama.tensors.values() if len(entry.shape) == 1)
    matrices = weights - embeddings - norms
    assert build_bytes(llama, 0, "int8") == pytest.approx(weights + 2.7 * (weights - matrices / 2))
    parts = recut(llama.path, [2, 2, 2])
    sizes = [build_bytes(parts, number, "bf16") for number in range(3)]
    assert sum(sizes) >= whole  # tied embeddings are read by the first stage and by the last
    assert sizes[1] < min(sizes[0], sizes[2])


def test_the_cut_has_the_fewest_stages_that_fit(llama: Bundle) -> None:
    whole = build_bytes(llama, 0, "fp32")
    assert cut_within(llama, PRECISIONS, whole) == [6]
    counts = cut_within(llama, PRECISIONS, whole / 2)
    assert counts is not None
    assert sum(counts) == 6
    fewer = len(counts) - 1
    for first in range(1, 6) if fewer == 2 else ():
        parts = recut(llama.path, [first, 6 - first])
        assert max(build_bytes(parts, number, "fp32") for number in range(2)) > whole / 2
    parts = recut_within(recut(llama.path, 1), PRECISIONS, whole / 2)
    assert list(parts.manifest.layers) == counts
    assert max(build_bytes(parts, number, "fp32") for number in range(len(counts))) <= whole / 2
    assert recut_within(parts, PRECISIONS, whole / 2) is parts


def test_what_does_not_fit_is_refused_with_what_would(llama: Bundle) -> None:
    whole = build_bytes(llama, 0, "fp32")
    check_fits(llama, [(0, "fp32")], whole)
    counts = cut_within(llama, ["fp32"], 0.6 * whole)
    assert counts is not None
    with pytest.raises(EngineError) as refused:
        check_fits(llama, [(0, "fp16"), (0, "fp32")], 0.6 * whole)
    assert "stage 0 takes about" in str(refused.value)
    assert f"{len(counts)} stages fit: add --recut, or run stageline recut {llama.path} --layers " in str(refused.value)
    assert str(refused.value).endswith(",".join(map(str, counts)))
    with pytest.raises(EngineError, match="so does a stage of one block: allow more memory"):
        recut_within(llama, ["fp32"], whole / 100)
    assert Bundle.open(llama.path).manifest.layers == (6,)


def test_as_many_builds_run_together_as_fit(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "allowed_cores", lambda: (0, 1, 2, 3))
    one = build_bytes(llama, 0, "fp32")
    builds: list[memory.Build] = [(0, "fp32"), (0, "fp16"), (0, "bf16")]
    assert at_a_time(llama, builds, None, 2.5 * one) == 2
    assert at_a_time(llama, builds, 1, 2.5 * one) == 1
    assert at_a_time(llama, builds, 8, 2.5 * one) == 2
    assert at_a_time(llama, builds, None, 9 * one) == 3
    assert at_a_time(llama, builds, 8, None) == 8


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed")
def test_a_build_states_its_peak_and_stays_within_the_estimate(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    outcomes = build(bundle, [WantedEngine(TENSORRT_RTX, "sm89", "bf16")], LOAD, Options(), max_bytes=1e9)
    for outcome in outcomes:
        assert outcome.record is not None
        assert outcome.record.peak_bytes is not None
        assert 50e6 < outcome.record.peak_bytes < build_bytes(bundle, outcome.stage, "bf16")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--max-memory", "8XB"], 2, "'8XB' is not a size such as 8GB or 512MB"),
        (["--max-memory", "0GB"], 2, "'0GB' is not a size such as 8GB or 512MB"),
        (["--recut"], 2, "--recut needs --max-memory"),
        (["--max-memory", "50MB"], 1, "of memory to build in bf16, more than 50.0 MB; so does a stage of one block"),
    ],
)
def test_bounds_that_are_none_are_one_line(
    options: list[str], status: int, message: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    assert main(["build", str(bundle), "--target", "sm89", *options]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(bundle.glob("engines/*"))
