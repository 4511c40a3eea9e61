"""Images that a csv file lists, by address or by path, with their captions."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from simpletuner.data.backend import DataBackend, DatasetOptions, Entry, OpenBar, check_name, refused, without_secrets
from simpletuner.data.backends.local import is_inside
from simpletuner.data.columns import IMAGE_SUFFIXES, captions_in, read_rows, text_of
from simpletuner.data.download import Fetching, fetch_all
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import DatasetError

USUAL_SUFFIX = ".png"
"""Given to a file whose address names none; what it holds is told by its content anyway."""
NAME_LETTERS = 80
ADDRESSES_SHOWN = 3
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?=//)|data:")


class CsvOptions(DatasetOptions):
    """Keys of an image dataset that a csv file lists."""

    csv_file: str
    """The file, with the names of its columns in the first line."""
    csv_url_column: str = "url"
    """Column with the address (http, https) of an image, or its path from the folder of the csv file."""
    csv_caption_column: str | None = None
    """Column with its caption. Rows of one image are alternatives."""
    csv_cache_dir: str | None = None
    """Folder in which downloads are kept; needed if there are addresses."""

    @property
    def knows_captions(self) -> bool:
        return self.csv_caption_column is not None


@dataclass(slots=True)
class Row:
    """One image of the list."""

    given: str
    """Address or path, as it stands there."""
    path: str | None
    """Where it lies, or will lie: in the cache, or from the csv file's folder; None if it must not be read."""
    is_remote: bool
    captions: tuple[str, ...] = ()


class CsvBackend(DataBackend):
    """A list of images. An image from an address is named `<digest of the address>/<its last part>`, one from a path by the path.

    Stamps are those of the files here: what was downloaded once is not asked for again.
    """

    options_type = CsvOptions

    def __init__(self, options: CsvOptions) -> None:
        self._options = options
        self._file = Path(options.csv_file).expanduser()
        self._lock = threading.Lock()
        self._how = Fetching()

    @property
    def place(self) -> str:
        return self._options.csv_file

    def missing(self) -> str | None:
        if not self._file.is_file():
            return f"csv_file {self.place} is not a file"
        try:
            needs_folder = any(row.is_remote for row in self._rows.values())
        except DatasetError as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message
        if needs_folder and self._options.csv_cache_dir is None:
            return f"{self.place} lists addresses, so csv_cache_dir is needed: the folder in which downloads are kept"
        return None

    def prepare(self, bar: OpenBar) -> tuple[str, ...]:
        wanted = [(row.given, path) for row in self._rows.values() if row.is_remote and (path := self._path(row)) and not path.exists()]
        if not wanted:
            return ()
        with alone_in(self._cache):
            wanted = [(url, path) for url, path in wanted if not path.exists()]  # another run may have fetched them meanwhile
            failed = fetch_all(wanted, self._how, bar) if wanted else {}
        return tuple(f"{count} not fetched, {reason}: {listing(failed, reason)}" for reason, count in Counter(failed.values()).most_common())

    def list(self) -> Iterator[Entry]:
        for name, row in sorted(self._rows.items()):
            yield self._entry(name, row)

    def _entry(self, name: str, row: Row) -> Entry:
        """List a row by the file that is here for it."""
        path = self._path(row)
        if path is None:
            written = row.given if len(row.given) <= NAME_LETTERS else f"{row.given[:NAME_LETTERS]}..."
            return Entry(name, 0, 0, fault="outside", shown=repr(written))
        try:
            facts = path.stat()
        except OSError:
            return Entry(name, 0, 0, fault="not fetched" if row.is_remote else "not there")
        fault = None
        if not stat.S_ISREG(facts.st_mode):
            fault = "unreadable"
        elif facts.st_size >= LIMIT_BYTES:
            fault = "too many bytes"
        elif os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:  # in a folder it would be some other file; here it was meant
            fault = "unsupported"
        return Entry(name, facts.st_size, facts.st_mtime_ns, fault, row.captions or None)

    def read(self, name: str) -> bytes:
        return self._read(name, LIMIT_BYTES)

    def read_head(self, name: str, count: int) -> bytes:
        return self._read(name, count)

    def _read(self, name: str, count: int) -> bytes:
        check_name(name)
        row = self._rows.get(name)
        path = self._path(row) if row else None
        if path is None:
            raise DatasetError(f"{self.place} lists no image {name!r} that may be read")
        try:
            with path.open("rb") as file:
                return file.read(count)
        except OSError as error:
            raise DatasetError(f"{name} of {self.place} cannot be read: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        check_name(name)
        row = self._rows.get(name)
        path = self._path(row) if row else None
        return path is not None and path.is_file()

    @property
    def _cache(self) -> Path:
        return Path(self._options.csv_cache_dir or "").expanduser()

    def _path(self, row: Row) -> Path | None:
        """Where a row's image lies, or will lie; None if that would be outside, links included."""
        if row.path is None or row.is_remote:
            return None if row.path is None else self._cache / row.path
        folder = os.path.realpath(self._file.parent)
        path = os.path.realpath(os.path.join(folder, row.path))
        return Path(path) if is_inside(path, folder) else None

    @property
    def _rows(self) -> dict[str, Row]:
        with self._lock:
            return self._read_rows

    @cached_property
    def _read_rows(self) -> dict[str, Row]:
        """Name to row."""
        url_column, caption_column = self._options.csv_url_column, self._options.csv_caption_column
        columns = [url_column, *([caption_column] if caption_column else [])]
        found: dict[str, Row] = {}
        for cells in read_rows(self._file, self.place, columns):
            given = text_of(cells[url_column])
            if not given:
                continue
            name, row = row_of(given)
            known = found.setdefault(name, row)
            if caption_column:
                known.captions = tuple(dict.fromkeys((*known.captions, *captions_in(cells[caption_column]))))
        return found


def row_of(given: str) -> tuple[str, Row]:
    """Name a row. One that leads out of the folder, or is an address of another kind, gets a name that leads nowhere, and no path."""
    if is_address(given):
        digest = hashlib.blake2b(given.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f"{digest}/{last_part(given)}", Row(given, f"{digest[:2]}/{digest}", is_remote=True)
    path = PurePosixPath(given.replace("\\", "/"))
    if ADDRESS.match(given) or path.is_absolute() or ".." in path.parts or "\0" in given:
        return refused(given).name, Row(given, None, is_remote=False)
    return path.as_posix(), Row(given, path.as_posix(), is_remote=False)


def is_address(given: str) -> bool:
    return given.lower().startswith(("http://", "https://"))


def last_part(url: str) -> str:
    """A file name from an address: its last part, in harmless letters, with the suffix of an image."""
    plain = re.sub(r"[^\w.() -]", "_", unquote(re.split(r"[?#]", url)[0].rsplit("/", 1)[-1])).lstrip(".")
    stem, suffix = os.path.splitext(plain)
    if suffix.lower() not in IMAGE_SUFFIXES:
        stem, suffix = plain, USUAL_SUFFIX
    return (stem[:NAME_LETTERS] or "image") + suffix


def listing(failed: Mapping[str, str], reason: str) -> str:
    """The first few addresses that failed for a reason."""
    urls = [url for url, why in failed.items() if why == reason]
    return ", ".join(without_secrets(url) for url in urls[:ADDRESSES_SHOWN]) + (", ..." if len(urls) > ADDRESSES_SHOWN else "")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other run downloads into a folder.

    Raises:
        DatasetError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DatasetError(f"csv_cache_dir {folder} cannot be written: {error.strerror}", hint="Choose another csv_cache_dir.") from error
    with lock:
        if os.name != "nt":  # has no such lock
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
