"""How a shard grows, is sealed, and is taken over from a writer that was killed.

A shard has one writer. Sealing is writing the index behind the records, then the header before them, then giving the final
name; a writer that is killed anywhere in between leaves a growing shard, of which every whole record counts. Whoever finds
one that nobody has written to for an hour renames it, which only one can do, and seals it. A writer that lived on
sees that its shard is gone and writes the batch in hand again, into another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence

import numpy

from simpletuner.data.records import ALIGNMENT, DamagedEntry, Piece, Record, layout, repack
from simpletuner.data.shards import INDEX, TRAILER, TRAILER_MARK, Place, dead_in, halves, look_up, shared, stem_of
from simpletuner.data.shelf import DEAD, OPEN, SEALED, Shelf, sync_folder

SHARD_BYTES = 1 << 28
"""A shard that has grown this large is sealed."""
HEADER_BYTES = 1 << 18
"""Kept free for the safetensors header. It is enough for about 700 entries of two tensors, a shard's worth of small latents."""
HEADER_RESERVE = 1 << 11
"""Of the header, for all but the entries."""
SMALL_BYTES = 1 << 12
"""Pieces below this are written together."""


class ShardWriter:
    """A shard that grows. Not safe to use from several threads at once."""

    def __init__(self, shelf: Shelf, first: Record) -> None:
        """
        Args:
            shelf: where it grows.
            first: the record that will be written first, for which there must be room whatever its size.

        Raises:
            OSError: it cannot be made; nothing is left of it.
        """
        self.path = shelf.workplace / (new_stem() + OPEN)
        self._process = os.getpid()
        header_bytes = max(HEADER_BYTES, _header_share(first) + HEADER_RESERVE)
        self._start = 8 + header_bytes + -header_bytes % ALIGNMENT
        self._placed: list[tuple[int, Record]] = []
        self._header_used = HEADER_RESERVE
        self._file = io.FileIO(self.path, "x+")
        try:
            shelf.claim(self._file)
            # Written and not skipped, so that sealing needs little room on a disk that has become full.
            _write(self._file, [(self._start - 8).to_bytes(8, "little"), b"{}", b" " * (self._start - 10)])
            sync_folder(shelf.workplace)
        except BaseException:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise
        self.end = self._start

    def fitting(self, records: Sequence[Record]) -> int:
        """How many of these, from the first on, there is room for. A process that was forked from the writer's has none here."""
        if os.getpid() != self._process:
            return 0
        header, end = self._header_used, self.end
        for count, record in enumerate(records):
            header += _header_share(record)
            end += ALIGNMENT + record.length
            is_first = count == 0 and not self._placed
            if header > self._start - 8 or (end > SHARD_BYTES and not is_first):
                return count
        return len(records)

    def append(self, records: Sequence[Record]) -> list[Place]:
        """Write records; they are safe on disk when this returns.

        Raises:
            OSError: they are not; earlier ones are. The shard must then be closed.
        """
        places: list[Place] = []
        pieces: list[Piece] = []
        end = self.end
        for record in records:
            start = end + -end % ALIGNMENT
            pieces += [bytes(start - end), *record.pieces]
            places.append(Place(self.path.name, start, record.length))
            end = start + record.length
        try:
            self._file.seek(self.end)
            _write(self._file, pieces)
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self.end)
            raise
        self.end = end
        for place, record in zip(places, records):
            self._placed.append((place.offset, Record(record.key, record.text, (), record.length, record.body)))
            self._header_used += _header_share(record)
        return places

    def is_in_place(self) -> bool:
        """Whether the shard still has its name: nobody took it for a dead writer's, and nobody deleted the folder."""
        return self.path.exists()

    def close(self) -> None:
        """Let go of the shard as it is; its records count, and it is sealed later by whoever finds it."""
        self._file.close()

    def seal(self, shelf: Shelf) -> None:
        """Make a safetensors file of the shard and let go of it; one without records is deleted.

        Raises:
            OSError: it stays as it is, and its records count all the same. This may be called again.
        """
        if self._file.closed and os.getpid() == self._process and self.is_in_place():
            self._file = io.FileIO(self.path, "r+")
            shelf.claim(self._file)
        with self._file:
            if os.getpid() != self._process or not self.is_in_place():
                return
            if not self._placed:
                self.path.unlink()
                return
            seal(self._file, self._start, self._placed, self.end)
        shelf.publish(self.path, self.path.stem + SEALED)


def new_stem() -> str:
    """A name that no other shard has; names in order of the alphabet are in order of time."""
    return f"shard-{time.time_ns():016x}-{os.getpid():x}-{secrets.token_hex(4)}"


