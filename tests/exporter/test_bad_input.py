"""What is wrong with a checkpoint, a bundle, a request or the disk is said in one line, and nothing is left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stageline.exporter.commands.cli import main
from stageline.exporter.export import export
from stageline.models.errors import RequestError, StagelineError
from stageline.models.safetensors_file import read_header
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.pipeline import Pipeline

Run = Callable[..., str]


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must fail, and gives the one line it says (steps of progress left out)."""

    def run(*arguments: str | Path, status: int = 1) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == status
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("stageline: ") for line in lines) == 1, lines
        assert lines[-1].startswith("stageline: "), lines
        return lines[-1]

    return run


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "in" / "checkpoint"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "in" / "bundle"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# A checkpoint


def test_no_such_checkpoint(message: Run, out: Path) -> None:
    line = message("export", out / "none", "-o", out / "b")
    assert f"{out / 'none'} does not exist; give a checkpoint's folder or a .gguf file" in line
    assert not list(out.iterdir())


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def lying_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])


def missing_shard(folder: Path) -> None:
    names = read_header(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {**dict.fromkeys(names, "model-00001-of-00002.safetensors"), "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unknown_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bertt"}')


@pytest.mark.parametrize(
    ("damage", "culprit", "way_out"),
    [
        (without_config, "has weights but no config.json", "download it"),
        (truncated, "model.safetensors", "download it again"),
        (lying_header, "model.safetensors", "download it again"),
        (missing_shard, "lacks the shard 'model-00002-of-00002.safetensors', which holds 1 of", "download it"),
        (only_a_pickle, "pytorch_model.bin", "save_pretrained"),
        (unknown_model_type, "does not know model_type 'bertt'", "check the spelling in config.json"),
    ],
)
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], culprit: str, way_out: str, checkpoint: Path, out: Path, message: Run
) -> None:
    damage(checkpoint)
    line = message("export", checkpoint, "-o", out / "b")
    assert culprit in line
    assert way_out in line
    assert not list(out.iterdir())


# An export


def test_no_stages_are_a_usage_error(checkpoint: Path, out: Path, message: Run) -> None:
    assert "--stages" in message("export", checkpoint, "-o", out / "b", "--stages", "0", status=2)
    assert not list(out.iterdir())


@pytest.mark.parametrize("cuts", [("--stages", "4"), ("--layers", "2,2"), ("--layers", "3,0")])
def test_cuts_that_do_not_fit(cuts: tuple[str, str], checkpoint: Path, bundle: Path, out: Path, message: Run) -> None:
    assert "3 " in message("export", checkpoint, "-o", out / "b", *cuts)
    assert not list(out.iterdir())
    before = sorted((file, file.stat().st_mtime_ns) for file in bundle.rglob("*"))
    assert "do not fit" in message("recut", bundle, *cuts)
    assert before == sorted((file, file.stat().st_mtime_ns) for file in bundle.rglob("*"))


def test_cuts_that_do_not_fit_are_reported_before_weights_are_placed(checkpoint: Path, out: Path) -> None:
    steps: list[str] = []
    with pytest.raises(StagelineError, match="4 stages do not fit: the model has 3 blocks, so choose 1 to 3"):
        export(checkpoint, out / "b", stages=4, progress=steps.append)
    assert "tracing" in steps
    assert "placing weights" not in steps


def test_an_existing_output_is_kept(checkpoint: Path, out: Path, message: Run) -> None:
    (out / "b").mkdir()
    (out / "b" / "mine").touch()
    assert f"{out / 'b'} exists already; delete it, or choose another place" in message(
        "export", checkpoint, "-o", out / "b"
    )
    assert [file.name for file in out.rglob("*")] == ["b", "mine"]


@pytest.mark.parametrize("limit_bytes", [1_000, 60_000])
def test_a_file_that_cannot_grow(limit_bytes: int, checkpoint: Path, out: Path, message: Run) -> None:
    # What the disk refuses while the graphs, or while the weights, are written.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        line = message("export", checkpoint, "-o", out / "b", "--dtype", "float16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"cannot write {out / 'b'}: File too large" in line
    assert not list(out.iterdir())


