"""What is known of a dataset's files, kept in one file: a second start opens only what changed.

A row is trusted while its file has the same size and time of change. The first look reads an image's header alone; the digest
of all its bytes is written down when they are first read whole, which is when its latents are made (see `contents.py`).
Work is written down every second, so an interrupted start loses no more than that. The file lies in the cache folder, never
beside the user's images. Rows are read one after another, so that a million of them need no memory here.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from simpletuner.data.backend import DataBackend, Entry, OpenBar
from simpletuner.data.database import LOCK_SECONDS, open_database, told_plainly
from simpletuner.data.examine import examined
from simpletuner.data.faults import Header, glance, look
from simpletuner.data.geometry import Face
from simpletuner.errors import DatasetError

VERSION = 2
"""Raised when what is kept, or how it is found out, changes; an index of another version is made anew."""
COMMIT_SECONDS = 1.0
HEAD_BYTES = 16_384
"""Read of each image first; nearly all headers end in it."""
LONG_HEAD_BYTES = 262_144
"""Read next: previews and colour profiles may stand before the size."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    name TEXT PRIMARY KEY, size_bytes INT, modified_ns INT,
    fingerprint TEXT, content TEXT, width INT, height INT, traits TEXT, fault TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (name TEXT PRIMARY KEY, size_bytes INT, modified_ns INT, text TEXT, encoding TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS faces (
    name TEXT PRIMARY KEY, size_bytes INT, modified_ns INT, "left" INT, top INT, width INT, height INT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending (part TEXT, name TEXT, kind TEXT, PRIMARY KEY (part, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Files of a dataset against the last run that trained on it, whoever has looked at them since."""

    new: int = 0
    changed: int = 0
    touched: int = 0
    """Images with another time of change, but of the same size and beginning: probably as before, read again to be sure."""
    gone: int = 0

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "touched": self.touched, "gone": self.gone}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing changed"


class Seen(NamedTuple):
    """One image as it was found. A tuple, which takes a third of the time of a dataclass to make: there may be a million."""

    fingerprint: str
    """Digest of its size and first bytes; of its size and time of change, where the place itself knew width and height."""
    content: str
    """Digest of its bytes; empty if they were not read yet."""
    header: Header


@dataclass(frozen=True, slots=True)
class Stale:
    """What must be looked at: files that are new or have another stamp, what was known of these, and names that are gone."""

    entries: list[Entry]
    before: dict[str, Row]
    gone: list[str]


@dataclass(frozen=True, slots=True)
class Faces:
    """What looking for faces told of images."""

    found: Mapping[str, Face]
    """The face of each image that has one."""
    unreadable: frozenset[str]
    """Images that could not be read this time."""


class Index:
    """The index of one dataset; got from `open_index`."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base
        self._was_taken_up = self._taken_up() is not None

    def refresh(self, entries: Sequence[Entry], backend: DataBackend, bar: OpenBar) -> tuple[Changes, list[str]]:
        """Look at images that are new or changed, and forget those that are gone.

        Args:
            entries: every image of the dataset, sorted by name.
            bar: opens a bar for so many files; called only if some must be read.

        Returns:
            What changed, and the images that cannot be opened; these are tried again next time.
        """

        def examine(entry: Entry) -> Row | None:
            try:
                return first_look(entry, backend)
            except DatasetError:
                return None

        stale = self._compare("images", "fingerprint, content", entries)
        unreadable: list[str] = []
        for entry, found in self._examine("images", stale, examine, bar):
            before = stale.before.get(entry.name)
            if found is None:
                unreadable.append(entry.name)
            elif before is None:
                self._note("images", entry.name, "new")
            elif before[0] != found[0] or (before[1] and found[1] and before[1] != found[1]):
                self._note("images", entry.name, "changed")
            elif before[1] and not found[1]:
                self._note("images", entry.name, "touched")
        return self._changes("images", stale.gone), sorted(unreadable)

    def images(self) -> Iterator[tuple[str, Seen]]:
        """Every image that could be opened, sorted by name."""
        rows = self._base.execute("SELECT name, fingerprint, content, width, height, traits, fault FROM images ORDER BY name")
        header = lru_cache(maxsize=65_536)(header_of)  # images of one kind share one, which spares time and memory
        for name, fingerprint, content, width, height, traits, fault in rows:
            yield name, Seen(fingerprint, content, header(width, height, traits, fault))

    def sizes(self) -> Iterator[tuple[str, int, int, str | None]]:
        """Name, upright width and height, and fault of every image that could be opened, sorted by name; quicker than `images`."""
        yield from self._base.execute("SELECT name, width, height, fault FROM images ORDER BY name")

    def contents(self) -> Iterator[tuple[str, str, str]]:
        """Name, fingerprint and digest of every image that was read whole."""
        yield from self._base.execute("SELECT name, fingerprint, content FROM images WHERE content != ''")

    def texts(self, entries: Sequence[Entry], read: Callable[[str], tuple[str, str]], bar: OpenBar) -> tuple[dict[str, Row], Changes]:
        """Give text and encoding of caption files, read anew where they changed; one that cannot be read is not in the answer."""

        def examine(entry: Entry) -> Row | None:
            try:
                return read(entry.name)
            except DatasetError:
                return None

        stale = self._compare("texts", "text", entries)
        unreadable: set[str] = set()
        for entry, found in self._examine("texts", stale, examine, bar):
            before = stale.before.get(entry.name)
            if found is None:
                unreadable.add(entry.name)
            elif before is None or before[0] != found[0]:
                self._note("texts", entry.name, "new" if before is None else "changed")
        rows = self._base.execute("SELECT name, text, encoding FROM texts ORDER BY name")
        return {name: tuple(row) for name, *row in rows if name not in unreadable}, self._changes("texts", stale.gone)

    def faces(self, entries: Sequence[Entry], find: Callable[[str], Face | None], bar: OpenBar) -> Faces:
        """Give the face of each image that has one, looked for anew where a file changed.

        Args:
            entries: images, sorted by name.
            find: looks for the face of an image, by its name.
        """

        def examine(entry: Entry) -> Row | None:
            try:
                face = find(entry.name)
            except DatasetError:
                return None
            return (0, 0, 0, 0) if face is None else (face.left, face.top, face.width, face.height)

        stale = self._compare("faces", "width", entries)
        unreadable = frozenset(entry.name for entry, found in self._examine("faces", stale, examine, bar) if found is None)
        rows = self._base.execute('SELECT name, "left", top, width, height FROM faces WHERE width > 0')
        return Faces({name: Face(*box) for name, *box in rows if name not in unreadable}, unreadable)

    def settings(self, current: Mapping[str, str]) -> list[str]:
        """Say which settings are other than those of the last run that trained on it."""
        before = self._taken_up() or {}
        return [f"{key} was {before[key]}, is now {value}" for key, value in current.items() if key in before and before[key] != value]

    def take_up(self, settings: Mapping[str, str]) -> None:
        """A run trains on the files as they are now, with these settings: from here on changes are counted anew."""
        self._base.execute("DELETE FROM pending")
        self._base.execute("INSERT OR REPLACE INTO about VALUES ('settings', ?)", (json.dumps(dict(settings)),))
        self._base.commit()

    def _taken_up(self) -> dict[str, str] | None:
        """Settings of the last run that trained on it; None if none did."""
        row = self._base.execute("SELECT value FROM about WHERE key = 'settings'").fetchone()
        return json.loads(row[0]) if row else None

    def _note(self, part: str, name: str, kind: str) -> None:
        """Keep in mind what happened to a file since a run trained on it; before the first run everything is new anyway."""
        if self._was_taken_up:
            self._base.execute(
                "INSERT INTO pending VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET kind = CASE kind"
                " WHEN 'new' THEN 'new' WHEN 'gone' THEN 'changed' WHEN 'changed' THEN 'changed' ELSE excluded.kind END",
                (part, name, kind),
            )

    def _changes(self, part: str, gone: Iterable[str]) -> Changes:
        """What happened to files since a run trained on them, now that these are gone too."""
        if not self._was_taken_up:
            return Changes(new=self._base.execute(f"SELECT COUNT(*) FROM {part}").fetchone()[0])
        for name in gone:
            if not self._base.execute("DELETE FROM pending WHERE part = ? AND name = ? AND kind = 'new'", (part, name)).rowcount:
                self._base.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, 'gone')", (part, name))
        self._base.commit()
        counts = dict(self._base.execute("SELECT kind, COUNT(*) FROM pending WHERE part = ? GROUP BY kind", (part,)).fetchall())
        return Changes(**counts)

    def _compare(self, table: str, columns: str, entries: Sequence[Entry]) -> Stale:
        """Lay what is listed beside what is known, both sorted by name."""
        known = self._base.execute(f"SELECT name, size_bytes, modified_ns FROM {table} ORDER BY name")
        stale = Stale([], {}, [])
        row = next(known, None)
        for entry in entries:
            while row is not None and row[0] < entry.name:
                stale.gone.append(row[0])
                row = next(known, None)
            if row is None or row[0] != entry.name:
                stale.entries.append(entry)
                continue
            if row[1] != entry.size_bytes or row[2] != entry.modified_ns:
                stale.entries.append(entry)
                stale.before[entry.name] = self._base.execute(f"SELECT {columns} FROM {table} WHERE name = ?", (entry.name,)).fetchone()
            row = next(known, None)
        if row is not None:
            stale.gone.extend((row[0], *(name for name, *_ in known)))
        return stale

    def _examine(self, table: str, stale: Stale, examine: Callable[[Entry], Row | None], bar: OpenBar) -> Iterator[tuple[Entry, Row | None]]:
        """Examine what is stale on several threads, and write it down as it comes."""
        rows: list[Row] = []
        shown = 0
        if stale.entries:
            written = time.monotonic()
            with bar(len(stale.entries)) as open_bar:
                for number, (entry, found) in enumerate(examined(stale.entries, examine), start=1):
                    if found is not None:
                        rows.append((entry.name, entry.size_bytes, entry.modified_ns, *found))
                    yield entry, found
                    if time.monotonic() - written > COMMIT_SECONDS:
                        self._write(table, rows)
                        open_bar.advance(number - shown)
                        shown, written = number, time.monotonic()
                open_bar.advance(len(stale.entries) - shown)
        self._base.executemany(f"DELETE FROM {table} WHERE name = ?", [(name,) for name in stale.gone])
        self._write(table, rows)

    def _write(self, table: str, rows: list[Row]) -> None:
        if rows:
            self._base.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
            rows.clear()
        self._base.commit()


def first_look(entry: Entry, backend: DataBackend) -> Row:
    """Find out about an image what its first bytes tell; fingerprint, content, width, height, traits and fault.

    Raises:
        DatasetError: it cannot be read.
    """
    if entry.size is not None:
        return digest(f"{entry.size_bytes} {entry.modified_ns}".encode()), "", entry.size.width, entry.size.height, "", None
    for count in (HEAD_BYTES, LONG_HEAD_BYTES):
        data = backend.read_head(entry.name, count)
        if len(data) != count or count == entry.size_bytes:
            break  # this is the whole file
        header = glance(data, entry.size_bytes)
        if header is not None:
            return row_of(entry, data, "", header)
    else:
        data = backend.read(entry.name)
    return row_of(entry, data, digest(data), look(data, entry.name))


def row_of(entry: Entry, data: bytes, content: str, header: Header) -> Row:
    fingerprint = digest(b"%d %b" % (entry.size_bytes, data[:HEAD_BYTES]))
    return fingerprint, content, header.width, header.height, ",".join(header.traits), header.fault


def header_of(width: int, height: int, traits: str, fault: str | None) -> Header:
    return Header(width, height, tuple(traits.split(",")) if traits else (), fault)


def record(path: Path, learned: Iterable[tuple[str, str, str, Header]]) -> None:
    """Write down what images that were read whole turned out to be: name, fingerprint, digest of the bytes, header.

    A row that is of another file by now, since another run looks at other pictures under this dataset's id, is left as it is.
    """
    rows = [
        (content, header.width, header.height, ",".join(header.traits), header.fault, name, fingerprint)
        for name, fingerprint, content, header in learned
    ]
    with told_plainly(path), closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as base:
        base.executemany("UPDATE images SET content = ?, width = ?, height = ?, traits = ?, fault = ? WHERE name = ? AND fingerprint = ?", rows)
        base.commit()


@contextmanager
def open_index(path: Path) -> Iterator[Index]:
    """Open an index for a while; it is made anew if it is damaged or of another version.

    Raises:
        DatasetError: it cannot be written.
        MemoryLimitError: the disk is full.
    """
    with open_database(path, VERSION, SCHEMA) as base:
        forget_faults(base)
        yield Index(base)


def forget_faults(base: sqlite3.Connection) -> None:
    """Forget faults found by another Pillow, which may read what this one does not."""
    reader = base.execute("SELECT value FROM about WHERE key = 'reader'").fetchone()
    if reader != (PIL.__version__,):
        base.execute("DELETE FROM images WHERE fault IS NOT NULL")
        base.execute("INSERT OR REPLACE INTO about VALUES ('reader', ?)", (PIL.__version__,))
    base.commit()


def digest(data: bytes) -> str:
    """Identity of an image: its bytes, whatever its name."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
