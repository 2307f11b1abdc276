"""The store: nothing is lost, readers see whole runs, and every failure is one line."""

import dataclasses
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_runs
from stageline.models.errors import StoreError
from stageline.runtime.bench import store as module
from stageline.runtime.bench.records import Load, Progress, Requests, Run, Timeline
from stageline.runtime.bench.store import LOST_AFTER_S, Store, default_path
from stageline.runtime.bench.store_schema import VERSION
from stageline.runtime.options import PipelineOptions


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "bench.sqlite")


def same(left: Requests, right: Requests) -> bool:
    return all(np.array_equal(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(Requests))


def test_an_empty_store_is_empty_and_is_not_made_by_looking(store: Store) -> None:
    assert store.runs() == []
    assert len(store.requests("a", 0)) == 0
    assert store.timeline("a", 0) == Timeline()
    with pytest.raises(StoreError, match="has no run a; see stageline bench list"):
        store.run("a")
    with pytest.raises(StoreError, match="has 0 runs, so there is no latest"):
        store.find("latest")
    assert not store.path.parent.exists()


def test_a_run_comes_back_as_it_was_put(store: Store) -> None:
    run, asked, timeline = synthetic_runs.run(7), synthetic_runs.requests(250_001), synthetic_runs.timeline(100)
    store.put(run, [asked], [timeline])
    assert store.run(run.id) == run
    assert same(store.requests(run.id, 0), asked)
    assert len(store.requests(run.id, 1)) == 0
    assert store.timeline(run.id, 0) == timeline
    (line,) = store.runs()
    assert (line.id, line.status, line.created, line.finished) == (run.id, "done", run.created, run.finished)
    first = run.measurements[0]
    assert line.headlines[0].requests_per_s == first.figures["requests_per_s"].mean
    assert line.headlines[0].latency_p99_s == first.figures["latency_p99_s"].mean
    assert [headline.contender for headline in line.headlines] == ["stageline", "onnxruntime"]


def test_a_run_stored_before_options_were_one_value_is_readable(store: Store) -> None:
    run = synthetic_runs.run(7)
    store.put(run)
    with sqlite3.connect(store.path) as db:
        data = json.loads(db.execute("SELECT data FROM runs").fetchone()[0])
        settings, environment = data["settings"], data["environment"]
        del settings["pipeline"]
        settings |= {"engine": "onnxruntime-cuda", "threads": 3, "weights": "int8", "slots": None}
        environment["processors"] = environment.pop("cores")
        db.execute("UPDATE runs SET data = ?", [json.dumps(data)])
    db.close()
    expected = PipelineOptions(engine="onnxruntime-cuda", threads=3, quantise="int8")
    read = store.run(run.id)
    assert read == dataclasses.replace(run, settings=dataclasses.replace(run.settings, pipeline=expected))


def test_lists_are_newest_first_and_of_one_bundle_if_asked(store: Store) -> None:
    for number in (3, 1, 4, 0, 2, 5):
        store.put(synthetic_runs.run(number))
    assert [line.created for line in store.runs()] == sorted((line.created for line in store.runs()), reverse=True)
    assert [line.id[-1] for line in store.runs(limit=3)] == ["5", "4", "3"]
    assert [line.id[-1] for line in store.runs(bundle_digest=synthetic_runs.run(1).bundle_digest)] == ["5", "1"]


def test_names_of_runs(store: Store) -> None:
    for number in (0, 1, 12):
        store.put(synthetic_runs.run(number))
    newest = synthetic_runs.run(12).id
    assert store.find("latest") == store.find("latest~0") == store.find(newest) == newest
    assert store.find("latest~2") == synthetic_runs.run(0).id
    assert store.find(newest[:-1]) == newest
    for name, message in {
        "2026": "3 runs whose id begins with 2026",
        "x": "has no run x",
        "": "3 runs whose id begins with",
        "latest~3": "has 3 runs, so there is no latest~3",
        "latest~x": "has no run latest~x",
        "%": "has no run %",
    }.items():
        with pytest.raises(StoreError, match=message):
            store.find(name)


def test_a_run_is_followed_while_it_goes(store: Store) -> None:
    whole: Run = synthetic_runs.run(1)
    store.begin(dataclasses.replace(whole, measurements=(), status="running", finished=None))
    assert store.run(whole.id).status == "running"
    assert not store.progress(whole.id, Progress(0.5, "Server 20/s, repeat 2 of 3", {"requests_per_s": 19.5}))
    assert store.runs()[0].progress == Progress(0.5, "Server 20/s, repeat 2 of 3", {"requests_per_s": 19.5})
    assert store.add(whole.id, whole.measurements[0], synthetic_runs.requests(10)) == 0
    assert store.run(whole.id).measurements == whole.measurements[:1]
    assert store.add(whole.id, whole.measurements[1]) == 1
    assert store.cancel(whole.id)
    assert store.progress(whole.id, Progress(0.6))
    store.end(whole.id, "cancelled")
    run = store.run(whole.id)
    assert (run.status, run.measurements, run.settings) == ("cancelled", whole.measurements, whole.settings)
    assert run.finished is not None
    assert not store.cancel(whole.id)


def test_the_same_run_is_not_begun_twice(store: Store) -> None:
    run = dataclasses.replace(synthetic_runs.run(1), status="running")
    store.begin(run)
    with pytest.raises(StoreError, match=f"run {run.id} is in .* already; see stageline bench show {run.id}"):
        store.begin(run)
    context, wins = multiprocessing.get_context("fork"), multiprocessing.Value("i", 0)
    other = dataclasses.replace(run, id="other")

    def start() -> None:
        try:
            Store(store.path).begin(other)
        except StoreError:
            return
        with wins.get_lock():
            wins.value += 1

    processes = [context.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert wins.value == 1


def test_a_run_whose_process_died_shows_as_failed(store: Store) -> None:
    run = dataclasses.replace(synthetic_runs.run(1), measurements=(), status="running", finished=None)
    store.begin(run)
    store.add(run.id, synthetic_runs.run(1).measurements[0])
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE runs SET seen = ?", [time.time() - LOST_AFTER_S - 1])
    seen = store.run(run.id)
    assert (seen.status, len(seen.measurements)) == ("failed", 1)
    assert "ended without reporting an error" in str(seen.error)
    assert not store.cancel(run.id)


def test_a_deleted_run_takes_all_its_rows_with_it(store: Store) -> None:
    store.put(synthetic_runs.run(1), [synthetic_runs.requests(10)], [synthetic_runs.timeline(10)])
    store.put(synthetic_runs.run(2), [synthetic_runs.requests(10)])
    store.delete(synthetic_runs.run(1).id)
    with sqlite3.connect(store.path) as db:
        for table, column in (("runs", "id"), ("measurements", "run"), ("blobs", "run")):
            assert db.execute(f"SELECT DISTINCT {column} FROM {table}").fetchall() == [(synthetic_runs.run(2).id,)]
    with pytest.raises(StoreError, match="has no run"):
        store.delete(synthetic_runs.run(1).id)


def test_a_writer_and_readers_at_once_see_whole_runs(store: Store) -> None:
    store.put(synthetic_runs.run(0))
    stop, faults, seen = threading.Event(), [], [0]

    def read() -> None:
        try:
            while not stop.is_set():
                for line in Store(store.path).runs():
                    assert len(store.run(line.id).measurements) == len(line.headlines) == 2
                    assert len(store.requests(line.id, 0)) in (0, 1000)
                seen[0] += 1
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 15):
        store.put(synthetic_runs.run(number), [synthetic_runs.requests(1000)])
    stop.set()
    for reader in readers:
        reader.join(30)
    assert not faults
    assert seen[0] > 0
    assert len(store.runs()) == 15


# What goes wrong. Each time: one line, and what was stored before is there.


@pytest.fixture
def kept(store: Store) -> Iterator[Store]:
    """A store with a run in it, which is there at the end as well."""
    store.put(synthetic_runs.run(1), [synthetic_runs.requests(1000)])
    yield store
    assert store.run(synthetic_runs.run(1).id) == synthetic_runs.run(1)
    assert same(store.requests(synthetic_runs.run(1).id, 0), synthetic_runs.requests(1000))


def test_a_store_of_a_newer_version_is_left_alone(kept: Store) -> None:
    def version(number: int) -> None:
        with sqlite3.connect(kept.path) as db:
            db.execute(f"PRAGMA user_version = {number}")

    version(VERSION + 1)
    message = f"has version {VERSION + 1}; this stageline reads up to version {VERSION}: install a newer stageline"
    for use in (kept.runs, lambda: kept.put(synthetic_runs.run(2))):
        with pytest.raises(StoreError, match=message):
            use()
    version(VERSION)


def test_a_store_of_an_older_version_is_brought_up_to_date(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    change = "ALTER TABLE runs ADD COLUMN note TEXT; CREATE INDEX runs_by_note ON runs (note)"
    with monkeypatch.context() as newer:
        newer.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, change))
        newer.setattr(module, "VERSION", VERSION + 1)
        assert [line.id for line in kept.runs()] == [synthetic_runs.run(1).id]
        with sqlite3.connect(kept.path) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)
            assert db.execute("SELECT note FROM runs").fetchall() == [(None,)]
    with sqlite3.connect(kept.path) as db:
        db.execute(f"PRAGMA user_version = {VERSION}")


