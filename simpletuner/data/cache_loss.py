"""Entries that a damaged shard held and that nothing leads to any more: how many they are, as far as what is left of it tells.

If a finished shard's index is damaged, its entries are looked up one by one, and one whose own head is gone too is not found.
That it was there is still said by the safetensors header at the shard's beginning, and its number by the last bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy

from simpletuner.data.cache_place import Where, as_place
from simpletuner.data.cache_tools import LONGEST_HEADER, Inventory
from simpletuner.data.shards import INDEX, TRAILER, TRAILER_MARK, dead_in, stem_of
from simpletuner.data.shelf import Shelf

HEAD_NAME = "/~"
"""Behind an entry's key, in the header: the bytes before its tensors."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry as the safetensors header has it."""

    start: int
    """Its record begins here, or a few bytes later."""
    end: int
    """Its tensors begin here."""


def lost_entries(where: Where, stock: Inventory) -> dict[str, int | None]:
    """Count what was lost with shards whose index is damaged. An entry that is in another shard too, or was removed, is not lost.

    Args:
        stock: what `take_stock` says of the cache.

    Returns:
        How many, by shard, None where that cannot be known; shards that lost none are left out.
    """
    if not stock.faults:
        return {}
    shelf = as_place(where).shelf().original()
    found = {key for key, _ in stock.places(numpy.ones(len(stock.rows), bool))}
    lost: dict[str, int | None] = {}
    for number, name in enumerate(stock.shards):
        if name in stock.faults:
            here = {key for key, _ in stock.places(stock.shard == number)}
            count = _lost(shelf, name, stock.shards[name].size, found, here)
            if count != 0:
                lost[name] = count
    return lost


def _lost(shelf: Shelf, name: str, size: int, found: set[bytes], here: set[bytes]) -> int | None:
    """How many entries of a shard are not found.

    Args:
        found: keys of all entries of the cache.
        here: those found in this shard.
    """
    removed = dead_in(shelf, stem_of(name))
    if (listed := _by_header(shelf, name)) is not None:
        living = {key for key, one in listed.items() if not any(one.start <= offset < one.end for offset in removed)}
        # The header has no checksum: of a key that is misspelled in it the entry may well be there.
        return min(len(living - found), max(0, len(living) - len(here)))
    count = _by_trailer(shelf, name, size)
    return None if count is None else max(0, count - len(removed) - len(here))


def _by_header(shelf: Shelf, name: str) -> dict[bytes, Listed] | None:
    """The entries that the safetensors header lists; None if it cannot be read. The file may end within its padding."""
    try:
        length = int.from_bytes(shelf.read(name, 0, 8), "little")
        header, _ = json.JSONDecoder().raw_decode(shelf.read(name, 8, min(length, LONGEST_HEADER)).decode())
        listed = {}
        for entry, fact in header.items():
            if entry.endswith(HEAD_NAME):
                start, end = fact["data_offsets"]
                listed[bytes.fromhex(entry[: -len(HEAD_NAME)])] = Listed(8 + length + start, 8 + length + end)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return listed or None


def _by_trailer(shelf: Shelf, name: str, size: int) -> int | None:
    """How many entries the last bytes speak of; None if they are gone."""
    try:
        data = shelf.read(name, max(0, size - TRAILER.size), TRAILER.size)
    except OSError:
        return None
    if len(data) < TRAILER.size:
        return None
    mark, count, groups_bytes, _ = TRAILER.unpack(data)
    is_sound = mark == TRAILER_MARK and count * INDEX.itemsize + groups_bytes + TRAILER.size <= size
    return int(count) if is_sound else None
