"""The store's tables, and how a file of an older version gets them."""

MIGRATIONS = (
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        created REAL NOT NULL,
        finished REAL,
        name TEXT NOT NULL,
        bundle TEXT NOT NULL,
        bundle_digest TEXT NOT NULL,
        status TEXT NOT NULL,
        error TEXT,
        cancel INTEGER NOT NULL DEFAULT 0,
        seen REAL NOT NULL,
        progress TEXT NOT NULL,
        headlines TEXT NOT NULL,
        data TEXT NOT NULL
    );
    CREATE INDEX runs_by_time ON runs (created);
    CREATE INDEX runs_by_bundle ON runs (bundle_digest, created);
    CREATE TABLE measurements (
        run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        data TEXT NOT NULL,
        PRIMARY KEY (run, number)
    );
    CREATE TABLE blobs (
        run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        measurement INTEGER NOT NULL,
        kind TEXT NOT NULL,
        part INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (run, measurement, kind, part)
    );
    """,
)
"""Turn version n of the schema into version n + 1. Never change a released one: add another."""
VERSION = len(MIGRATIONS)
