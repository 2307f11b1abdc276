"""Bundles of a few bytes: what is wrong with a file, in one line, and what a failed write leaves behind."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle, file_entry, read_manifest, write_manifest
from stageline.runtime.bundle.manifest import FileEntry, Manifest, Part, Stage, Use


def use(part: int, module: str = "") -> Use:
    return Use(part=part, reads={}, writes={}, weights={}, module=module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle: one block, one stage, a file of weights without tensors."""
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="empty"), ir_version=10)
    for name in ("part.onnx", "stage.onnx"):
        ir.save(empty, tmp_path / name)
    (tmp_path / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    names = ("part.onnx", "stage.onnx", "weights.safetensors")
    manifest = Manifest(
        task="feature-extraction",
        architecture="none",
        dtype="float32",
        opset=20,
        inputs=(),
        outputs=(),
        parts=(Part(file="part.onnx", inputs=(), outputs=(), weights=()),),
        uses=(use(0), use(0, "block"), use(0)),
        stages=(
            Stage(file="stage.onnx", first_block=0, last_block=0, inputs=(), outputs=(), weight_bytes=0, parameters=0),
        ),
        weight_files=("weights.safetensors",),
        files=tuple(file_entry(tmp_path, name) for name in names),
        trace="full",
        made_by={},
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def changed(folder: Path, **fields: Any) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, **fields}))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_valid_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest == read_manifest(folder)
    assert (bundle.manifest.blocks, bundle.manifest.cached, bundle.tensors) == (1, False, {})
    assert [part.graph.name for part in bundle.parts()] == ["empty"]


def test_a_folder_that_does_not_exist_or_holds_no_bundle(tmp_path: Path) -> None:
    assert "no bundle at" in refusal(tmp_path / "none")
    assert "is not a bundle: it has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["part.onnx", "stage.onnx", "weights.safetensors"])
def test_a_file_that_is_missing_cut_or_changed(name: str, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    assert f"{name} has {len(data) - 1} bytes, the manifest lists {len(data)}; export" in refusal(folder)
    (folder / name).write_bytes(data[:-1] + b"!")
    assert f"{name} was changed since it was exported (SHA-256 differs); export" in refusal(folder)
    (folder / name).unlink()
    assert f"{name} is missing; export" in refusal(folder)


def test_a_file_that_is_used_but_not_listed(folder: Path) -> None:
    changed(folder, files=[])
    assert "its manifest uses part.onnx but does not list it" in refusal(folder)


def test_a_link_out_of_the_bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "stage.onnx"
    (folder / "stage.onnx").rename(outside)
    (folder / "stage.onnx").symlink_to(outside)
    assert "stage.onnx is outside the bundle" in refusal(folder)


def entry(file: FileEntry, **fields: Any) -> dict[str, Any]:
    return {**file.model_dump(exclude_none=True), **fields}


def test_a_file_without_a_digest_needs_that_of_its_header(folder: Path) -> None:
    files = read_manifest(folder).files
    for header in (None, "0" * 64):
        bare = {key: value for key, value in entry(files[2], header_sha256=header).items() if key != "sha256"}
        changed(folder, files=[entry(files[0]), entry(files[1]), bare])
        assert "the header of weights.safetensors was changed since it was exported" in refusal(folder)


def test_weights_that_are_not_safetensors(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"\0" * 4)
    files = read_manifest(folder).files
    changed(folder, files=[entry(files[0]), entry(files[1]), entry(file_entry(folder, "weights.safetensors"))])
    assert refusal(folder).startswith(f"bundle {folder}: ")


def test_a_part_that_is_gone_after_opening(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "part.onnx").unlink()
    with pytest.raises(BundleError, match=r"part.onnx cannot be read \(No such file or directory\); export"):
        bundle.parts()


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_manifest(folder)

    def full(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, before.model_copy(update={"task": "other"}))
    monkeypatch.undo()
    assert read_manifest(folder) == before
    assert not list(folder.glob(".manifest*"))
