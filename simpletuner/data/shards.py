"""Files of many records: what they are called, and how one is found to hold what.

    shard-<time>-<process>-<random>.open          one that grows: room for a header, then records as they come
    shard-<time>-<process>-<random>.safetensors   a sealed one: the same bytes, the header filled in, an index at the end
    shard-<time>-<process>-<random>.dead          where in that shard the entries begin that were removed

A sealed shard is a plain safetensors file. Entry K with a tensor `mean` is there as `K/mean`; `K/~` are the bytes before it
(the record's head), and `~index` those at the end. Our own reading uses neither the header nor its JSON: the index is 32
bytes an entry and is read in one piece. If it is damaged, or was never written, the records themselves are looked up.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from simpletuner.data.records import ALIGNMENT, HEAD, MARK, Text, head_of, text_of
from simpletuner.data.shelf import DEAD, Shelf

INDEX = numpy.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("group", "<u4")])
"""One entry: its key in two halves, its record's first byte and length, and the number of its group."""
TRAILER = struct.Struct("<8sQQ16s")
"""The last bytes of a sealed shard: mark, entries, bytes of the groups' JSON, BLAKE2b of both. Entries, then groups, lie before it."""
TRAILER_MARK = b"\x93index\r\n"
TAIL_BYTES = 1 << 15
"""Read at once from a sealed shard's end; nearly always the whole index."""
LOOK_BYTES = 1 << 12
"""Read at once where a record is expected; nearly always its head and text."""
SEARCH_BYTES = 1 << 20
DEAD_BYTES = 1 << 24
"""More than such a list ever has."""
SHARED = ("kind", "vae", "encoders")
"""What many entries have in common of the facts they come with. Entries alike in these are a group."""
Rows = NDArray[numpy.void]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies."""

    shard: str
    """Name of the object."""
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a shard holds."""

    rows: Rows
    """Of dtype INDEX, removed entries left out."""
    groups: Sequence[dict[str, str]]
    end: int
    """Where the last whole record ends."""
    is_whole: bool = True
    """False if a sealed shard's index was damaged and its records had to be looked up."""


def contents(shelf: Shelf, name: str, size: int) -> Contents:
    """Say what a sealed shard holds, by its index, or by its records if that is damaged.

    Raises:
        FileNotFoundError: the shard is gone.
    """
    tail = shelf.read(name, max(0, size - TAIL_BYTES), min(size, TAIL_BYTES))
    if len(tail) >= TRAILER.size:
        mark, count, groups_bytes, checksum = TRAILER.unpack(tail[-TRAILER.size :])
        length = count * INDEX.itemsize + groups_bytes
        if mark == TRAILER_MARK and length + TRAILER.size <= size:
            whole = tail if length + TRAILER.size <= len(tail) else shelf.read(name, size - TRAILER.size - length, length + TRAILER.size)
            body = bytes(whole[-TRAILER.size - length : -TRAILER.size])
            if hashlib.blake2b(body, digest_size=16).digest() == checksum:
                rows = numpy.frombuffer(body, INDEX, count)
                return Contents(rows, json.loads(body[count * INDEX.itemsize :]), size - TRAILER.size - length)
    return grown(shelf, name, 8, size, is_whole=False)


def grown(shelf: Shelf, name: str, start: int, size: int, *, is_whole: bool = True) -> Contents:
    """Say what a shard holds from `start` on, by its records."""
    groups: dict[str, int] = {}
    rows, end = [], start
    for place, key, text in look_up(shelf, name, start, size):
        group = groups.setdefault(json.dumps(shared(text)), len(groups))
        rows.append((*halves(key), place.offset, place.length, group))
        end = place.offset + place.length
    return Contents(numpy.array(rows, INDEX), [json.loads(group) for group in groups], end, is_whole)


def look_up(shelf: Shelf, name: str, start: int, size: int) -> Iterator[tuple[Place, bytes, Text]]:
    """Find records by their heads, one after the other; behind a damaged one the next is searched for. Tensors are not read."""
    at = start + -start % ALIGNMENT
    while at + HEAD.size <= size:
        data = shelf.read(name, at, LOOK_BYTES)
        head = head_of(data)
        if head is None:
            at = _next_mark(shelf, name, at + 1, size)
            continue
        if at + head.length > size:
            return  # it is being written, or its writer was killed
        if head.body > len(data):
            data = shelf.read(name, at, head.body)
        try:
            yield Place(name, at, head.length), head.key, text_of(data, head)
        except (ValueError, KeyError, TypeError):
            # The head is whole and the text is not: the entry is there, and whoever reads it will find it damaged.
            yield Place(name, at, head.length), head.key, Text((), {})
        at += head.length + -head.length % ALIGNMENT


def dead_in(shelf: Shelf, stem: str) -> set[int]:
    """Where in a shard the entries begin that were removed."""
    try:
        data = shelf.read(stem + DEAD, 0, DEAD_BYTES)
    except FileNotFoundError:
        return set()
    body = bytes(data[16:])
    if hashlib.blake2b(body, digest_size=16).digest() != data[:16]:
        return set()  # what was removed is there again, and harms nobody
    return set(numpy.frombuffer(body, "<u8").tolist())


def add_dead(shelf: Shelf, stem: str, offsets: set[int]) -> None:
    """Remove entries of a shard. Two that do so at once may undo each other's work, which harms nobody."""
    body = numpy.array(sorted(dead_in(shelf, stem) | offsets), "<u8").tobytes()
    shelf.write(stem + DEAD, hashlib.blake2b(body, digest_size=16).digest() + body)


def halves(key: bytes) -> tuple[int, int]:
    """A key as the index has it."""
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def stem_of(name: str) -> str:
    return name.rsplit(".", 1)[0]


def shared(text: Text) -> dict[str, str]:
    """The facts that an entry has in common with others of its group."""
    return {name: text.about[name] for name in SHARED if name in text.about}


def _next_mark(shelf: Shelf, name: str, start: int, size: int) -> int:
    """Where the next record may begin; `size` if there is none."""
    while start < size:
        data = shelf.read(name, start, SEARCH_BYTES + len(MARK))
        found = data.find(MARK)
        if found >= 0:
            return start + found
        if len(data) < SEARCH_BYTES:
            return size
        start += SEARCH_BYTES
    return size
