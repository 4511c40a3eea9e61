"""What is done with caches besides training: look into them, check them, clear them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from simpletuner.data.bucket_shelf import MARK
from simpletuner.data.cache_place import CachePlace, Where, as_place
from simpletuner.data.catalogue import indexed, living, placed
from simpletuner.data.records import DamagedEntry, Record, head_of, repack, text_of
from simpletuner.data.shard_writer import HEADER_BYTES, SHARD_BYTES
from simpletuner.data.shards import INDEX, Place, Rows, contents, grown, stem_of
from simpletuner.data.shelf import DEAD, OPEN, SEALED, Item, Shelf
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError

LISTINGS = 5
"""Times that a folder is listed anew while others work in it."""
LITTLE_LIVES = 0.5
"""A shard of which a smaller share is still used is rewritten."""
SMALL_SHARD, SMALL_COUNT = SHARD_BYTES // 4, 128
"""Sealed shards with fewer bytes and fewer entries are put together, if there are several."""
BATCH_BYTES = 1 << 24
"""Read at once, and copied at once."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer ones."""
INDEX_FAULT = "its index is damaged; its entries were looked up one by one"
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Inventory:
    """All that a cache holds, by the indexes of its shards."""

    shards: Mapping[str, Item]
    """In order of time."""
    faults: Mapping[str, str]
    """Shards whose index is damaged, and what is wrong; `lost_entries` counts what that costs."""
    groups: Sequence[Mapping[str, str]]
    """What entries have in common, each different one once."""
    rows: Rows
    """Shard by shard; `group` is a number in `groups`."""
    shard: NDArray[numpy.uint32]
    """Number of the shard of each row."""
    is_current: NDArray[numpy.bool_]
    """Whether a row is the newest with its key."""

    def places(self, mask: NDArray[numpy.bool_]) -> Iterator[tuple[bytes, Place]]:
        """Keys and places of some rows, in the order in which they lie."""
        bounds = numpy.searchsorted(self.shard, range(len(self.shards) + 1))
        for name, start, end in zip(self.shards, bounds, bounds[1:]):
            rows = self.rows[start:end][mask[start:end]]
            yield from placed(rows[numpy.argsort(rows["offset"])], name)


