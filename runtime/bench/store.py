"""The store: all benchmark runs in one SQLite file, which one process may fill while others read.

    store = Store(path)   default: `default_path()`
    store.runs()          lines for a list, newest first; reads no requests
    store.run(id)         a run with its measurements
    store.requests(id, n) the requests of measurement n; a million take a fraction of a second
    store.timelines(id)   the measurements that have a timeline
    store.timeline(id, n)

A run is written as it proceeds: `begin`, then `progress`, `add` for each complete measurement, and `end`. Requests are
columns in compressed blobs; lists read precomputed headlines. `progress` returns whether somebody asked to `cancel` the
run. A run whose process died shows as failed.

Each call opens the file: a Store may be used from any thread and needs no closing. Every failure is a StoreError of one
line. A write is a transaction: it keeps what was stored before.
"""

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from stageline.models.errors import StoreError
from stageline.runtime.bench.columns import pack, unpack
from stageline.runtime.bench.records import (
    COLUMNS,
    Headline,
    Measurement,
    Progress,
    Requests,
    Run,
    RunLine,
    Status,
    Timeline,
)
from stageline.runtime.bench.store_failures import BUSY_S, failures_named
from stageline.runtime.bench.store_schema import MIGRATIONS, VERSION
from stageline.runtime.validation import first_error

LOST_AFTER_S = 60.0
"""A running run whose process has reported nothing for this long counts as failed. It reports every second."""
_APPLICATION = 0x53544C4E  # "STLN", in SQLite's file header
_PART = 100_000  # requests in a blob

_RUN = pydantic.TypeAdapter(Run)
_MEASUREMENT = pydantic.TypeAdapter(Measurement)
_HEADLINES = pydantic.TypeAdapter(tuple[Headline, ...])
_PROGRESS = pydantic.TypeAdapter(Progress)
_TIMELINE = pydantic.TypeAdapter(Timeline)
_T = TypeVar("_T")


def default_path() -> Path:
    """$STAGELINE_STORE, or stageline/bench.sqlite in the user's data folder (XDG)."""
    if stated := os.environ.get("STAGELINE_STORE"):
        return Path(stated)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "stageline" / "bench.sqlite"