def test_a_migration_that_fails_changes_nothing(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "DROP TABLE blobs; DROP TABLE missing"))
        newer.setattr(module, "VERSION", VERSION + 1)
        with pytest.raises(StoreError, match="no such table: missing"):
            kept.runs()


def test_a_damaged_store_is_reported(store: Store) -> None:
    store.put(synthetic_runs.run(1), [synthetic_runs.requests(20_000)])
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = store.path.read_bytes()
    damages = {
        b"no database at all" * 100: "is not a store, or is damaged",
        whole[:4096] + os.urandom(4096) + whole[8192:]: "is damaged|is not a store",
        whole[:5000]: "is damaged",
    }
    for damaged, message in damages.items():
        for beside in store.path.parent.iterdir():
            beside.unlink()
        store.path.write_bytes(damaged)
        with pytest.raises(StoreError, match=message) as error:
            store.run(store.runs()[0].id)
        assert "\n" not in str(error.value)


def test_damaged_rows_are_reported(store: Store) -> None:
    store.put(synthetic_runs.run(1), [synthetic_runs.requests(10)], [synthetic_runs.timeline(10)])
    run_id = synthetic_runs.run(1).id
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE blobs SET data = substr(data, 1, 60)")
        db.execute("UPDATE measurements SET data = '{}'")
    for use in (lambda: store.requests(run_id, 0), lambda: store.timeline(run_id, 0), lambda: store.run(run_id)):
        with pytest.raises(StoreError, match="damaged"):
            use()


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    for use in (Store(path).runs, lambda: Store(path).put(synthetic_runs.run(1))):
        with pytest.raises(StoreError, match="is a database of another program; choose another file with --store"):
            use()
    assert path.read_bytes() == before


