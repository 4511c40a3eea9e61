"""Images in a folder of this machine and in the folders below it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from simpletuner.data.backend import DataBackend, Entry, check_name, readable
from simpletuner.data.columns import TableOptions
from simpletuner.errors import DatasetError


class LocalOptions(TableOptions):
    """Keys of an image dataset in a folder."""

    instance_data_dir: str
    """The folder; relative to where the command runs."""


class LocalBackend(DataBackend):
    """A folder. Links are followed as long as they stay inside it."""

    options_type = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self._given = options.instance_data_dir
        self._root = Path(options.instance_data_dir).expanduser()

    @property
    def place(self) -> str:
        return self._given

    def missing(self) -> str | None:
        if not self._root.exists():
            return f"folder {self._given} does not exist"
        if not self._root.is_dir():
            return f"{self._given} is a file, not a folder"
        return None if os.access(self._root, os.R_OK | os.X_OK) else f"folder {self._given} may not be read by this user"

    def list(self) -> Iterator[Entry]:
        root = os.path.realpath(self._root)
        yield from sorted(walk(root, root, "", frozenset({root})), key=lambda entry: entry.name)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{self._given}/{name} cannot be read: {error.strerror}") from error

    def read_head(self, name: str, count: int) -> bytes:
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                return file.read(count)
        except OSError as error:
            raise DatasetError(f"{self._given}/{name} cannot be read: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def _path(self, name: str) -> Path:
        """Resolve a name, following links only inside the folder."""
        root = os.path.realpath(self._root)
        path = os.path.realpath(os.path.join(root, *check_name(name).parts))
        if not is_inside(path, root):
            raise DatasetError(
                f"{self._given}/{name} is a link out of the dataset's folder",
                hint="Copy the file, or point instance_data_dir at the folder it lies in.",
            )
        return Path(path)


def walk(root: str, folder: str, prefix: str, above: frozenset[str]) -> Iterator[Entry]:
    """List the files in and below a folder.

    Args:
        root: resolved path that no link may leave.
        folder: resolved path of what is listed.
        prefix: its name inside the root, with a slash behind it, or nothing.
        above: it and the folders that led here, so that a link to one of them is no endless way.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield Entry(prefix.rstrip("/") or ".", 0, 0, fault="unreadable")
        return
    for item in found:
        if item.name.startswith("."):
            continue
        name = readable(prefix + item.name)
        if name != prefix + item.name:
            yield Entry(name, 0, 0, fault="unreadable")
            continue
        target = os.path.realpath(item.path) if item.is_symlink() else item.path
        if not is_inside(target, root):
            yield Entry(name, 0, 0, fault="outside")
            continue
        try:
            facts = os.stat(target)
        except OSError:
            yield Entry(name, 0, 0, fault="outside" if item.is_symlink() else "unreadable")
            continue
        if stat.S_ISDIR(facts.st_mode):
            if target not in above:
                yield from walk(root, target, f"{name}/", above | {target})
        elif stat.S_ISREG(facts.st_mode):
            yield Entry(name, facts.st_size, facts.st_mtime_ns)


def is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
