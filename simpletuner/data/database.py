"""Files of SQLite that hold nothing which cannot be found out again: one that is damaged or of another version is made anew."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from simpletuner.errors import DatasetError, MemoryLimitError

LOCK_SECONDS = 120.0


@contextmanager
def open_database(path: Path, version: int, schema: str) -> Iterator[sqlite3.Connection]:
    """Open a database for a while.

    Args:
        version: of what is kept in it, and of how that is found out; above 0.
        schema: statements that make what is not there yet.

    Raises:
        DatasetError: it cannot be written.
        MemoryLimitError: the disk is full.
    """
    with told_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(connect(path, version, schema)) as base:
            yield base


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk complain of into what a user can do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if "full" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise MemoryLimitError(f"the disk is full: {path} cannot grow", hint="Free some space, or set cache_dir to a larger disk.") from error
        raise DatasetError(f"the index {path} cannot be used: {error}", hint="Set cache_dir to a folder that this user may write to.") from error


def connect(path: Path, version: int, schema: str) -> sqlite3.Connection:
    """Open the database; throw away one that is damaged or of another version."""
    for _ in range(2):
        base = sqlite3.connect(path, timeout=LOCK_SECONDS)
        try:
            found = base.execute("PRAGMA user_version").fetchone()[0]
            if found in (0, version) and base.execute("PRAGMA quick_check").fetchone()[0] == "ok":
                base.execute("PRAGMA synchronous = NORMAL")
                base.executescript(schema)
                if found == 0:
                    base.execute(f"PRAGMA user_version = {version}")
                return base
        except sqlite3.OperationalError:
            base.close()
            raise
        except sqlite3.DatabaseError:  # not a database, or a damaged one
            pass
        base.close()
        for leftover in (path, path.with_name(path.name + "-journal")):
            leftover.unlink(missing_ok=True)
    raise DatasetError(f"the index {path} cannot be made", hint="Delete it and start again.")