@dataclass(frozen=True, slots=True)
class Held:
    """Entries of one cache that were made alike: a row of `cache ls`."""

    place: CachePlace
    about: Mapping[str, str]
    entries: int
    bytes: int
    """Of these entries alone."""
    used: float | None
    """When one of their shards was last read, in seconds since 1970; None where nobody notes that."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """An entry that is not what was written, and of which there is no whole copy."""

    key: str
    place: Place
    about: Mapping[str, str]
    """What it says of itself, if that can still be read."""
    problem: str


@dataclass(frozen=True, slots=True)
class Unused:
    """Entries that are to go."""

    places: Sequence[Place]
    bytes: int
    kept: int
    """Entries that stay."""
    is_foreign: bool = False
    """None of the entries is one that is used, which is more likely a mistake than a wish to drop them all."""


def cache_folders(roots: Iterable[Path]) -> list[Path]:
    """Every folder with shards at or below these, but for the workplaces of buckets."""
    found = set()
    for root in roots:
        for folder, below, files in os.walk(root):
            if MARK in files:
                below.clear()
            elif any(is_shard(name) for name in files):
                found.add(Path(folder))
    return sorted(found)


def is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith((OPEN, SEALED))


def take_stock(where: Where) -> Inventory:
    """Read the indexes of a cache, again if a run seals or replaces a shard meanwhile."""
    place = as_place(where)
    for _ in range(LISTINGS):
        try:
            return _take_stock(place.shelf())
        except FileNotFoundError:
            continue
    raise DatasetError(f"the cache {place} changes faster than it can be read", hint="Try again when the runs that fill it are done.")


def _take_stock(shelf: Shelf) -> Inventory:
    listing = shelf.list()
    shards = {name: listing[name] for name in sorted(listing) if is_shard(name)}
    faults: dict[str, str] = {}
    groups: dict[tuple[tuple[str, str], ...], int] = {}
    parts, owners = [numpy.empty(0, INDEX)], [numpy.empty(0, numpy.uint32)]
    for number, (name, item) in enumerate(shards.items()):
        found = indexed(shelf, name, item.size) if name.endswith(SEALED) else grown(shelf, name, 8, item.size)
        if not found.is_whole:
            faults[name] = INDEX_FAULT
        rows = living(shelf, name, found.rows) if stem_of(name) + DEAD in listing else found.rows.copy()
        shares = [groups.setdefault(tuple(sorted(group.items())), len(groups)) for group in found.groups]
        if shares:
            rows["group"] = numpy.array(shares, "<u4")[rows["group"]]
        parts.append(rows)
        owners.append(numpy.full(len(rows), number, numpy.uint32))
    rows, shard = numpy.concatenate(parts), numpy.concatenate(owners)
    return Inventory(shards, faults, [dict(group) for group in groups], rows, shard, newest(rows, shard))


def newest(rows: Rows, shard: NDArray[numpy.uint32]) -> NDArray[numpy.bool_]:
    """Mark the last of the rows with one key, by shard and place in it."""
    order = numpy.lexsort((rows["offset"], shard, rows["low"], rows["high"]))
    is_last = numpy.ones(len(rows), bool)
    if len(rows) > 1:
        this, following = rows[order[:-1]], rows[order[1:]]
        is_last[order[:-1]] = (this["high"] != following["high"]) | (this["low"] != following["low"])
    return is_last


def survey(where: Where) -> list[Held]:
    """Say what a cache holds, by what entries have in common."""
    place = as_place(where)
    notes_use = place.shelf().notes_use
    stock = take_stock(place)
    used = numpy.array([item.modified for item in stock.shards.values()])
    found = []
    for number, group in enumerate(stock.groups):
        mask = stock.is_current & (stock.rows["group"] == number)
        if mask.any():
            size = int(stock.rows["length"][mask].sum(dtype=numpy.uint64))
            found.append(Held(place, group, int(mask.sum()), size, float(used[stock.shard[mask]].max()) if notes_use else None))
    return found


def check(where: Where, stock: Inventory, advance: Advance) -> tuple[list[Damaged], dict[str, str]]:
    """Read every entry of a cache, from the bucket if it is in one; this machine's copies that are damaged are deleted.

    Args:
        stock: what `take_stock` says of it.
        advance: told of each entry.

    Returns:
        The damaged entries, and what is wrong with shards; see `lost_entries` for what that costs.
    """
    shelf = as_place(where).shelf()
    original = shelf.original()
    damaged: list[Damaged] = []
    whole: set[bytes] = set()
    for key, place, data in read_all(original, stock.places(numpy.ones(len(stock.rows), bool))):
        advance(1)
        if problem := _problem(key, data):
            damaged.append(Damaged(key.hex(), place, {} if isinstance(data, OSError) else _said(data), problem))
        else:
            whole.add(key)
    faults = dict(stock.faults)
    for name, item in stock.shards.items():
        if name.endswith(SEALED) and (fault := index_fault(original, name, item.size) or header_fault(original, name, item.size)):
            faults.setdefault(name, fault)
    drop_bad_copies(shelf, stock)
    return [one for one in damaged if bytes.fromhex(one.key) not in whole], faults


def drop_bad_copies(shelf: Shelf, stock: Inventory) -> None:
    """Delete those copies on this machine that are not what was written; they are fetched again when they are wanted."""
    if shelf.copies is None:
        return
    held = shelf.copies.list()
    is_bad = {name: held[name].size != item.size or index_fault(shelf.copies, name, item.size) for name, item in stock.shards.items() if name in held}
    to_read = [number for number, name in enumerate(stock.shards) if not is_bad.get(name, True)]
    for key, place, data in read_all(shelf.copies, stock.places(numpy.isin(stock.shard, to_read))):
        is_bad[place.shard] = is_bad[place.shard] or _problem(key, data)
    for name in filter(is_bad.get, is_bad):
        shelf.drop_copy(name)


def read_all(shelf: Shelf, places: Iterable[tuple[bytes, Place]]) -> Iterator[tuple[bytes, Place, bytearray | OSError]]:
    """Read entries in the order in which they lie, neighbours together: in a bucket each reading is a request."""
    span: list[tuple[bytes, Place]] = []
    for key, place in places:
        if span and (span[0][1].shard != place.shard or place.offset + place.length - span[0][1].offset > BATCH_BYTES):
            yield from _read_span(shelf, span)
            span = []
        span.append((key, place))
    yield from _read_span(shelf, span)


def _read_span(shelf: Shelf, span: Sequence[tuple[bytes, Place]]) -> Iterator[tuple[bytes, Place, bytearray | OSError]]:
    if not span:
        return
    first, last = span[0][1], span[-1][1]
    try:
        data = shelf.read(first.shard, first.offset, last.offset + last.length - first.offset)
    except OSError as error:
        if len(span) == 1:
            yield (*span[0], error)
            return
        for one in span:  # what cannot be read may be one of them alone
            yield from _read_span(shelf, [one])
        return
    for key, place in span:
        start = place.offset - first.offset
        yield key, place, data[start : start + place.length]


def index_fault(shelf: Shelf, name: str, size: int) -> str | None:
    """Whether a sealed shard's index can be read."""
    try:
        return None if contents(shelf, name, size).is_whole else INDEX_FAULT
    except OSError as error:
        return f"its index cannot be read ({error.strerror})"


def header_fault(shelf: Shelf, name: str, size: int) -> str | None:
    """Whether other tools can open a sealed shard; we need not its header but its index."""
    try:
        length = int.from_bytes(shelf.read(name, 0, 8), "little")
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(shelf.read(name, 0, 8 + min(length, LONGEST_HEADER)))
            os.truncate(path, size)  # the header alone, in a file as long as the shard
            with safe_open(path, "pt"):
                return None
    except (SafetensorError, OSError) as error:
        return f"other tools cannot open it ({error})"


