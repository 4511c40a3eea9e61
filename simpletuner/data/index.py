"""What is known of a dataset's files, kept in one file: a second start opens only what changed.

A row is trusted while its file has the same size and time of change. Work is written down every second, so an
interrupted start loses no more than that. The file lies in the cache folder, never beside the user's images.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import PIL

from simpletuner.console import Bar
from simpletuner.data.backend import Entry
from simpletuner.data.faults import Header, look
from simpletuner.errors import DatasetError, MemoryLimitError

VERSION = 1
"""Raised when what is kept, or how it is found out, changes; an index of another version is made anew."""
COMMIT_SECONDS = 1.0
LOCK_SECONDS = 120.0
CHUNK = 256
SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    name TEXT PRIMARY KEY, size_bytes INT, modified_ns INT, content TEXT, width INT, height INT, traits TEXT, fault TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (name TEXT PRIMARY KEY, size_bytes INT, modified_ns INT, text TEXT, encoding TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
Row = tuple[Any, ...]
OpenBar = Callable[[int], AbstractContextManager[Bar]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Changes:
    """Files of a dataset against the last time it was looked at."""

    new: int = 0
    changed: int = 0
    gone: int = 0

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "gone": self.gone}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing changed"


@dataclass(frozen=True, slots=True)
class Seen:
    """One image as it was found."""

    content: str
    """Digest of its bytes."""
    header: Header


class Index:
    """The index of one dataset; got from `open_index`."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def images(self, entries: Sequence[Entry], read: Callable[[str], bytes], bar: OpenBar) -> tuple[dict[str, Seen], Changes]:
        """Give what is known of images, reading those that are new or changed; forget those not among `entries`.

        Args:
            entries: every image of the dataset.
            read: gives a file's bytes, called from threads; a DatasetError makes the image `unreadable` for this time.
            bar: opens a bar for so many files; called only if some must be read.
        """

        def examine(entry: Entry) -> Row | None:
            try:
                data = read(entry.name)
            except DatasetError:
                return None
            header = look(data, entry.name)
            return digest(data), header.width, header.height, ",".join(header.traits), header.fault

        rows, changes = self._refresh("images", entries, examine, bar)
        return {entry.name: seen_from(rows.get(entry.name)) for entry in entries}, changes

    def texts(self, entries: Sequence[Entry], read: Callable[[str], tuple[str, str]], bar: OpenBar) -> tuple[dict[str, Row], Changes]:
        """Give text and encoding of caption files in the same way; a file that cannot be read is not in the answer."""

        def examine(entry: Entry) -> Row | None:
            try:
                return read(entry.name)
            except DatasetError:
                return None

        return self._refresh("texts", entries, examine, bar)

    def _refresh(self, table: str, entries: Sequence[Entry], examine: Callable[[Entry], Row | None], bar: OpenBar) -> tuple[dict[str, Row], Changes]:
        """Bring a table up to date; rows come without name and stamp, their first value tells whether a file changed."""
        base = self._base
        listed = {entry.name: entry for entry in entries}
        rows: dict[str, Row] = {}
        before: dict[str, Any] = {}
        gone: list[tuple[str]] = []
        for name, size_bytes, modified_ns, *row in base.execute(f"SELECT * FROM {table}"):
            entry = listed.get(name)
            if entry is None:
                gone.append((name,))
            elif (entry.size_bytes, entry.modified_ns) == (size_bytes, modified_ns):
                rows[name] = tuple(row)
            else:
                before[name] = row[0]
        stale = [entry for entry in entries if entry.name not in rows]
        new = changed = 0
        if stale:
            written = time.monotonic()
            with bar(len(stale)) as open_bar:
                for entry, found in examined(stale, examine):
                    open_bar.advance()
                    if found is None:
                        continue
                    rows[entry.name] = found
                    new += entry.name not in before
                    changed += entry.name in before and before[entry.name] != found[0]
                    values = (entry.name, entry.size_bytes, entry.modified_ns, *found)
                    base.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(values))})", values)
                    if time.monotonic() - written > COMMIT_SECONDS:
                        base.commit()
                        written = time.monotonic()
        base.executemany(f"DELETE FROM {table} WHERE name = ?", gone)
        base.commit()
        return rows, Changes(new, changed, len(gone))


def seen_from(row: Row | None) -> Seen:
    """One row of `images`; None is a file that could not be opened."""
    if row is None:
        return Seen("", Header(fault="unreadable"))
    content, width, height, traits, fault = row
    return Seen(content, Header(width, height, tuple(traits.split(",")) if traits else (), fault))


@contextmanager
def open_index(path: Path) -> Iterator[Index]:
    """Open an index for a while; it is made anew if it is damaged or of another version.

    Raises:
        DatasetError: it cannot be written.
        MemoryLimitError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(connect(path)) as base:
            yield Index(base)
    except (sqlite3.Error, OSError) as error:
        if "full" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise MemoryLimitError(f"the disk is full: {path} cannot grow", hint="Free some space, or set cache_dir to a larger disk.") from error
        raise DatasetError(f"the index {path} cannot be used: {error}", hint="Set cache_dir to a folder that this user may write to.") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open the database; throw away one that is damaged or of another version."""
    for _ in range(2):
        base = sqlite3.connect(path, timeout=LOCK_SECONDS)
        try:
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version in (0, VERSION) and base.execute("PRAGMA quick_check").fetchone()[0] == "ok":
                prepare(base, is_new=version == 0)
                return base
        except sqlite3.OperationalError:
            base.close()
            raise
        except sqlite3.DatabaseError:  # not a database, or a damaged one: it holds nothing that cannot be found out again
            pass
        base.close()
        for leftover in (path, path.with_name(path.name + "-journal")):
            leftover.unlink(missing_ok=True)
    raise DatasetError(f"the index {path} cannot be made", hint="Delete it and start again.")


def prepare(base: sqlite3.Connection, is_new: bool) -> None:
    """Make the tables, and forget faults found by another Pillow, which may read what this one does not."""
    base.execute("PRAGMA synchronous = NORMAL")
    if is_new:
        base.executescript(SCHEMA)
        base.execute(f"PRAGMA user_version = {VERSION}")
    reader = base.execute("SELECT value FROM about WHERE key = 'reader'").fetchone()
    if reader != (PIL.__version__,):
        base.execute("DELETE FROM images WHERE fault IS NOT NULL")
        base.execute("INSERT OR REPLACE INTO about VALUES ('reader', ?)", (PIL.__version__,))
    base.commit()


def examined(entries: Sequence[Entry], examine: Callable[[Entry], T]) -> Iterator[tuple[Entry, T]]:
    """Examine entries on several threads, in order, a bounded number ahead."""
    if not entries:
        return
    waiting = iter(entries)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        while chunk := list(islice(waiting, CHUNK)):
            yield from zip(chunk, pool.map(examine, chunk))


def digest(data: bytes) -> str:
    """Identity of an image: its bytes, whatever its name."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
