"""What SQLite and the system refuse, as a StoreError of one line that says what to do."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageline.models.errors import StoreError

BUSY_S = 10.0
"""How long a store that another program writes is waited for."""
_LOCKED = f"is locked by another program for more than {BUSY_S:g} s; end that program, or try again"
_WORDS = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: "is read-only; make it writable, or choose another file with --store",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full; free some space. Everything stored before is kept",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore a copy of it, or move it away to start a new one",
    sqlite3.SQLITE_NOTADB: "is not a store, or is damaged; restore a copy of it, or choose another file with --store",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that its folder exists and can be written, or choose another "
    "file with --store",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk failed, or is full; everything stored before is kept",
}


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Turns failures of the store at `path` in the block into a StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        code = (error.sqlite_errorcode if hasattr(error, "sqlite_errorcode") else 0) & 0xFF
        if code in _WORDS:
            raise StoreError(f"store {path} {_WORDS[code]}") from error
        raise StoreError(f"store {path}: {error}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"cannot be used ({error.strerror}); choose another file with --store"
        raise StoreError(f"store {path} {_WORDS[sqlite3.SQLITE_FULL] if full else reason}") from error
