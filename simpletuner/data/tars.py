"""What a tar shard holds: names, places and sizes of its files, read from its headers alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from simpletuner.data.backend import check_name, is_hidden
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a shard."""

    offset: int
    """Of its first byte in the shard."""
    size_bytes: int
    fault: str | None = None
    """Name of the rule by which it must not be read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file as it was when its headers were read."""

    path: Path
    size_bytes: int
    modified_ns: int
    members: dict[str, Member]
    is_whole: bool
    """False if its headers end in something that is no header and no end of a tar file."""

    def read(self, member: Member, count: int) -> bytes:
        """Give the first `count` bytes of a file, or all of it. From any thread: each call opens the shard for itself.

        Raises:
            DatasetError: the shard was changed since, or cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                facts = os.fstat(file.fileno())
                if (facts.st_size, facts.st_mtime_ns) != (self.size_bytes, self.modified_ns):
                    raise DatasetError(f"{self.path.name} was changed since the run began", hint="Start the same command again.")
                file.seek(member.offset)
                return read_fully(file, min(count, member.size_bytes))
        except OSError as error:
            raise DatasetError(f"{self.path.name} cannot be read: {error.strerror}") from error


def read_fully(file: RawIOBase, count: int) -> bytes:
    """Read exactly `count` bytes, which an unbuffered file may give in pieces."""
    pieces = []
    while count > 0 and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def index_shard(path: Path) -> Shard:
    """Read the headers of a tar file, skipping over what they belong to.

    Raises:
        DatasetError: it cannot be opened.
    """
    try:
        facts = path.stat()
        with path.open("rb") as file:
            found: dict[str, Member] = {}
            is_whole = True
            try:
                for name, member in headers(file, facts.st_size):
                    found[name] = member  # of two files of one name the last one counts, as in unpacking
            except (tarfile.TarError, EOFError, ValueError, MemoryError, OverflowError):  # a header may claim any size
                is_whole = False
    except OSError as error:
        raise DatasetError(f"{path.name} cannot be read: {error.strerror}") from error
    return Shard(path, facts.st_size, facts.st_mtime_ns, found, is_whole)


def headers(file: BinaryIO, size_bytes: int) -> Iterator[tuple[str, Member]]:
    """Give name and member of each file; links and devices too, as faults.

    Raises:
        tarfile.TarError: a header is damaged, or the end is missing.
    """
    with tarfile.open(fileobj=file, mode="r:", errorlevel=1) as tar:
        while (item := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep each one for ever
            if item.isdir():
                continue
            fault = fault_of(item, size_bytes)
            if fault is None and is_hidden(PurePosixPath(item.name).as_posix()):
                continue
            yield (item.name if fault == "outside" else PurePosixPath(item.name).as_posix()), Member(item.offset_data, item.size, fault)
        # Behind the first header tarfile takes damage, or nothing at all, for the end, which is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end")


def fault_of(item: tarfile.TarInfo, size_bytes: int) -> str | None:
    """Why a file of a shard must not be read, if so."""
    try:
        check_name(item.name)
    except DatasetError:
        return "outside"
    if not item.isreg():
        return "outside"
    if item.issparse():
        return "unsupported"
    if item.size >= LIMIT_BYTES:
        return "too many bytes"
    return "truncated" if item.size < 0 or item.offset_data + item.size > size_bytes else None
