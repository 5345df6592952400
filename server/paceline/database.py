"""The database in the state directory: one SQLite file, what it holds, how it is opened.

WAL, so that a kill loses nothing that was committed; `PRAGMA user_version` counts the steps of
`_STEPS` that were taken, each in a transaction of its own, so that an older file is brought up to
date when it is opened. A newer one is left alone.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from paceline.core.errors import ConfigError

FILE = "paceline.sqlite3"
_BUSY_S = 5.0

_STEPS = (
    """
    CREATE TABLE chains (
        name TEXT PRIMARY KEY,
        document TEXT,          -- as applied; NULL: deleted
        declared TEXT NOT NULL  -- what its file said then; '': it had none
    ) STRICT;
    CREATE TABLE traffic (
        name TEXT PRIMARY KEY,
        document TEXT NOT NULL, -- the chain that it was measured of
        rate_rps REAL NOT NULL,
        fan_outs TEXT NOT NULL  -- JSON, by module
    ) STRICT;
    """,
    """
    CREATE TABLE profiles (
        model TEXT NOT NULL,
        key TEXT NOT NULL,      -- machine and content
        document TEXT NOT NULL, -- JSON
        PRIMARY KEY (model, key)
    ) STRICT;
    CREATE TABLE sizes (
        model TEXT PRIMARY KEY,
        content TEXT NOT NULL,  -- the files that it was measured with
        own_bytes INTEGER NOT NULL
    ) STRICT;
    """,
)


def connect(directory: Path, *, any_thread: bool = False) -> sqlite3.Connection:
    """The database of a state directory, created or brought up to date; `any_thread`: for several
    threads that take turns.

    Raises ConfigError when a newer Paceline wrote it, sqlite3.Error when it cannot be used.
    """
    path = directory / FILE
    database = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level="IMMEDIATE", check_same_thread=not any_thread
    )
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(_STEPS):
            raise ConfigError(
                f"{path} was written by a newer Paceline (schema {version}, this one knows "
                f"{len(_STEPS)}); use that one, or another directory",
                key="--state-dir",
            )
        if version < len(_STEPS):
            database.execute("PRAGMA journal_mode = WAL")
            _migrate(database)
        database.execute("PRAGMA synchronous = FULL")
    except BaseException:
        database.close()
        raise
    return database


def _migrate(database: sqlite3.Connection) -> None:
    """One step after the other; several processes may do so at once."""
    for number, step in enumerate(_STEPS, 1):
        database.execute("BEGIN IMMEDIATE")
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version < number:
                for statement in step.split(";\n"):
                    if statement.strip():
                        database.execute(statement)
                database.execute(f"PRAGMA user_version = {number}")
            database.execute("COMMIT")
        except BaseException:
            database.rollback()
            raise


class Measurements:
    """What was measured of models, by any thread: profiles and sizes. Raises sqlite3.Error."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def profile(self, model: str, key: str) -> str | None:
        """The document kept of a model under a key."""
        with closing(connect(self._directory)) as database:
            found = database.execute(
                "SELECT document FROM profiles WHERE model = ? AND key = ?", (model, key)
            ).fetchone()
        return None if found is None else str(found[0])

    def keep_profile(self, model: str, key: str, document: str) -> None:
        with closing(connect(self._directory)) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", (model, key, document)
            )

    def size_bytes(self, model: str, content: str) -> int | None:
        """What an instance took when the model had this content."""
        with closing(connect(self._directory)) as database:
            found = database.execute(
                "SELECT own_bytes FROM sizes WHERE model = ? AND content = ?", (model, content)
            ).fetchone()
        return None if found is None else int(found[0])

    def keep_size(self, model: str, content: str, own_bytes: int) -> None:
        with closing(connect(self._directory)) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO sizes VALUES (?, ?, ?)", (model, content, own_bytes)
            )
