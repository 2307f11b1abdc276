"""The store of engines on files of a few bytes: what is written aside, kept, replaced, pruned, and left by a kill."""

from pathlib import Path

import pytest
from stageline.models.errors import BundleError
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.engines.tensorrt.records import EngineRecord, OptimizationProfile, Options, SizeRange
from stageline.runtime.engines.tensorrt.store import FOLDER, MANIFEST, EngineStore, locked, read_engines

ZERO = "0" * 64


def written(store: EngineStore, name: str, data: bytes) -> FileEntry:
    store.aside(name).write_bytes(data)
    store.keep(name)
    return FileEntry(path=name, size_bytes=len(data), sha256=ZERO)


def put(store: EngineStore, name: str, build_s: float = 1.0) -> EngineRecord:
    record = EngineRecord(
        stage="stage.000-001.onnx",
        plan=written(store, f"{FOLDER}/{name}.plan", b"plan"),
        report=written(store, f"{FOLDER}/{name}.json", b"{}"),
        key=ZERO,
        graph_sha256=ZERO,
        weight_files={},
        flavour="tensorrt_rtx",
        version="1.7",
        target="sm89",
        precision="fp16",
        options=Options(),
        profiles=(OptimizationProfile(name="rows", sizes={"batch": SizeRange(min=1, opt=2, max=2)}),),
        inputs=(),
        outputs=(),
        build_s=build_s,
    )
    store.put(record)
    return record


def files(bundle: Path) -> set[str]:
    return {file.name for file in (bundle / FOLDER).iterdir()} if (bundle / FOLDER).exists() else set()


def test_what_was_put_is_read_again(tmp_path: Path) -> None:
    with locked(tmp_path) as store:
        record = put(store, "a")
        assert read_engines(tmp_path).engines == (record,)
    assert files(tmp_path) == {"a.plan", "a.json", "manifest.json"}


def test_an_engine_of_the_same_file_is_replaced(tmp_path: Path) -> None:
    with locked(tmp_path) as store:
        put(store, "a")
        put(store, "b")
        put(store, "a", build_s=2.0)
    assert [(record.plan.path, record.build_s) for record in read_engines(tmp_path).engines] == [
        (f"{FOLDER}/b.plan", 1.0),
        (f"{FOLDER}/a.plan", 2.0),
    ]


def test_pruned_engines_leave_the_folder_and_free_their_bytes(tmp_path: Path) -> None:
    with locked(tmp_path) as store:
        put(store, "a")
        kept = put(store, "b")
        assert store.prune({f"{FOLDER}/a.plan"}) == len(b"plan") + len(b"{}")
    assert read_engines(tmp_path).engines == (kept,)
    assert files(tmp_path) == {"b.plan", "b.json", "manifest.json"}


def test_a_timing_cache_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    name = f"{FOLDER}/tensorrt.timings"
    with locked(tmp_path) as store:
        for data in (b"old", b"newer"):
            store.aside(f"{FOLDER}/x").write_bytes(data)
            store.put_timings(f"{FOLDER}/x", name, FileEntry(path="x", size_bytes=len(data), sha256=ZERO))
    assert [(entry.path, entry.size_bytes) for entry in read_engines(tmp_path).timings] == [(name, 5)]
    assert (tmp_path / name).read_bytes() == b"newer"


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with locked(tmp_path) as store:
        put(store, "a")
        store.aside(f"{FOLDER}/b.plan").write_bytes(b"half")
    with locked(tmp_path):
        assert files(tmp_path) == {"a.plan", "a.json", "manifest.json"}


def test_a_build_that_keeps_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert not (tmp_path / FOLDER).exists()


def test_one_build_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BundleError, match="another build is running"), locked(tmp_path):
        pass
    with locked(tmp_path):  # the lock is free again
        pass


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path) as store:
        record = put(store, "a")

        def full(self: Path, target: object) -> Path:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            store.write(store.manifest.model_copy(update={"engines": ()}))
        monkeypatch.undo()
        assert store.manifest.engines == (record,)
    assert read_engines(tmp_path).engines == (record,)
    assert not list(tmp_path.glob(f"{FOLDER}/.*"))
    assert (tmp_path / MANIFEST).exists()
