"""A cache in a bucket: shards grow in a folder of this machine, are uploaded whole, and are read from local copies where there are any.

    <workplace>/shard-*.open            one that grows, or that a killed run left
    <workplace>/shard-*.safetensors     a finished one that is not in the bucket yet
    <workplace>/.copies/                whole shards that are in the bucket

An entry is on this machine's disk when `Store.put` returns, and its shard is in the bucket when `Store.close` returns. What a
killed run had not uploaded is still in the workplace; the next run here uses it as it is and uploads it. Growing and uploading
files are locked (flock), so that a file nobody holds is known to be left over.

Reads: an entry is asked for by its range, and the shard it lies in is then fetched whole, behind the reader's back, as long as
there is room for copies. With n entries in s shards that is s requests and a few, for all epochs, instead of n for each; and
none at all for what this machine made itself, since an uploaded shard stays as a copy. When the room is used up nothing is
thrown out: each epoch reads everything once, so what was read last is no likelier to be read next.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from simpletuner.data.bucket import Bucket, FileNotThereError
from simpletuner.data.shelf import OPEN, SEALED, Item, Shelf
from simpletuner.errors import DatasetError

COPIES = ".copies"
PART = ".part"
MARK = "part-of-a-bucket.txt"
"""Lies in the folder of each bucket's workplaces, which are no caches by themselves."""
MARK_TEXT = "Shards on their way to a bucket, and in .copies those that are there already. Delete .copies if you like, and nothing else.\n"
ABOUT = "about.txt"
"""Lies in the bucket beside the shards; writing it shows whether one may write before an hour of encoding."""
ABOUT_TEXT = b"A cache of SimpleTuner: `simpletuner cache ls` says what it holds.\n"
FREE_BYTES = 5 << 30
"""Copies leave so much of the disk free."""
UPLOADS = 2
"""Shards uploaded at once."""
STALE_SECONDS = 3600.0


