"""One cache entry as bytes: a head that says what it is, then its tensors, verified as a whole.

    bytes   0  8   a mark that begins every record
            8  8   length of the tensors
           16  4   length of the text
           20  4   zero
           24 16   the key
           40 16   BLAKE2b of key, text and tensors
           56  8   BLAKE2b of the 56 bytes before
           64      the text: JSON, padded with spaces to a multiple of 8
                   the tensors, those of the largest items first, so that each lies aligned with no gap

Numbers are little-endian. A record says nothing of where it lies: copied to another place it is the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

MARK = b"\x93entry\r\n"
"""Not text, and broken by whatever changes line ends."""
HEAD = struct.Struct("<8sQII16s16s8s")
ALIGNMENT = 8
LONGEST = 2**32 - 1
"""Bytes of a record, at most: an index has four bytes for its length."""
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors has for them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Piece: TypeAlias = "bytes | bytearray | memoryview"


class DamagedEntry(Exception):
    """An entry is there but is not what was written. Whoever reads makes it again and says so; no user ever sees this."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a record's first bytes say, if they are whole."""

    key: bytes
    text_bytes: int
    body_bytes: int
    checksum: bytes

    @property
    def length(self) -> int:
        """Of the whole record."""
        return HEAD.size + self.text_bytes + self.body_bytes

    @property
    def body(self) -> int:
        """Where the tensors begin, from the record's first byte."""
        return HEAD.size + self.text_bytes


@dataclass(frozen=True, slots=True)
class Text:
    """What a record says of itself."""

    tensors: Sequence[tuple[str, str, Sequence[int]]]
    """Name, dtype as safetensors writes it, and shape, in the order in which they lie."""
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One entry, ready to be written."""

    key: bytes
    text: Text
    pieces: Sequence[Piece]
    """Its bytes, in order."""
    length: int
    body: int
    """Where the tensors begin."""


def pack(key: bytes, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Record:
    """Make a record of tensors of any device and layout; a view becomes what it shows, without the rest of its storage."""
    own = [(name, tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()]
    own.sort(key=lambda item: -item[1].element_size())
    text = Text([(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in own], dict(about))
    written = json.dumps({"tensors": text.tensors, "about": text.about}, separators=(",", ":")).encode()
    written += b" " * (-len(written) % ALIGNMENT)
    bodies: list[Piece] = [tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in own]
    body_bytes = sum(len(body) for body in bodies)
    assert HEAD.size + len(written) + body_bytes <= LONGEST, "an entry of 4 GB"
    digest = hashlib.blake2b(key, digest_size=16)
    for piece in (written, *bodies):
        digest.update(piece)
    head = HEAD.pack(MARK, body_bytes, len(written), 0, key, digest.digest(), b"")[:-8]
    head += hashlib.blake2b(head, digest_size=8).digest()
    return Record(key, text, (head + written, *bodies), HEAD.size + len(written) + body_bytes, HEAD.size + len(written))


def repack(data: bytearray) -> Record:
    """Make a record of one that was read, to write it elsewhere.

    Raises:
        DamagedEntry: it is not what was written.
    """
    head, text = verified(data)
    return Record(head.key, text, (data,), head.length, head.body)


def head_of(data: Piece) -> Head | None:
    """Read the head that `data` begins with; None if there is no whole one."""
    if len(data) < HEAD.size:
        return None
    mark, body_bytes, text_bytes, _, key, checksum, own = HEAD.unpack(data[: HEAD.size])
    if mark != MARK or own != hashlib.blake2b(data[: HEAD.size - 8], digest_size=8).digest():
        return None
    return Head(key, text_bytes, body_bytes, checksum)


def text_of(data: Piece, head: Head) -> Text:
    """Read what a record says of itself; its checksum is not looked at.

    Raises:
        ValueError: it is no such text.
    """
    said = json.loads(bytes(data[HEAD.size : head.body]))
    return Text([(str(name), str(dtype), tuple(shape)) for name, dtype, shape in said["tensors"]], dict(said["about"]))


def verified(data: bytearray) -> tuple[Head, Text]:
    """Check all bytes of a record.

    Raises:
        DamagedEntry: they are not those that were written.
    """
    head = head_of(data)
    if head is None:
        raise DamagedEntry("its head is damaged")
    if len(data) != head.length:
        raise DamagedEntry(f"{head.length - len(data)} of its bytes are missing")
    digest = hashlib.blake2b(head.key, digest_size=16)
    digest.update(memoryview(data)[HEAD.size :])
    if digest.digest() != head.checksum:
        raise DamagedEntry("its checksum does not match")
    return head, text_of(data, head)


def unpack(key: bytes, data: bytearray) -> dict[str, Tensor]:
    """Give the tensors of a record, which share its memory.

    Raises:
        DamagedEntry: it is not what was written, or is another entry's.
    """
    head, text = verified(data)
    if head.key != key:
        raise DamagedEntry("another entry lies in its place")
    return {name: _tensor(data, start, dtype, shape) for name, dtype, shape, start, _ in layout(text, head.body)}


def layout(text: Text, start: int) -> list[tuple[str, str, Sequence[int], int, int]]:
    """Name, dtype, shape, first byte and end of each tensor, if the first begins at `start`."""
    found = []
    for name, dtype, shape in text.tensors:
        end = start + math.prod(shape) * DTYPES[dtype].itemsize
        found.append((name, dtype, shape, start, end))
        start = end
    return found


def _tensor(data: bytearray, start: int, dtype: str, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=start).reshape(tuple(shape))
