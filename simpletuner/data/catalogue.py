"""Where the entries of a folder lie, in memory: 40 bytes an entry, so that a million cost what ten latents do.

Entries of sealed shards stand in one sorted table; those of growing ones, which are few, in a dictionary a shard. Lookups
take no lock: they use the state of the moment, which is replaced and never changed under them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy
from numpy.typing import NDArray

from simpletuner.data.shards import INDEX, Contents, Place, Rows, contents, dead_in, grown, halves, stem_of
from simpletuner.data.shelf import DEAD, OPEN, SEALED, Item, Shelf

LOOKS = 5
"""Times a folder is listed again because a shard was sealed or merged while it was being looked at."""
READERS = 8
"""Indexes read at once, which helps where each costs a round trip."""
FEW = 8
"""Shards below this are read one after the other."""
KEY_BYTES = 16
Task = TypeVar("Task")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class Growing:
    """What is known of a shard that grows."""

    end: int = 0
    """It has been looked through up to here."""
    places: dict[bytes, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sealed:
    """All sealed shards together."""

    names: Sequence[str] = ()
    """In order of time."""
    rows: Rows = field(default_factory=lambda: numpy.empty(0, INDEX))
    """Sorted by the first half of the key; `group` is the number of the shard."""
    high: NDArray[numpy.uint64] = field(default_factory=lambda: numpy.empty(0, "<u8"))
    """That half by itself, which is searched."""
    dead: Mapping[str, Item] = field(default_factory=dict)
    """By stem, the state of its list of removed entries when that was read."""


class Catalogue:
    """Which records have a key. Safe to use from several threads."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._lock = threading.Lock()
        self._sealed = Sealed()
        self._growing: dict[str, Growing] = {}
        self._is_read = False

    def find(self, key: bytes) -> list[Place]:
        """Every place of a key that is known of, the newest first."""
        if not self._is_read:
            self.refresh()
        found = [growing.places[key] for _, growing in sorted(self._growing.items(), reverse=True) if key in growing.places]
        high, low = halves(key)
        sealed = self._sealed
        at = int(numpy.searchsorted(sealed.high, numpy.uint64(high)))
        places = []
        while at < len(sealed.high) and int(sealed.high[at]) == high:
            _, other, offset, length, shard = sealed.rows[at].item()
            if other == low:
                places.append(Place(sealed.names[shard], offset, length))
            at += 1
        return found + sorted(places, key=lambda place: (place.shard, place.offset), reverse=True)

    def keys(self) -> set[str]:
        """Every key, as 32 hex letters."""
        self.refresh()
        rows = self._sealed.rows
        pairs = numpy.stack([rows["high"], rows["low"]], axis=1) if len(rows) else numpy.empty((0, 2), "<u8")
        text = pairs.astype("<u8").tobytes().hex()
        width = 2 * KEY_BYTES
        found = {text[at : at + width] for at in range(0, len(text), width)}
        for growing in list(self._growing.values()):
            found.update(key.hex() for key in list(growing.places))
        return found

    def note(self, keys: Iterable[bytes], places: Sequence[Place], end: int) -> None:
        """Take up what this process has just written to one shard, up to `end`."""
        with self._lock:
            growing = self._growing.get(places[0].shard) or Growing()
            growing.places.update(zip(keys, places))
            growing.end = end
            self._growing = {**self._growing, places[0].shard: growing}

    def refresh(self) -> None:
        """Look what other processes have written, sealed, merged and removed since.

        Raises:
            OSError: the folder cannot be listed.
        """
        with self._lock:
            for _ in range(LOOKS):
                try:
                    self._take(self._shelf.list())
                    break
                except FileNotFoundError:  # sealed or merged since the folder was listed
                    continue
            self._is_read = True

    def _take(self, listing: Mapping[str, Item]) -> None:
        growing: dict[str, Growing] = {}
        for name in sorted(name for name in listing if name.startswith("shard-") and name.endswith(OPEN)):
            growing[name] = self._look_further(name, listing[name].size, stem_of(name) + DEAD in listing)
        sealed = self._sealed
        names = sorted(name for name in listing if name.startswith("shard-") and name.endswith(SEALED))
        dead = {stem_of(name): listing[mark] for name in names if (mark := stem_of(name) + DEAD) in listing}
        if names != sealed.names or dead != sealed.dead:
            self._sealed = self._merged(names, dead, listing)
        self._growing = growing

    def _look_further(self, name: str, size: int, has_dead: bool) -> Growing:
        """Look through what a growing shard has grown by."""
        known = self._growing.get(name, Growing())
        if known.end > size:  # its writer took back what it could not finish
            known = Growing()
        if known.end < size:
            more = grown(self._shelf, name, known.end or 8, size)
            places = {**known.places, **dict(placed(more.rows, name))}
            known = Growing(more.end, places)
        if has_dead:
            removed = dead_in(self._shelf, stem_of(name))
            known = Growing(known.end, {key: place for key, place in known.places.items() if place.offset not in removed})
        return known

    def _merged(self, names: Sequence[str], dead: Mapping[str, Item], listing: Mapping[str, Item]) -> Sealed:
        """Read the indexes of shards that are new or had entries removed, and keep what is known of the others."""
        before = self._sealed
        is_kept = [name in listing and dead.get(stem_of(name)) == before.dead.get(stem_of(name)) for name in before.names]
        kept = {name for name, stays in zip(before.names, is_kept) if stays}
        numbers = {name: number for number, name in enumerate(names)}
        old = before.rows
        if len(old):
            old = old[numpy.array(is_kept)[old["group"]]]
            old["group"] = numpy.array([numbers.get(name, 0) for name in before.names], "<u4")[old["group"]]

        def read(name: str) -> Rows:
            rows = indexed(self._shelf, name, listing[name].size).rows
            rows = living(self._shelf, name, rows) if stem_of(name) in dead else rows.copy()
            rows["group"] = numbers[name]
            return rows

        rows = numpy.concatenate([old, *at_once(read, [name for name in names if name not in kept])])
        rows = rows[numpy.argsort(rows["high"], kind="stable")]
        return Sealed(names, rows, numpy.ascontiguousarray(rows["high"]), dead)


def indexed(shelf: Shelf, name: str, size: int) -> Contents:
    """Say what a sealed shard holds; where it came from, if the index of this machine's copy is damaged.

    Raises:
        FileNotFoundError: the shard is gone.
    """
    found = contents(shelf, name, size)
    return contents(shelf, name, size) if not found.is_whole and shelf.drop_copy(name) else found


def living(shelf: Shelf, name: str, rows: Rows) -> Rows:
    """A copy of a shard's rows without the entries that were removed."""
    removed = dead_in(shelf, stem_of(name))
    return rows[~numpy.isin(rows["offset"], numpy.array(list(removed), "<u8"))] if removed else rows.copy()


def placed(rows: Rows, name: str) -> Iterable[tuple[bytes, Place]]:
    """Keys and places of rows, in their order."""
    for high, low, offset, length, _ in rows.tolist():
        yield high.to_bytes(8, "little") + low.to_bytes(8, "little"), Place(name, offset, length)


def at_once(work: Callable[[Task], Answer], items: Sequence[Task]) -> list[Answer]:
    """Do something for each of many, several at once if they are many."""
    if len(items) <= FEW:
        return [work(item) for item in items]
    with ThreadPoolExecutor(READERS, thread_name_prefix="cache-index") as pool:
        return list(pool.map(work, items))
