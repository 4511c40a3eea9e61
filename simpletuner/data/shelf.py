"""The few things a cache does with bytes: list, read a range, write an object whole, delete.

A folder of this machine or of a network share is one kind of shelf; a bucket (`bucket_shelf.py`) is another, which has its shards
grow in a folder of this machine and uploads them when they are published.
"""

from __future__ import annotations

import io
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

OPEN, SEALED, DEAD = ".open", ".safetensors", ".dead"
"""Suffixes of a shard that grows, of a finished one, and of the list of what was removed from it; see `shards.py`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a shelf."""

    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970."""


class Shelf:
    """Named objects in one folder. Objects of a final name never change; they appear whole, and go."""

    publishes_late: ClassVar[bool] = False
    """Whether other machines see an entry only when its shard is published and `finish` has returned."""
    notes_use: ClassVar[bool] = True
    """Whether `Item.modified` says when an object was last read, and not only when it was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> dict[str, Item]:
        """Every file by name; nothing if there is no such folder.

        Raises:
            OSError: it cannot be listed.
        """
        found: dict[str, Item] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            status = entry.stat()
                            found[entry.name] = Item(status.st_size, status.st_mtime)
                    except FileNotFoundError:  # gone since it was listed
                        continue
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def read(self, name: str, offset: int, length: int) -> bytearray:
        """Read a range; shorter than asked for where the object ends.

        No handle stays open: opening costs some 10 microseconds, and a shard that was merged into another can vanish at once.

        Raises:
            FileNotFoundError: there is no such object, or no longer.
        """
        with open(self.folder / name, "rb", buffering=0) as file:
            length = max(0, min(length, os.fstat(file.fileno()).st_size - offset))
            data = bytearray(length)
            file.seek(offset)
            view, done = memoryview(data), 0
            while done < length and (count := file.readinto(view[done:])):
                done += count
            view.release()
        del data[done:]
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write an object, or replace it; whoever lists sees the old one or the new one, never a part."""
        staged = self.folder / f"{name}.{secrets.token_hex(4)}.tmp"
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, self.folder / name)
        except BaseException:  # a signal too must not leave half an object lying about
            staged.unlink(missing_ok=True)
            raise

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def drop_copy(self, name: str) -> bool:
        """Delete what this machine keeps as a copy of an object that lies elsewhere, since it is damaged.

        Returns:
            Whether to read the object again, which may give other bytes.
        """
        return False

    @property
    def copies(self) -> Shelf | None:
        """Copies that this machine keeps of objects that lie elsewhere, under their names; None where there are none."""
        return None

    def original(self) -> Shelf:
        """The same objects as every machine sees them, without copies."""
        return self

    def touch(self, name: str) -> None:
        """Note that an object was used now, where that can be noted."""
        try:
            os.utime(self.folder / name)
        except OSError:  # a folder that one may only read
            return

    @property
    def workplace(self) -> Path:
        """The local folder in which shards grow."""
        return self.folder

    def prepare(self) -> None:
        """Make ready for a shard to grow.

        Raises:
            OSError: the workplace cannot be made.
        """
        self.workplace.mkdir(parents=True, exist_ok=True)

    def claim(self, growing: io.FileIO) -> None:
        """Note that a growing file has a living writer, where that can be noted."""

    def is_abandoned(self, name: str) -> bool:
        """Whether it is certain that nobody writes to a growing file any more."""
        return False

    def publish(self, growing: Path, name: str) -> None:
        """Give a file that was grown in the workplace its final name."""
        os.replace(growing, self.folder / name)
        sync_folder(self.folder)

    def resume(self) -> int:
        """Go on publishing what a killed run left half published, and count it."""
        return 0

    def finish(self) -> None:
        """Wait until all that was published is where it belongs.

        Raises:
            DatasetError: it is not; nothing is lost.
        """


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power failure, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
