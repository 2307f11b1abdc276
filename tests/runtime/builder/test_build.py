"""Building: what is there is kept, what changed is built, and nothing that happens to a build harms the bundle."""

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stageline.models.errors import BundleError, EngineError
from stageline.runtime.builder.build import BuildOutcome, BuildProgress, WantedEngine, build, stale
from stageline.runtime.builder.report import EngineReport
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX
from stageline.runtime.engines.tensorrt.records import EngineRecord, Options
from stageline.runtime.engines.tensorrt.store import FOLDER, locked, read_engines
from stageline.runtime.workload import Workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed"),
]
LOAD = Workload(micro_batch=2, length=8, slots=2, capacity=16)
SM89 = WantedEngine(TENSORRT_RTX, "sm89", "fp16")
PORTABLE = WantedEngine(TENSORRT_RTX, "portable", "fp16")


def built(path: Path, *wanted: WantedEngine, options: Options | None = None, jobs: int = 2) -> list[BuildOutcome]:
    return build(Bundle.open(path), wanted, LOAD, options or Options(), jobs=jobs)


def records(outcomes: list[BuildOutcome]) -> list[EngineRecord]:
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.record for outcome in outcomes if outcome.record is not None]


@pytest.fixture(scope="module")
def engines(llama_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `llama_bundle` with its engines for SM89; do not change it, copy it."""
    path = shutil.copytree(llama_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    records(built(path, SM89))
    return path


def test_engines_are_built_once_and_a_changed_weight_builds_one_stage(
    bundle: Path, change_weight: Callable[[Path, int], str]
) -> None:
    steps: list[BuildProgress] = []
    first = build(Bundle.open(bundle), [SM89], LOAD, Options(), jobs=2, progress=steps.append)
    made = records(first)
    assert [(o.stage, o.built) for o in first] == [(0, True), (1, True)]
    assert steps
    assert all(0 <= step.step <= step.steps for step in steps)
    for record in made:
        for entry in (record.plan, record.report):
            data = (bundle / entry.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size_bytes, entry.sha256)
        report = EngineReport.model_validate_json((bundle / record.report.path).read_bytes())
        assert report.source == "network"
        assert report.kinds["ATTENTION_INPUT"] == 1
        assert report.dtypes["HALF"] > 0
    assert [spec.name for spec in made[0].inputs] == ["input_ids", "past_lengths", "new_lengths", "logits_at"]
    assert [(c.name, made[1].capacity, made[1].cache_dtype) for c in made[1].caches] == [("cache.1/0", 16, "float16")]
    assert [profile.name for profile in made[1].profiles] == ["decode", "prefill", "rows"]

    assert not any(outcome.built for outcome in built(bundle, SM89))

    change_weight(bundle, 1)
    again = built(bundle, SM89)
    assert [(o.stage, o.built) for o in again] == [(0, False), (1, True)]
    assert all(r.weight_files == records(again)[0].weight_files for r in records(again))


def test_a_stripped_engine_is_small_takes_its_weights_as_inputs_and_any_weights(
    bundle: Path, change_weight: Callable[[Path, int], str]
) -> None:
    (record, _) = records(built(bundle, PORTABLE, options=Options(stripped=True)))
    tensors = Bundle.open(bundle).tensors
    assert record.weights
    assert all(tensors[spec.name].shape == spec.shape and spec.dtype == "float16" for spec in record.weights)
    change_weight(bundle, 0)
    assert not any(outcome.built for outcome in built(bundle, PORTABLE, options=Options(stripped=True)))


def test_a_damaged_engine_is_built_again(engines: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(engines, tmp_path / "bundle")
    (record, _) = records(built(bundle, SM89))
    (bundle / record.plan.path).write_bytes(b"not an engine")
    assert [(o.stage, o.built) for o in built(bundle, SM89)] == [(0, True), (1, False)]


def test_engines_of_another_cut_are_stale_until_that_cut_comes_back(engines: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(engines, tmp_path / "bundle")
    made = records(built(bundle, SM89))
    whole = recut(bundle, 1)
    with locked(bundle) as store:
        assert stale(whole, store) == {record.plan.path for record in made}
    recut(bundle, 2)
    assert not any(outcome.built for outcome in built(bundle, SM89))
    whole = recut(bundle, 1)
    with locked(bundle) as store:
        assert store.prune(stale(whole, store)) > sum(record.plan.size_bytes for record in made)
    assert [file.name for file in (bundle / FOLDER).iterdir()] == ["manifest.json"]


def test_a_kill_in_mid_build_leaves_what_was_built_and_the_rest_is_built_next(bundle: Path) -> None:
    script = (
        "import sys, time; from stageline.runtime.builder import build as b\n"
        "from stageline.runtime.bundle.folder import Bundle\n"
        "from stageline.runtime.workload import Workload\n"
        "from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX\n"
        "from stageline.runtime.engines.tensorrt.records import Options\n"
        "done = []\n"
        "def step(step):\n"
        "    if step.stage == 1: print('building the second', flush=True); time.sleep(60)\n"
        "wanted = [b.WantedEngine(TENSORRT_RTX, 'sm89', 'fp16')]\n"
        "b.build(Bundle.open(sys.argv[1]), wanted, Workload(2, 8, 2, 16), Options(), jobs=1, progress=step)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(bundle)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building the second\n"
        process.send_signal(signal.SIGKILL)
    assert len(Bundle.open(bundle).manifest.stages) == 2
    assert len(read_engines(bundle).engines) == 1
    outcomes = built(bundle, SM89)
    assert [(o.stage, o.built) for o in outcomes] == [(0, False), (1, True)]
    assert not list((bundle / FOLDER).glob("*.unfinished"))


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(bundle: Path) -> None:
    records(built(bundle, PORTABLE))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the worker inherits it: no plan is that small
    try:
        with pytest.raises(BundleError, match=r"cannot write engines .*finished engines are kept") as caught:
            built(bundle, SM89, jobs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value)
    Bundle.open(bundle)
    assert {record.target for record in read_engines(bundle).engines} == {"portable"}
    assert not list((bundle / FOLDER).glob(".*"))
    assert all(outcome.built for outcome in built(bundle, SM89))


def test_two_builds_at_a_time_are_refused(bundle: Path) -> None:
    with locked(bundle), pytest.raises(BundleError, match="another build is running"):
        built(bundle, SM89)


def test_what_cannot_be_built_is_said_before_anything_is_written(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"sm75 .Turing. does not compute in bf16"):
        built(bundle, WantedEngine(TENSORRT_RTX, "sm75", "bf16"))
    with pytest.raises(EngineError, match=r"sm86 .Ampere. does not compute in fp8; choose --precision fp16"):
        built(bundle, WantedEngine(TENSORRT_RTX, "sm86", "fp8"))
    with pytest.raises(EngineError, match="no version-compatible engines"):
        built(bundle, SM89, options=Options(version_compatible=True))
    assert not (bundle / FOLDER).exists()


def test_a_worker_that_dies_is_an_outcome_that_says_how(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stageline.runtime.builder.processes.sys.executable", "/bin/false")
    outcomes = built(bundle, SM89)
    assert [outcome.error for outcome in outcomes] == ["the builder ended with status 1"] * 2