def test_a_locked_store_is_reported(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_S", 0.05)
    holder = sqlite3.connect(kept.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="is locked by another program"):
        kept.put(synthetic_runs.run(2))
    assert len(kept.runs()) == 1  # readers do not wait for a writer
    holder.execute("ROLLBACK")
    holder.close()


def with_pragma(monkeypatch: pytest.MonkeyPatch, pragma: str) -> None:
    """Every connection of the store's is opened with this, so that SQLite itself refuses."""
    connect = sqlite3.connect

    def opened(*given: Any, **named: Any) -> sqlite3.Connection:
        db = connect(*given, **named)
        db.execute(pragma)
        return db

    monkeypatch.setattr(module.sqlite3, "connect", opened)


def test_a_full_disk_is_reported(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        with_pragma(full, "PRAGMA max_page_count = 1")  # SQLite takes the pages it has for the most
        with pytest.raises(StoreError, match="the disk is full; free some space"):
            kept.put(synthetic_runs.run(2), [synthetic_runs.requests(100_000)])
    assert len(kept.runs()) == 1
    kept.put(synthetic_runs.run(2))


FILLED = """
import sys
import synthetic_runs
from stageline.models.errors import StoreError
from stageline.runtime.bench.store import Store

store, kept = Store(sys.argv[1]), 0
try:
    while True:
        store.put(synthetic_runs.run(kept), [synthetic_runs.requests(2000, kept)])
        kept += 1
except StoreError as error:
    print(error)
assert kept == len(store.runs()) > 0
assert all(len(store.requests(line.id, 0)) == 2000 for line in store.runs())
"""


def test_a_disk_that_is_really_full_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    """On a file system of 300 kB, mounted where only the process that fills it sees it."""
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    mounted = f"mount -t tmpfs -o size=300k tmpfs {tmp_path}"
    try:
        able = subprocess.run([*alone, mounted], capture_output=True, check=False).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("this process may not mount a file system of its own (unshare --mount --map-root-user)")
    filling = f'{mounted}; exec "$0" -c "$1" {tmp_path / "bench.sqlite"}'
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*alone, filling, sys.executable, FILLED],
        capture_output=True, check=False, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.endswith(
        "bench.sqlite cannot grow: the disk is full; free some space. Everything stored before is kept"
    )


def test_a_read_only_store_is_read_and_refuses_to_be_written(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as read_only:
        with_pragma(read_only, "PRAGMA query_only = 1")
        assert len(kept.runs()) == 1
        with pytest.raises(StoreError, match="is read-only; make it writable"):
            kept.put(synthetic_runs.run(2))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody can write to")
def test_a_store_that_cannot_be_made_is_reported() -> None:
    for path in (Path("/sys/kernel/bench.sqlite"), Path("/dev/null/bench.sqlite")):
        with pytest.raises(StoreError, match=f"store {path} cannot be"):
            Store(path).put(synthetic_runs.run(1))


def test_the_store_lies_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGELINE_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "stageline" / "bench.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local" / "share" / "stageline" / "bench.sqlite"
    monkeypatch.setenv("STAGELINE_STORE", str(tmp_path / "mine"))
    assert Store().path == tmp_path / "mine"


def test_loads_read_as_people_say_them() -> None:
    loads = [Load("SingleStream"), Load("Offline"), Load("Server", rate_per_s=2.5), Load("Concurrency", concurrency=8)]
    assert list(map(str, loads)) == ["SingleStream", "Offline", "Server 2.5/s", "8 at a time"]
    bursts = Load("Rate", rate_per_s=8.0, pattern="bursts:4", ceiling=16)
    assert str(bursts) == "Rate 8/s bursts:4, at most 16 at a time"
