"""The runtime stands alone: in an environment without torch, the wheel opens, runs and re-cuts a bundle."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
RUN = """
import sys
import numpy as np
from stageline.runtime.pipeline import Pipeline

ids = np.arange(1, 13).reshape(2, 6)
with Pipeline.open(sys.argv[1]) as pipeline:
    outputs = pipeline.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    print(len(pipeline.stats().stages), outputs["last_hidden_state"].shape)
np.save(sys.argv[2], outputs["last_hidden_state"])
"""
ABSENT = """
import importlib.util
import pkgutil
import stageline.runtime
import stageline.models

for package in (stageline.runtime, stageline.models):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # These have extras of their own.
        if not module.name.startswith("stageline.runtime.service.") and not module.name.endswith(".openvino"):
            importlib.import_module(module.name)
print([n for n in ("torch", "transformers", "onnxscript", "streamlit") if importlib.util.find_spec(n)])
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and its `cpu` extra, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    source = folder / "source"
    for name in ("models", "runtime", "exporter", "dashboard"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("stageline-*.whl")
    run(*pip, "install", "--quiet", "--no-compile", f"{wheel}[cpu]")
    return python.parent


@pytest.fixture
def bundle(export_once: Callable[..., Path], tmp_path: Path) -> Path:
    """A BERT of three blocks in three stages."""
    return Path(shutil.copytree(export_once(CONFIG, stages=3), tmp_path / "bundle"))


def run(*command: str | Path) -> str:
    """Run a command away from the repository, whose folders it must not see; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd="/", env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_of_runtime_and_models_imports_without_torch(bare: Path) -> None:
    assert run(bare / "python", "-c", ABSENT).strip() == "[]"


def test_a_bundle_runs_and_is_recut_without_torch(bare: Path, bundle: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before.npy", tmp_path / "after.npy"
    assert run(bare / "python", "-c", RUN, bundle, before).strip() == "3 (2, 6, 32)"
    run(bare / "stageline", "recut", bundle, "--stages", "2")
    assert run(bare / "python", "-c", RUN, bundle, after).strip() == "2 (2, 6, 32)"
    np.testing.assert_allclose(np.load(after), np.load(before), atol=1e-5)


def test_serve_says_which_extra_it_needs(bare: Path, bundle: Path) -> None:
    done = subprocess.run([bare / "stageline", "serve", bundle], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1
    assert done.stderr == 'stageline: this command needs the service: pip install "stageline[serve]"\n'
