"""Where a cache is kept: a folder, or a folder in a bucket. Nothing is opened here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from simpletuner.data.bucket import Bucket, BucketOptions
from simpletuner.data.bucket_shelf import BucketShelf
from simpletuner.data.shelf import Shelf


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A folder of this machine, or of a network share."""

    folder: Path

    @property
    def identity(self) -> str:
        """The same for two names of one place."""
        return os.path.realpath(self.folder)

    def shelf(self) -> Shelf:
        return Shelf(self.folder)

    def missing(self) -> str | None:
        """Say why the place cannot be used, as far as that can be told without writing; None if all is well."""
        return None

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """A folder in a bucket."""

    options: BucketOptions
    folder: str
    """Below `aws_data_prefix`."""
    root: Path
    """Folder of this machine for the workplaces of this bucket."""
    copies_bytes: int
    """Room for local copies, of all that lies in `root`."""

    @property
    def identity(self) -> str:
        return str(self)

    @property
    def workplace(self) -> Path:
        return self.root / self.folder

    def shelf(self) -> Shelf:
        return BucketShelf(Bucket(self.options, self.folder), self.workplace, self.root, self.copies_bytes)

    def missing(self) -> str | None:
        return Bucket(self.options, self.folder).missing(may_be_empty=True)

    def __str__(self) -> str:
        return Bucket(self.options, self.folder).where().replace("/ at ", " at ").rstrip("/")


CachePlace: TypeAlias = "LocalPlace | BucketPlace"
Where: TypeAlias = "Path | LocalPlace | BucketPlace"
"""A place, or a folder by its path alone."""


def as_place(where: Where) -> CachePlace:
    """A folder's path as a place."""
    return LocalPlace(where) if isinstance(where, Path) else where