class BucketShelf(Shelf):
    """Named objects in one folder of a bucket, with a workplace on this machine. Safe to use from many threads."""

    publishes_late = True
    notes_use = False

    def __init__(self, bucket: Bucket, workplace: Path, root: Path, copies_bytes: int) -> None:
        """
        Args:
            workplace: this folder's own, at or below `root`.
            root: all workplaces of one bucket, which share the room for copies.
            copies_bytes: that room.
        """
        super().__init__(workplace)
        self._bucket, self._root, self._copies_bytes = bucket, root, copies_bytes
        self._copies = Shelf(workplace / COPIES)
        self._may_write = False
        self._lock = threading.Lock()
        self._uploader: ThreadPoolExecutor | None = None
        self._uploads: list[Future[None]] = []
        self._wanted: deque[str] = deque()
        self._is_fetching = False

    def list(self) -> dict[str, Item]:
        # What is here first: a shard that is uploaded between the two is then seen twice rather than not at all.
        here = {name: item for name, item in super().list().items() if name.startswith("shard-")}
        there = {one.name: Item(one.size_bytes, one.modified) for one in self._bucket.list() if one.name.startswith("shard-") and "/" not in one.name}
        return {**there, **here}

    def read(self, name: str, offset: int, length: int) -> bytearray:
        with suppress(FileNotFoundError, NotADirectoryError):
            return super().read(name, offset, length)
        with suppress(FileNotFoundError, NotADirectoryError):
            return self._copies.read(name, offset, length)
        if name.endswith(OPEN):  # these are nowhere but here, and this one has got its final name
            raise FileNotFoundError(name)
        try:
            return bytearray(self._bucket.read(name, offset, length))
        except FileNotThereError:
            raise FileNotFoundError(name) from None

    def write(self, name: str, data: bytes) -> None:
        self._bucket.write(name, data)

    def delete(self, name: str) -> None:
        self._bucket.delete(name)
        super().delete(name)
        self._copies.delete(name)

    def touch(self, name: str) -> None:
        """Have a copy fetched of a shard of which an entry was read."""
        with self._lock:
            self._wanted.append(name)
            if not self._is_fetching:
                # A daemon: a copy that is half fetched when the process ends is of no use to anybody.
                threading.Thread(target=self._fetch, name="cache-fetcher", daemon=True).start()
                self._is_fetching = True

    def prepare(self) -> None:
        self._raise_failed()
        self._make(self.workplace)
        if not self._may_write:
            self._bucket.write(ABOUT, ABOUT_TEXT)
            self._may_write = True

    def claim(self, growing: io.FileIO) -> None:
        lock(growing)

    def is_abandoned(self, name: str) -> bool:
        try:
            with open(self.workplace / name, "rb", buffering=0) as file:
                return lock(file) is True
        except FileNotFoundError:
            return False

    def publish(self, growing: Path, name: str) -> None:
        super().publish(growing, name)
        self._upload_soon(name)

    def resume(self) -> int:
        left = [name for name in super().list() if name.startswith("shard-") and name.endswith(SEALED)]
        for name in left:
            self._upload_soon(name)
        self._tidy()
        return len(left)

    def finish(self) -> None:
        for upload in tuple(self._uploads):
            upload.exception()  # waits
        self._raise_failed()

    def _upload_soon(self, name: str) -> None:
        try:
            with self._lock:
                self._uploader = self._uploader or ThreadPoolExecutor(UPLOADS, thread_name_prefix="cache-uploader")
                self._uploads.append(self._uploader.submit(self._upload, name))
        except RuntimeError:  # the interpreter is ending, and no more threads can be had
            self._upload(name)

    def _upload(self, name: str) -> None:
        """Bring a finished shard into the bucket, unless another process does so; keep it as a copy if there is room."""
        path = self.workplace / name
        with suppress(FileNotFoundError):
            with open(path, "rb") as file:
                if lock(file) is False or not path.exists():
                    return
                self._bucket.write(name, file)
            if self._has_room(path.stat().st_size):
                self._make(self._copies.folder)
                os.replace(path, self._copies.folder / name)
            else:
                path.unlink()

    def _raise_failed(self) -> None:
        with self._lock:
            over = [upload for upload in self._uploads if upload.done()]
            self._uploads = [upload for upload in self._uploads if upload not in over]
        for error in filter(None, (upload.exception() for upload in over)):
            if isinstance(error, DatasetError):
                kept = f"What was made lies in {self.workplace}; the next run on this machine uses it and uploads it."
                raise DatasetError(error.message, hint=f"{error.hint} {kept}" if error.hint else kept) from None
            raise error

    def _fetch(self) -> None:
        """Fetch the copies that are wanted, one after the other."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_fetching = False
                    return
                name = self._wanted.popleft()
            with suppress(OSError, DatasetError):  # its entries are then read by their ranges as before
                self._fetch_one(name)

    def _fetch_one(self, name: str) -> None:
        place = self._copies.folder / name
        if place.exists() or (self.workplace / name).exists():
            return
        size = self._bucket.size_of(name)
        self._make(self._copies.folder)
        if size is None or not self._has_room(size):
            return
        with self._new_part(name) as part:
            with part.open("wb") as file:
                self._bucket.download(name, file)
            if part.stat().st_size == size:
                os.replace(part, place)

    @contextmanager
    def _new_part(self, name: str) -> Iterator[Path]:
        """A file to fetch into, which no other process fetches into.

        Raises:
            FileExistsError: another process fetches this shard.
        """
        part = self._copies.folder / f"{name}{PART}"
        part.open("xb").close()
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Make a folder of the workplace, and say at its root what that is."""
        folder.mkdir(parents=True, exist_ok=True)
        mark = self._root / MARK
        if not mark.exists():
            mark.write_text(MARK_TEXT, encoding="utf-8")

    def _has_room(self, size: int) -> bool:
        held = sum(path.stat().st_size for path in self._root.rglob(f"{COPIES}/*") if path.exists())
        return held + size <= self._copies_bytes and shutil.disk_usage(self.workplace).free - size >= FREE_BYTES

    def _tidy(self) -> None:
        """Delete copies of shards that are gone from the bucket, and what killed runs had half fetched."""
        copies = self._copies.list()
        there = {one.name for one in self._bucket.list()} if copies else set()
        for name, item in copies.items():
            is_left = time.time() - item.modified > STALE_SECONDS if name.endswith(PART) else name not in there
            if is_left:
                self._copies.delete(name)


def lock(file: io.FileIO | io.BufferedReader) -> bool | None:
    """Lock an open file for as long as it is open; False if another holds it, None where that cannot be told."""
    if os.name == "nt":
        return None
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True