def test_a_disk_that_fills(checkpoint: Path, out: Path, message: Run) -> None:
    small = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(out)]
    if shutil.which("mount") is None or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        line = message("export", checkpoint, "-o", out / "b", "--dtype", "float16")
        assert f"cannot write {out / 'b'}: No space left on device" in line
        assert not list(out.iterdir())
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_opens(checkpoint: Path, out: Path, message: Run) -> None:
    command = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; main()"]
    command += ["export", str(checkpoint), "-o", str(out / "b"), "--stages", "3"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as export:
        while not list(out.glob(".b.*")) and export.poll() is None:
            time.sleep(0.01)
        export.kill()
    assert export.returncode == -signal.SIGKILL
    assert f"no bundle at {out / 'b'}" in message("inspect", out / "b")
    assert main(command[3:]) == 0
    assert len(Bundle.open(out / "b").manifest.stages) == 3
    assert list(out.iterdir()) == [out / "b"]


# A bundle


def flip(file: Path) -> None:
    """Change a byte, and nothing that a link shares with another file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["stage.000-001.onnx", "weights/model.safetensors", "tokenizer/tokenizer.json"])
def test_a_changed_byte(name: str, bundle: Path, message: Run) -> None:
    flip(bundle / name)
    for command in (["inspect", bundle], ["run", bundle, "--text", "a cat"], ["recut", bundle, "--stages", "1"]):
        line = message(*command)
        assert f"{name} was changed since it was exported (SHA-256 differs); export the bundle again" in line


@pytest.mark.parametrize("name", ["stage.002-002.onnx", "weights/model.safetensors", "tokenizer/tokenizer.json"])
def test_a_missing_file(name: str, bundle: Path, message: Run) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing; export the bundle again" in message("inspect", bundle)


def edit(bundle: Path, old: str, new: str) -> None:
    file = bundle / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_newer_version(bundle: Path, message: Run) -> None:
    edit(bundle, '"version": 4,', '"version": 6,')
    line = message("inspect", bundle)
    assert "has version 6; this stageline reads versions 2, 3, 4 and 5: install a newer stageline, or export" in line


def test_a_path_that_leaves_the_bundle(bundle: Path, message: Run) -> None:
    shutil.copy(bundle / "stage.000-001.onnx", bundle.parent / "outside.onnx")
    edit(bundle, '"stage.000-001.onnx"', '"../outside.onnx"')
    line = message("inspect", bundle)
    assert "'../outside.onnx' leaves the bundle" in line
    assert "export the bundle again" in line


def test_what_a_bundle_says_does_not_steer_the_terminal(bundle: Path, message: Run) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["stages"][0]["file"] = "../\x1b[2J\x07evil"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    line = message("inspect", bundle)
    assert "\x1b" not in line
    assert "\x07" not in line


def test_a_link_that_leaves_the_bundle(bundle: Path, message: Run) -> None:
    stage = bundle / "stage.000-001.onnx"
    stage.rename(bundle.parent / "outside.onnx")
    stage.symlink_to("../outside.onnx")
    assert "stage.000-001.onnx is outside the bundle; export the bundle again" in message("inspect", bundle)


def test_a_file_that_is_used_but_not_listed(bundle: Path, message: Run) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "stage.000-001.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert "uses stage.000-001.onnx but does not list it; export the bundle again" in message("inspect", bundle)


@pytest.mark.parametrize(
    ("content", "culprit"), [(None, "it has no manifest.json"), ("{", "manifest.json is not valid")]
)
def test_a_folder_that_is_no_bundle(content: str | None, culprit: str, out: Path, message: Run) -> None:
    if content is not None:
        (out / "manifest.json").write_text(content)
    assert culprit in message("inspect", out)


# A request


@pytest.mark.parametrize("token", [-1, 12])
def test_token_ids_out_of_range(token: int, tiny_bundle: Path) -> None:
    with (
        Pipeline.open(tiny_bundle) as pipeline,
        pytest.raises(
            RequestError, match=rf"row 0, position 1 is {token}, outside the vocabulary \(0 to 11\); tokenize"
        ),
    ):
        pipeline.run({"input_ids": np.array([[1, token]])})


def test_a_text_longer_than_the_model(tiny_bundle: Path, message: Run) -> None:
    line = message("run", tiny_bundle, "--text", "a cat " * 10)
    assert "text 0 has 22 tokens, at most 16 fit; shorten it" in line


def test_weights_that_are_not_numbers(checkpoint: Path, out: Path, message: Run) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"][0, 0] = np.nan
    save_file(tensors, file)
    export(checkpoint, out / "b")
    assert "the model's logits is not a number (NaN)" in message("run", out / "b", "--text", "a cat")


def test_an_option_of_another_task(tiny_bundle: Path, message: Run) -> None:
    line = message("run", tiny_bundle, "--text", "a cat", "--new-tokens", "3")
    assert "is for text-generation, but this bundle's task is text-classification; leave it out" in line


@pytest.mark.slow
def test_a_trace_that_holds_for_short_rows_only(make_checkpoint: Callable[..., Path], out: Path) -> None:
    """MiniMax goes through rows of more than `block_size` tokens in a loop, which the trace does not have."""
    config = {
        "model_type": "minimax",
        "architectures": ["MiniMaxForCausalLM"],
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 8,
        "bos_token_id": 2,
        "eos_token_id": None,
    }
    bundle = export(make_checkpoint(out / "c", **config), out / "b")
    assert bundle.manifest.max_positions == 8
    with Pipeline.open(bundle.path) as pipeline:
        assert pipeline.run({"input_ids": np.ones((2, 8), np.int64)})["logits"].shape[:2] == (2, 8)
        with pytest.raises(RequestError, match="rows are 9 tokens long, the model can place 8; truncate them"):
            pipeline.run({"input_ids": np.ones((1, 9), np.int64)})


def files_of(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize(
    ("command", "limit_bytes"), [("recut", 1_000), ("copy", 1_000), ("copy", 20_000), ("profile", 100)]
)
def test_a_bundle_stays_as_it_is_where_no_more_can_be_written(
    command: str, limit_bytes: int, bundle: Path, out: Path, message: Run
) -> None:
    before, limits = files_of(bundle), resource.getrlimit(resource.RLIMIT_FSIZE)
    given: dict[str, list[str | Path]] = {
        "recut": ["recut", bundle, "--layers", "1,1,1"],
        "copy": ["recut", bundle, "--layers", "1,1,1", "-o", out / "copy"],
        "profile": ["profile", bundle, "--threads", "1"],
    }
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        line = message(*given[command])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in line
    assert files_of(bundle) == before
    assert not list(out.iterdir())
    Bundle.open(bundle)


@pytest.mark.parametrize("killed", [True, False], ids=["one is killed", "both end"])
def test_two_recuts_at_once_leave_a_bundle(killed: bool, bundle: Path) -> None:
    command = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; raise SystemExit(main())"]
    running = [
        subprocess.Popen([*command, "recut", str(bundle), "--layers", cut], stderr=subprocess.PIPE, text=True)
        for cut in ("1,1,1", "3")
    ]
    if killed:
        manifest, deadline = (bundle / "manifest.json").read_bytes(), time.monotonic() + 60
        while (bundle / "manifest.json").read_bytes() == manifest and time.monotonic() < deadline:
            time.sleep(0.001)  # one of them has just begun to put its cut in place, or has
        for one in running:
            one.kill()
    said = [one.communicate(timeout=60)[1] for one in running]
    assert all("Traceback" not in text for text in said), said
    assert killed or 0 in [one.returncode for one in running]
    cut = tuple(stage.last_block - stage.first_block + 1 for stage in Bundle.open(bundle).manifest.stages)
    assert cut in {(1, 1, 1), (3,)}
    Pipeline.open(bundle).close()
