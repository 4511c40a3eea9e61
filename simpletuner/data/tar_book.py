"""What tar shards hold, kept on disk: a second start opens no shard that is as it was.

A row is trusted while its shard has the same size and time of change. A shard has one row for the names, places and sizes of its
files, and one for the captions in it, which is only there once somebody asked for captions.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from simpletuner.data.database import open_database
from simpletuner.data.examine import examined
from simpletuner.data.index import COMMIT_SECONDS
from simpletuner.data.tars import Member, Shard, index_shard

VERSION = 1
"""Raised when what is kept, or how it is found out, changes."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (path BLOB, kind TEXT, size_bytes INT, modified_ns INT, facts TEXT, PRIMARY KEY (path, kind)) WITHOUT ROWID;
"""
Kind = Literal["files", "captions"]
Told = dict[str, Any]
"""Name of an image in a shard, to the list of its captions, or to a text that is yet to be split; images without are not in it."""


class TarBook:
    """What is known of the shards of one dataset."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: the file that it is kept in; None keeps nothing.
        """
        self._path = path

    def shards(self, paths: Sequence[Path]) -> dict[Path, Shard]:
        """Give every shard; the headers of those that are new or changed are read, on several threads.

        Raises:
            DatasetError: a shard cannot be opened, or the book cannot be written.
        """
        if self._path is None:
            return dict(examined(paths, index_shard))
        with open_database(self._path, VERSION, SCHEMA) as base:
            found = {path: shard for path in paths if (shard := recalled_shard(base, path)) is not None}
            new = [path for path in paths if path not in found]
            written = ((shard, facts_of(shard)) for _, shard in examined(new, index_shard))
            for shard in write(base, "files", written):
                found[shard.path] = shard
            if new:
                forget_others(base, paths)
        return found

    def captions(self, shards: Sequence[Shard], read: Callable[[Shard], Told]) -> Iterator[tuple[Shard, Told]]:
        """Give each shard with the captions in it, read where they are not known.

        Raises:
            DatasetError: a shard cannot be read or was changed, or the book cannot be written.
        """
        if self._path is None:
            yield from ((shard, read(shard)) for shard in shards)
            return
        with open_database(self._path, VERSION, SCHEMA) as base:
            unread = [shard for shard in shards if not recall(base, "captions", shard.path, shard.size_bytes, shard.modified_ns, "1")]
            for _ in write(base, "captions", examined(unread, read)):
                pass
            for shard in shards:
                told = recall(base, "captions", shard.path, shard.size_bytes, shard.modified_ns)
                yield shard, read(shard) if told is None else json.loads(told)  # another run's datasets of this id may have pushed it out


def recall(base: sqlite3.Connection, kind: Kind, path: Path, size_bytes: int, modified_ns: int, column: str = "facts") -> Any:
    """What is kept of a shard that is as it was; None if nothing is."""
    row = base.execute(
        f"SELECT {column} FROM shards WHERE path = ? AND kind = ? AND size_bytes = ? AND modified_ns = ?",
        (key_of(path), kind, size_bytes, modified_ns),
    ).fetchone()
    return row and row[0]


def recalled_shard(base: sqlite3.Connection, path: Path) -> Shard | None:
    """A shard as it was when it was last looked at, if it is the same today."""
    try:
        now = path.stat()
    except OSError:  # whoever opens it says so
        return None
    facts = recall(base, "files", path, now.st_size, now.st_mtime_ns)
    if facts is None:
        return None
    is_whole, files = json.loads(facts)
    return Shard(path, now.st_size, now.st_mtime_ns, {name: Member(*member) for name, *member in files}, is_whole)


def facts_of(shard: Shard) -> Any:
    """What is kept of a shard."""
    return [shard.is_whole, [(name, member.offset, member.size_bytes, member.fault) for name, member in shard.members.items()]]


def write(base: sqlite3.Connection, kind: Kind, found: Iterable[tuple[Shard, Any]]) -> Iterator[Shard]:
    """Write down what is found of shards as it comes."""
    written = time.monotonic()
    for shard, facts in found:
        row = (key_of(shard.path), kind, shard.size_bytes, shard.modified_ns, json.dumps(facts))
        base.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?)", row)
        if time.monotonic() - written > COMMIT_SECONDS:
            base.commit()
            written = time.monotonic()
        yield shard
    base.commit()


def forget_others(base: sqlite3.Connection, paths: Iterable[Path]) -> None:
    """Forget shards that are gone."""
    here = {key_of(path) for path in paths}
    gone = [(key,) for (key,) in base.execute("SELECT DISTINCT path FROM shards") if key not in here]
    base.executemany("DELETE FROM shards WHERE path = ?", gone)
    base.commit()


def key_of(path: Path) -> bytes:
    """The place of a shard; as bytes, since not every name is a text."""
    return os.fsencode(os.path.abspath(path))