def find_unused(stock: Inventory, used: Collection[str] | None, before: float | None) -> Unused:
    """Pick the entries that are to go.

    Args:
        used: keys that stay; None if that is not asked.
        before: only of shards that were last used before this time, in seconds since 1970; None for all.
    """
    total = int(stock.is_current.sum())
    if used is None and before is None:
        return Unused((), 0, total)
    is_old = {name: before is None or item.modified < before for name, item in stock.shards.items()}
    keep = frozenset(map(bytes.fromhex, used or ()))
    places, found = [], 0
    for key, place in stock.places(stock.is_current):
        if key in keep:
            found += 1
        elif is_old[place.shard]:
            places.append(place)
    if used is not None and total and not found:
        return Unused((), 0, total, is_foreign=True)
    return Unused(places, sum(place.length for place in places), total - len(places))


def to_rewrite(stock: Inventory, leaving: Collection[Place] = ()) -> list[str]:
    """Name the shards that are worth rewriting once some entries are gone: little of them lives, they are small, or something is wrong with them."""
    gone = {(place.shard, place.offset) for place in leaving}
    lives = {name: [0, 0] for name in stock.shards if name.endswith(SEALED)}
    for _, place in stock.places(stock.is_current):
        if place.shard in lives and (place.shard, place.offset) not in gone:
            lives[place.shard][0] += place.length
            lives[place.shard][1] += 1
    poor = [name for name, (size, count) in lives.items() if not count or size < LITTLE_LIVES * (stock.shards[name].size - HEADER_BYTES)]
    small = [name for name, (size, count) in lives.items() if size < SMALL_SHARD and count < SMALL_COUNT]
    chosen = {*poor, *stock.faults, *(small if len(small) > 1 else ())}
    return [name for name in lives if name in chosen]


def rewrite(where: Where, stock: Inventory, names: Sequence[str], advance: Advance) -> int:
    """Copy what lives in some shards into new ones and delete them; give the bytes that were gained.

    Damaged entries are left behind, unless an older copy is whole, which then is kept. A shard is deleted once all of it is safe
    elsewhere, so that this can be killed at any moment; whoever reads meanwhile finds an entry in the one place or the other.

    Args:
        stock: taken after entries were removed.
        advance: told of each shard.
    """
    store, shelf = Store(where), as_place(where).shelf().original()  # a damaged copy must not pass for the shard, which is deleted
    before = sum(item.size for item in shelf.list().values())
    is_chosen = numpy.isin(stock.shard, [number for number, name in enumerate(stock.shards) if name in names])
    places: dict[str, list[tuple[bytes, Place]]] = {}
    for key, place in (*stock.places(stock.is_current & is_chosen), *spare_copies(shelf, stock, is_chosen)):
        places.setdefault(place.shard, []).append((key, place))
    waiting: list[str] = []
    for name in names:
        for batch in _batches(shelf, places.get(name, ())):
            store.write(batch)
        waiting.append(name)
        if not shelf.publishes_late:
            _delete(shelf, waiting)
        advance(1)
    store.close()
    _delete(shelf, waiting)
    return before - sum(item.size for item in shelf.list().values())


def spare_copies(shelf: Shelf, stock: Inventory, is_chosen: NDArray[numpy.bool_]) -> Iterator[tuple[bytes, Place]]:
    """Older copies, among those chosen, of entries whose newest copy is damaged."""
    older = list(stock.places(is_chosen & ~stock.is_current))
    keys = {key for key, _ in older}
    newest_places = sorted(
        ((key, place) for key, place in stock.places(stock.is_current) if key in keys), key=lambda one: (one[1].shard, one[1].offset)
    )
    whole = {key for key, _, data in read_all(shelf, newest_places) if _problem(key, data) is None}
    yield from ((key, place) for key, place in older if key not in whole)


def _delete(shelf: Shelf, names: list[str]) -> None:
    """Delete shards with their lists of removed entries, and forget their names."""
    while names:
        name = names.pop()
        shelf.delete(name)
        shelf.delete(stem_of(name) + DEAD)


def _batches(shelf: Shelf, places: Iterable[tuple[bytes, Place]]) -> Iterator[list[Record]]:
    """Whole entries, read some at a time."""
    batch: list[Record] = []
    size = 0
    for _, place, data in read_all(shelf, places):
        if isinstance(data, OSError):
            raise data
        try:
            batch.append(repack(data))
        except DamagedEntry:
            continue
        size += place.length
        if size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _problem(key: bytes, data: bytearray | OSError) -> str | None:
    """What is wrong with an entry as it was read, if anything is."""
    if isinstance(data, OSError):
        return f"it cannot be read ({data.strerror})"
    try:
        return None if repack(data).key == key else "another entry lies in its place"
    except DamagedEntry as error:
        return str(error)


def _said(data: bytearray) -> Mapping[str, str]:
    """What a damaged record says of itself, as far as it can be read."""
    head = head_of(data)
    try:
        return text_of(data, head).about if head else {}
    except (ValueError, KeyError, TypeError):
        return {}
