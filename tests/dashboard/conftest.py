"""A tiny bundle that generates, a store with two real runs of it, and what waits for a benchmark."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stageline.dashboard.children.benchmarks import Launcher
from stageline.exporter.commands.cli import main


@pytest.fixture(scope="session")
def bundles(word_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `llama`, of two stages; do not change it."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(word_llama, folder / "llama")
    return folder


@pytest.fixture(scope="session")
def filled_store(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs of the bundle, the later one beside a baseline; do not change it."""
    store = tmp_path_factory.mktemp("store") / "bench.sqlite"
    options = ["--seconds", "0.3", "--warm-up", "0.1", "--repeats", "2", "--concurrency", "1,4", "--store", str(store)]
    bundle = str(bundles / "llama")
    assert main(["bench", "run", bundle, *options, "--new-tokens", "6", "--slo", "latency=2s"]) == 0
    assert main(["bench", "run", bundle, *options, "--new-tokens", "6", "--baseline", "onnxruntime"]) == 0
    return store


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the command line that the dashboard's script sees."""

    def given(*arguments: str | Path) -> None:
        monkeypatch.setattr("sys.argv", ["app.py", *map(str, arguments)])

    return given


@pytest.fixture
def ended() -> Callable[[Launcher], None]:
    """Waits until the benchmark that a launcher started has ended."""

    def wait(launcher: Launcher) -> None:
        deadline = time.monotonic() + 90.0
        while launcher.starting():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return wait