class Store:
    """The runs in the file `path`. The first write creates it; until then the store is empty."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()

    # Reading

    def runs(self, limit: int | None = None, bundle_digest: str | None = None) -> list[RunLine]:
        """The newest `limit` runs, newest first; only those of one bundle if `bundle_digest` is given."""
        where = "" if bundle_digest is None else "WHERE bundle_digest = ?"
        given: list[Any] = [] if bundle_digest is None else [bundle_digest]
        with self._reading() as db:
            if db is None:
                return []
            rows = db.execute(
                f"SELECT {_LINE} FROM runs {where} ORDER BY created DESC, id DESC LIMIT ?", [*given, limit or -1]
            ).fetchall()
        return [self._line(row) for row in rows]

    def run(self, run_id: str) -> Run:
        """A run and its measurements so far. StoreError if there is no such run."""
        with self._reading() as db:
            row = (
                None if db is None else db.execute(f"SELECT {_LINE}, data FROM runs WHERE id = ?", [run_id]).fetchone()
            )
            if db is None or row is None:
                raise StoreError(f"store {self.path} has no run {run_id}; see stageline bench list")
            measured = db.execute("SELECT data FROM measurements WHERE run = ? ORDER BY number", [run_id]).fetchall()
        line = self._line(row[:-1])
        return replace(
            self._valid(_RUN, row[-1]),
            status=line.status,
            error=line.error,
            finished=line.finished,
            progress=line.progress,
            measurements=tuple(self._valid(_MEASUREMENT, data) for (data,) in measured),
        )

    def requests(self, run_id: str, measurement: int) -> Requests:
        """The requests of a measurement, counted from 0; empty if none were kept."""
        parts = [unpack(blob) for blob in self._blobs(run_id, measurement, "requests")]
        return Requests.join([Requests(**{name: part[name] for name, _ in COLUMNS}) for part in parts])  # type: ignore[arg-type]

    def timelines(self, run_id: str) -> list[int]:
        """The numbers of the measurements of a run, from 0, that have a timeline; reads none."""
        with self._reading() as db:
            rows = (
                []
                if db is None
                else db.execute(
                    "SELECT DISTINCT measurement FROM blobs WHERE run = ? AND kind = 'timeline' ORDER BY measurement",
                    [run_id],
                ).fetchall()
            )
        return [number for (number,) in rows]

    def timeline(self, run_id: str, measurement: int) -> Timeline:
        """The timeline of a measurement; empty if none was recorded."""
        for blob in self._blobs(run_id, measurement, "timeline"):
            try:
                return self._valid(_TIMELINE, zlib.decompress(blob))
            except zlib.error as error:
                raise StoreError(f"store {self.path} is damaged ({error}); restore a copy of it") from error
        return Timeline()

    def find(self, name: str) -> str:
        """The id that `name` stands for: an id, its unique beginning, `latest`, or `latest~N` for the Nth before it.

        StoreError if none or several match.
        """
        head, _, back = name.partition("~")
        if head == "latest" and (not back or back.isdecimal()):
            place = int(back or 0)
            lines = self.runs(place + 1)
            if len(lines) <= place:
                raise StoreError(
                    f"store {self.path} has {len(lines)} runs, so there is no {name}; see stageline bench list"
                )
            return lines[place].id
        with self._reading() as db:
            found = (
                []
                if db is None
                else db.execute("SELECT id FROM runs WHERE substr(id, 1, ?) = ?", [len(name), name]).fetchall()
            )
        ids = [run_id for (run_id,) in found]
        if name in ids:
            return name
        if len(ids) != 1 or not name:
            matching = f"{len(ids)} runs whose id begins with {name}" if ids else f"no run {name}"
            raise StoreError(f"store {self.path} has {matching}; see stageline bench list")
        return str(ids[0])

    # Writing

    def begin(self, run: Run) -> None:
        """Store a run that begins now. StoreError if its id exists already: of two processes that are asked to make the
        same run, one fails."""
        with self._writing() as db:
            self._insert(db, run)

    def progress(self, run_id: str, progress: Progress) -> bool:
        """Store how far a run is, and that its process is alive. Returns whether the run should stop."""
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET progress = ?, seen = ? WHERE id = ?", [_json(_PROGRESS, progress), time.time(), run_id]
            )
            row = db.execute("SELECT cancel FROM runs WHERE id = ?", [run_id]).fetchone()
        if row is None:
            raise StoreError(f"run {run_id} was deleted from {self.path} while it was made")
        return bool(row[0])

    def add(
        self, run_id: str, measurement: Measurement, requests: Requests | None = None, timeline: Timeline | None = None
    ) -> int:
        """Store a complete measurement with its requests and timeline; returns its number in the run."""
        with self._writing() as db:
            return self._add(db, run_id, measurement, requests, timeline)

    def end(self, run_id: str, status: Status, error: str | None = None) -> None:
        """Mark a run as done, cancelled, or failed with this error."""
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET status = ?, error = ?, finished = ?, seen = ? WHERE id = ?",
                [status, error, time.time(), time.time(), run_id],
            )

    def cancel(self, run_id: str) -> bool:
        """Ask the process of a run to stop and keep what it has measured. False if the run is not running."""
        if self.run(run_id).status != "running":
            return False
        with self._writing() as db:
            db.execute("UPDATE runs SET cancel = 1 WHERE id = ?", [run_id])
        return True

    def delete(self, run_id: str) -> None:
        """Remove a run with its requests and timelines. StoreError if there is no such run."""
        with self._writing() as db:
            if db.execute("DELETE FROM runs WHERE id = ?", [run_id]).rowcount == 0:
                raise StoreError(f"store {self.path} has no run {run_id}; see stageline bench list")

    def put(self, run: Run, requests: Sequence[Requests] = (), timelines: Sequence[Timeline] = ()) -> None:
        """Store a run that has ended; `requests` and `timelines` in the order of its measurements.

        StoreError if its id exists already.
        """
        with self._writing() as db:
            self._insert(db, run)
            for number, measurement in enumerate(run.measurements):
                self._add(
                    db,
                    run.id,
                    measurement,
                    requests[number] if number < len(requests) else None,
                    timelines[number] if number < len(timelines) else None,
                )

    # Internals

    def _insert(self, db: sqlite3.Connection, run: Run) -> None:
        bare = replace(run, measurements=(), progress=Progress())
        try:
            db.execute(
                "INSERT INTO runs (id, created, finished, name, bundle, bundle_digest, status, error, seen, progress, "
                "headlines, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [run.id, run.created, run.finished, run.name, run.bundle, run.bundle_digest, run.status, run.error,
                 time.time(), _json(_PROGRESS, run.progress), "[]", _json(_RUN, bare)],
            )  # fmt: skip
        except sqlite3.IntegrityError as error:
            raise StoreError(f"run {run.id} is in {self.path} already; see stageline bench show {run.id}") from error

    def _add(
        self,
        db: sqlite3.Connection,
        run_id: str,
        measurement: Measurement,
        requests: Requests | None,
        timeline: Timeline | None,
    ) -> int:
        row = db.execute("SELECT headlines FROM runs WHERE id = ?", [run_id]).fetchone()
        if row is None:
            raise StoreError(f"run {run_id} was deleted from {self.path} while it was made")
        headlines = self._valid(_HEADLINES, row[0])
        number = len(headlines)
        db.execute("INSERT INTO measurements VALUES (?, ?, ?)", [run_id, number, _json(_MEASUREMENT, measurement)])
        blobs: list[tuple[str, int, bytes]] = []
        if requests is not None:
            for part, first in enumerate(range(0, len(requests), _PART)):
                columns = {
                    name: getattr(requests, name)[first : first + _PART].astype(dtype) for name, dtype in COLUMNS
                }
                blobs.append(("requests", part, pack(columns)))
        if timeline is not None:
            blobs.append(("timeline", 0, zlib.compress(_TIMELINE.dump_json(timeline))))
        db.executemany(
            "INSERT INTO blobs VALUES (?, ?, ?, ?, ?)",
            [(run_id, number, kind, part, data) for kind, part, data in blobs],
        )
        db.execute(
            "UPDATE runs SET headlines = ?, seen = ? WHERE id = ?",
            [_json(_HEADLINES, (*headlines, Headline.of(measurement))), time.time(), run_id],
        )
        return number

    def _line(self, row: Sequence[Any]) -> RunLine:
        run_id, name, created, finished, bundle, digest, status, error, progress, headlines, seen, checkpoint = row
        if status == "running" and time.time() - seen > LOST_AFTER_S:
            status, error, finished = (
                "failed",
                "its process ended without reporting an error; its measurements so far are kept",
                seen,
            )
        return RunLine(
            run_id, name, created, finished, bundle, digest, status, error,
            self._valid(_PROGRESS, progress), self._valid(_HEADLINES, headlines), checkpoint or "",
        )  # fmt: skip

    def _blobs(self, run_id: str, measurement: int, kind: str) -> list[bytes]:
        with self._reading() as db:
            if db is None:
                return []
            rows = db.execute(
                "SELECT data FROM blobs WHERE run = ? AND measurement = ? AND kind = ? ORDER BY part",
                [run_id, measurement, kind],
            ).fetchall()
        return [data for (data,) in rows]

    def _valid(self, kind: "pydantic.TypeAdapter[_T]", data: str | bytes) -> _T:
        try:
            return kind.validate_json(data)
        except pydantic.ValidationError as error:
            raise StoreError(f"store {self.path} is damaged ({first_error(error)}); restore a copy of it") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The open file, or None if there is none. All reads in the block see one moment."""
        if not self.path.exists():
            yield None
            return
        with failures_named(self.path), closing(self._open("ro")) as db:
            version = self._version(db)
            if version == 0:
                yield None
                return
            if version < VERSION:
                with self._writing():
                    pass  # brings it up to date
            db.execute("BEGIN")
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The open file, its schema up to date, in a transaction that is undone if the block raises."""
        with failures_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open("rwc")) as db:
                if self._version(db) < VERSION:
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("BEGIN IMMEDIATE")
                try:
                    for number in range(self._version(db), VERSION):
                        for statement in MIGRATIONS[number].split(";"):
                            db.execute(statement)
                        db.execute(f"PRAGMA user_version = {number + 1}")
                        db.execute(f"PRAGMA application_id = {_APPLICATION}")
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise

    def _open(self, mode: str) -> sqlite3.Connection:
        path = self.path.resolve()
        uri = f"{path.as_uri()}?mode={mode}"
        if mode == "ro" and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
            uri += "&immutable=1"  # readers, too, create files beside it; here nobody can
        return sqlite3.connect(uri, timeout=BUSY_S, isolation_level=None, uri=True)

    def _version(self, db: sqlite3.Connection) -> int:
        """The version of the file's schema; 0: none yet. StoreError if the file is not a store, or is too new."""
        application, version = (
            int(db.execute(f"PRAGMA {n}").fetchone()[0]) for n in ("application_id", "user_version")
        )
        if application != _APPLICATION and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"{self.path} is a database of another program; choose another file with --store")
        if version > VERSION:
            raise StoreError(
                f"store {self.path} has version {version}; this stageline reads up to version {VERSION}: "
                "install a newer stageline, or choose another file with --store"
            )
        return version


_LINE = (
    "id, name, created, finished, bundle, bundle_digest, status, error, progress, headlines, seen, "
    "CASE WHEN json_valid(data) THEN json_extract(data, '$.checkpoint') END"
)


def _json(kind: "pydantic.TypeAdapter[_T]", value: _T) -> str:
    return kind.dump_json(value).decode()
