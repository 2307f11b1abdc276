"""Runs as files: JSON holds everything; CSV and Parquet hold the requests as a table, with the run attached.

All three can be imported again. The first line of a CSV is a comment with the run as JSON; Parquet has it in its
metadata. Only JSON holds timelines.
"""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from stageline.models.errors import StagelineError, StoreError
from stageline.runtime.bench.columns import pack, unpack
from stageline.runtime.bench.records import COLUMNS, Requests, Run, Timeline
from stageline.runtime.bench.store import Store

FORMATS = ("json", "csv", "parquet")
_KEY = b"stageline-run"
_COMMENT = "# stageline-run "
_VERSION = 1
# Begins, in a text of the comment, a cell that a spreadsheet takes for a formula. Beside texts JSON has none.
_FORMULA = re.compile(r"[,;](?=[=+@]|-(?!\d[\d.eE+-]*[,\]}]))")


class _File(pydantic.BaseModel):
    """The content of a JSON file. `requests`: packed columns in base64, one string per measurement."""

    format: str = "stageline-run"
    version: int = _VERSION
    run: Run
    requests: list[str] = []
    timelines: list[Timeline] = []


@dataclass(frozen=True)
class ExportedRun:
    """A run with its requests and timelines, one of each per measurement."""

    run: Run
    requests: list[Requests]
    timelines: list[Timeline]


def read(store: Store, run_id: str) -> ExportedRun:
    """Read a whole run from the store."""
    run = store.run(run_id)
    numbers = range(len(run.measurements))
    return ExportedRun(run, [store.requests(run_id, n) for n in numbers], [store.timeline(run_id, n) for n in numbers])


def save(exported: ExportedRun, path: Path) -> None:
    """Write a run to `path`, in the format of its suffix: aside, then renamed. StagelineError if it exists already or
    cannot be written."""
    writer = _WRITERS[_format(path)]
    if path.exists():
        raise StagelineError(f"{path} exists already; delete it, or choose another file")
    aside = path.with_name(f".{path.name}.part")
    try:
        writer(exported, aside)
        aside.replace(path)
    except OSError as error:
        raise StagelineError(f"{path} cannot be written: {error.strerror}; choose another file") from error
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> ExportedRun:
    """Read a run from a file. StoreError if it cannot be read, is damaged, or has a newer version."""
    kind = _format(path)
    try:
        return _READERS[kind](path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; make one with: stageline bench export RUN -o {path}") from error
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, csv.Error) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"{path} is not an exported run ({line}); export it again") from error


def plain_cell(value: Any) -> Any:
    """A value for a cell of a CSV file. A text that a spreadsheet would take for a formula gets an apostrophe before
    it, as spreadsheets write it themselves."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _format(path: Path) -> str:
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise StagelineError(
            f"{path} ends with {path.suffix or 'nothing'!r}; give a file that ends with .json, .csv or .parquet"
        )
    return kind


def _document(exported: ExportedRun, requests: bool) -> str:
    packed = [base64.b64encode(pack(_columns(one))).decode() for one in exported.requests] if requests else []
    timelines = exported.timelines if requests else []
    return _File(run=exported.run, requests=packed, timelines=timelines).model_dump_json()


def _parse(text: str | bytes) -> _File:
    head = json.loads(text)
    if not isinstance(head, dict) or head.get("format") != "stageline-run":
        raise ValueError("it does not name its format")
    if head.get("version") != _VERSION:
        raise StoreError(
            f"this exported run has version {head.get('version')}; this stageline reads version {_VERSION}: "
            "install a newer stageline"
        )
    return _File.model_validate_json(text)


def _columns(requests: Requests) -> dict[str, np.ndarray[Any, Any]]:
    return {name: getattr(requests, name) for name, _ in COLUMNS}


def _write_json(exported: ExportedRun, path: Path) -> None:
    path.write_text(_document(exported, requests=True), encoding="utf-8")


def _read_json(path: Path) -> ExportedRun:
    file = _parse(path.read_bytes())
    requests = [Requests(**unpack(base64.b64decode(one))) for one in file.requests]  # type: ignore[arg-type]
    return ExportedRun(file.run, requests, file.timelines)


def _table(exported: ExportedRun) -> tuple[list[str], dict[str, Any]]:
    """All requests as columns, with number, contender and load of their measurement."""
    joined = Requests.join(exported.requests)
    counts = [len(one) for one in exported.requests]
    measured = exported.run.measurements[: len(counts)]
    columns: dict[str, Any] = {
        "measurement": np.repeat(np.arange(len(counts)), counts),
        "contender": np.repeat([m.contender for m in measured], counts),
        "load": np.repeat([str(m.load) for m in measured], counts),
        **_columns(joined),
    }
    return list(columns), columns


def _of_table(file: _File, columns: dict[str, Any]) -> ExportedRun:
    number = np.asarray(columns["measurement"]).astype(int)
    typed = {name: np.asarray(columns[name]).astype(dtype) for name, dtype in COLUMNS}
    requests = [
        Requests(**{name: column[number == n] for name, column in typed.items()})
        for n in range(len(file.run.measurements))
    ]
    return ExportedRun(file.run, requests, [])


def _write_csv(exported: ExportedRun, path: Path) -> None:
    names, columns = _table(exported)
    with path.open("w", encoding="utf-8", newline="") as file:
        run = _FORMULA.sub(lambda mark: f"\\u{ord(mark[0]):04x}", _document(exported, requests=False))
        file.write(f"{_COMMENT}{run}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in zip(*(columns[name].tolist() for name in names), strict=True):
            writer.writerow([plain_cell(value) for value in row])


def _read_csv(path: Path) -> ExportedRun:
    with path.open(encoding="utf-8", newline="") as file:
        first = file.readline()
        if not first.startswith(_COMMENT):
            raise ValueError("its first line is not the run")
        parsed = _parse(first[len(_COMMENT) :])
        reader = csv.reader(file)
        names = next(reader, [])
        rows = list(zip(*reader, strict=True)) or [()] * len(names)
    return _of_table(parsed, dict(zip(names, rows, strict=True)))


def _write_parquet(exported: ExportedRun, path: Path) -> None:
    pa, parquet = _arrow()
    names, columns = _table(exported)
    table = pa.table({name: columns[name] for name in names})
    parquet.write_table(table.replace_schema_metadata({_KEY: _document(exported, requests=False)}), path)


def _read_parquet(path: Path) -> ExportedRun:
    _, parquet = _arrow()
    table = parquet.read_table(io.BytesIO(path.read_bytes()))
    text = (table.schema.metadata or {}).get(_KEY)
    if text is None:
        raise ValueError("its metadata does not hold the run")
    return _of_table(_parse(text), {name: table[name].to_numpy() for name in table.column_names})


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise StagelineError(
            'Parquet needs pyarrow: pip install "stageline[parquet]"; or choose .json or .csv'
        ) from error
    return pyarrow, pyarrow.parquet


_WRITERS: dict[str, Callable[[ExportedRun, Path], None]] = {
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
}
_READERS: dict[str, Callable[[Path], ExportedRun]] = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