def seal(file: io.FileIO, start: int, placed: Sequence[tuple[int, Record]], end: int) -> None:
    """Write the index behind a shard's records and then the header before them.

    Args:
        start: where the header's room ends.
        placed: each record and its first byte, in order; of those with one key the last counts.
        end: where the last record ends.
    """
    last = {record.key: offset for offset, record in placed}
    kept = [(offset, record) for offset, record in placed if last[record.key] == offset]
    index_start = end + -end % ALIGNMENT
    index = bytes(index_start - end) + _index(kept)
    header: dict[str, object] = {"__metadata__": {"format": "pt", "made_by": "simpletuner cache, version 1"}}
    at = start
    for offset, record in kept:
        name = record.key.hex()
        header[f"{name}/~"] = _entry("U8", [offset + record.body - at], at - start, offset + record.body - start)
        for tensor, dtype, shape, first, at in layout(record.text, offset + record.body):
            header[f"{name}/{tensor}"] = _entry(dtype, shape, first - start, at - start)
    header["~index"] = _entry("U8", [end + len(index) - at], at - start, end + len(index) - start)
    written = json.dumps(header, separators=(",", ":")).encode()
    assert len(written) <= start - 8, "more entries were let in than the header has room for"
    file.truncate(end)
    file.seek(end)
    _write(file, [index])
    file.seek(0)
    _write(file, [(start - 8).to_bytes(8, "little"), written.ljust(start - 8)])
    os.fsync(file.fileno())


def adopt(shelf: Shelf, name: str) -> bool:
    """Seal a growing shard whose writer is gone; False if another was first.

    Raises:
        OSError: it cannot be sealed; its records still count.
    """
    path = shelf.workplace / (new_stem() + OPEN)
    try:
        os.rename(shelf.workplace / name, path)
        os.utime(path)  # or the next who looks would take it away again
    except FileNotFoundError:
        return False
    with io.FileIO(path, "r+") as file:
        shelf.claim(file)
        removed = dead_in(shelf, stem_of(name))
        placed = [(place.offset, record) for place, record in whole_records(shelf, path.name) if place.offset not in removed]
        if placed:
            seal(file, _header_end(file, placed[0][0]), placed, placed[-1][0] + placed[-1][1].length)
    shelf.delete(stem_of(name) + DEAD)
    if placed:
        shelf.publish(path, path.stem + SEALED)
    else:
        path.unlink(missing_ok=True)
    return True


def whole_records(shelf: Shelf, name: str) -> Iterator[tuple[Place, Record]]:
    """Read a shard from its beginning and give every record that is whole, without its bytes."""
    size = (shelf.workplace / name).stat().st_size
    for place, _, _ in look_up(shelf, name, 8, size):
        try:
            record = repack(shelf.read(name, place.offset, place.length))
        except DamagedEntry:
            continue
        yield place, Record(record.key, record.text, (), record.length, record.body)


def _index(placed: Sequence[tuple[int, Record]]) -> bytes:
    groups: dict[str, int] = {}
    rows = [
        (*halves(record.key), offset, record.length, groups.setdefault(json.dumps(shared(record.text)), len(groups))) for offset, record in placed
    ]
    written = json.dumps([json.loads(group) for group in groups]).encode()
    body = numpy.array(rows, INDEX).tobytes() + written
    return body + TRAILER.pack(TRAILER_MARK, len(rows), len(written), hashlib.blake2b(body, digest_size=16).digest())


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _header_share(record: Record) -> int:
    """Bytes that a record takes in the header, at most; offsets in a shard have ten digits or fewer."""
    tensors = [("~", "U8", [10**9]), *record.text.tensors]
    return sum(100 + len(json.dumps(name)) + len(dtype) + len(str(shape)) for name, dtype, shape in tensors)


def _header_end(file: io.FileIO, first: int) -> int:
    """Where the room for a header ends: as the file says, if it can be so, or else where its first whole record begins."""
    said = 8 + int.from_bytes(file.read(8), "little")
    return said if said <= first and said % ALIGNMENT == 0 and said >= HEADER_BYTES else first


def _write(file: io.FileIO, pieces: Sequence[Piece]) -> None:
    """Write all of it: small pieces together, large ones without a copy."""
    small: list[Piece] = []
    for piece in (*pieces, None):
        if piece is not None and len(piece) < SMALL_BYTES:
            small.append(piece)
            continue
        for part in (b"".join(small), piece or b""):
            view = memoryview(part)
            while view.nbytes:
                view = view[file.write(view) :]
        small = []
