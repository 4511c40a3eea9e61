"""What is done with cache folders besides training: look into them, check them, clear them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from simpletuner.data.catalogue import living, placed
from simpletuner.data.records import DamagedEntry, Record, head_of, repack, text_of
from simpletuner.data.shard_writer import HEADER_BYTES, SHARD_BYTES
from simpletuner.data.shards import DEAD, INDEX, OPEN, SEALED, Place, Rows, contents, grown, stem_of
from simpletuner.data.shelf import Item, Shelf
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError

LISTINGS = 5
"""Times that a folder is listed anew while others work in it."""
LITTLE_LIVES = 0.5
"""A shard of which a smaller share is still used is rewritten."""
SMALL_SHARD, SMALL_COUNT = SHARD_BYTES // 4, 128
"""Sealed shards with fewer bytes and fewer entries are put together, if there are several."""
BATCH_BYTES = 1 << 24
"""Copied at once."""
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Inventory:
    """All that a cache folder holds, by the indexes of its shards."""

    shards: Mapping[str, Item]
    """In order of time."""
    faults: Mapping[str, str]
    """Shards with something wrong that costs no entry, and what."""
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
    """Entries of one folder that were made alike: a row of `cache ls`."""

    folder: Path
    about: Mapping[str, str]
    entries: int
    bytes: int
    """Of these entries alone."""
    used: float
    """When one of their shards was last read, in seconds since 1970."""


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
    """Every folder with shards at or below these."""
    found = set()
    for root in roots:
        for folder, _, files in os.walk(root):
            if any(is_shard(name) for name in files):
                found.add(Path(folder))
    return sorted(found)


def is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith((OPEN, SEALED))


def take_stock(folder: Path) -> Inventory:
    """Read the indexes of a folder, again if a run seals or replaces a shard meanwhile."""
    for _ in range(LISTINGS):
        try:
            return _take_stock(Shelf(folder))
        except FileNotFoundError:
            continue
    raise DatasetError(f"the cache folder {folder} changes faster than it can be read", hint="Try again when the runs that fill it are done.")


def _take_stock(shelf: Shelf) -> Inventory:
    listing = shelf.list()
    shards = {name: listing[name] for name in sorted(listing) if is_shard(name)}
    faults: dict[str, str] = {}
    groups: dict[tuple[tuple[str, str], ...], int] = {}
    parts, owners = [numpy.empty(0, INDEX)], [numpy.empty(0, numpy.uint32)]
    for number, (name, item) in enumerate(shards.items()):
        found = contents(shelf, name, item.size) if name.endswith(SEALED) else grown(shelf, name, 8, item.size)
        if not found.is_whole:
            faults[name] = "its index is damaged; its entries were looked up one by one"
        rows = living(shelf, name, found.rows)
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


def survey(folder: Path) -> list[Held]:
    """Say what a folder holds, by what entries have in common."""
    stock = take_stock(folder)
    used = numpy.array([item.modified for item in stock.shards.values()])
    found = []
    for number, group in enumerate(stock.groups):
        mask = stock.is_current & (stock.rows["group"] == number)
        if mask.any():
            found.append(Held(folder, group, int(mask.sum()), int(stock.rows["length"][mask].sum(dtype=numpy.uint64)), used[stock.shard[mask]].max()))
    return found


def check(folder: Path, stock: Inventory, advance: Advance) -> tuple[list[Damaged], dict[str, str]]:
    """Read every entry of a folder.

    Args:
        stock: what `take_stock` says of it.
        advance: told of each entry.

    Returns:
        The damaged entries, and what is wrong with shards though it costs no entry.
    """
    shelf = Shelf(folder)
    damaged: list[Damaged] = []
    whole: set[bytes] = set()
    for key, place in stock.places(numpy.ones(len(stock.rows), bool)):
        advance(1)
        try:
            data = shelf.read(place.shard, place.offset, place.length)
            if repack(data).key != key:
                raise DamagedEntry("another entry lies in its place")
            whole.add(key)
        except DamagedEntry as error:
            damaged.append(Damaged(key.hex(), place, _said(data), str(error)))
        except OSError as error:
            damaged.append(Damaged(key.hex(), place, {}, f"it cannot be read ({error.strerror})"))
    faults = dict(stock.faults)
    for name in stock.shards:
        if name.endswith(SEALED) and (fault := header_fault(folder / name)):
            faults.setdefault(name, fault)
    return [one for one in damaged if bytes.fromhex(one.key) not in whole], faults


def header_fault(path: Path) -> str | None:
    """Whether other tools can open a sealed shard; we need not its header but its index."""
    try:
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


def rewrite(folder: Path, stock: Inventory, names: Sequence[str], advance: Advance) -> int:
    """Copy what lives in some shards into new ones and delete them; give the bytes that were gained.

    Damaged entries are left behind. A shard is deleted once all of it is safe elsewhere, so that this can be killed at any
    moment; whoever reads meanwhile finds an entry in the one place or the other.

    Args:
        stock: taken after entries were removed.
        advance: told of each shard.
    """
    store, shelf = Store(folder), Shelf(folder)
    before = sum(item.size for item in shelf.list().values())
    places: dict[str, list[Place]] = {}
    for _, place in stock.places(stock.is_current & numpy.isin(stock.shard, [number for number, name in enumerate(stock.shards) if name in names])):
        places.setdefault(place.shard, []).append(place)
    for name in names:
        for batch in _batches(shelf, places.get(name, ())):
            store.write(batch)
        shelf.delete(name)
        shelf.delete(stem_of(name) + DEAD)
        advance(1)
    store.close()
    return before - sum(item.size for item in shelf.list().values())


def _batches(shelf: Shelf, places: Iterable[Place]) -> Iterator[list[Record]]:
    """Whole entries, read some at a time."""
    batch: list[Record] = []
    size = 0
    for place in places:
        try:
            batch.append(repack(shelf.read(place.shard, place.offset, place.length)))
        except DamagedEntry:
            continue
        size += place.length
        if size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _said(data: bytearray) -> Mapping[str, str]:
    """What a damaged record says of itself, as far as it can be read."""
    head = head_of(data)
    try:
        return text_of(data, head).about if head else {}
    except (ValueError, KeyError, TypeError):
        return {}
