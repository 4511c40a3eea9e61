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
thrown out: each epoch reads everything once, so what was read last is no likelier to be read next. What counts is in the bucket:
a copy in which anything is damaged is deleted and read no more.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from simpletuner.data.bucket import Bucket, FileNotThereError
from simpletuner.data.shelf import OPEN, SEALED, Item, Shelf, sync_folder
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
COUNT_SECONDS = 60.0
"""How often copies are counted: other processes make some too."""
WAIT_SECONDS = 900.0
"""For another process to upload a shard that it has locked."""
POLL_SECONDS = 0.2


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
        self._room = Room(root, copies_bytes)
        self._may_write = False
        self._lock = threading.Lock()
        self._uploader: ThreadPoolExecutor | None = None
        self._uploads: dict[str, Future[None]] = {}
        """Those that are waited for, by shard, and those that failed."""
        self._wanted: deque[str] = deque()
        self._is_fetching = False

    def list(self) -> dict[str, Item]:
        # What is here first: a shard that is uploaded between the two is then seen twice rather than not at all.
        here = {name: item for name, item in super().list().items() if name.startswith("shard-")}
        there = {one.name: Item(one.size_bytes, one.modified) for one in self._bucket.list() if one.name.startswith("shard-") and "/" not in one.name}
        return {**here, **there}

    def read(self, name: str, offset: int, length: int) -> bytearray:
        with suppress(FileNotFoundError, NotADirectoryError):
            return super().read(name, offset, length)
        with suppress(OSError):
            return self._copies.read(name, offset, length)
        return self._read_bucket(name, offset, length)

    def _read_bucket(self, name: str, offset: int, length: int) -> bytearray:
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

    def drop_copy(self, name: str) -> bool:
        with suppress(OSError):
            self._copies.delete(name)
            self._room.forget()
        return True  # also if there is none: another thread or process may have deleted it just now

    @property
    def copies(self) -> Shelf | None:
        return self._copies

    def original(self) -> Shelf:
        return Original(self._bucket, self.folder, self._root, self._copies_bytes)

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
        os.replace(growing, self.workplace / name)
        self._upload_soon(name)
        sync_folder(self.workplace)

    def resume(self) -> int:
        left = [name for name in super().list() if name.startswith("shard-") and name.endswith(SEALED)]
        copies = self._copies.list()
        there = {one.name: one.size_bytes for one in self._bucket.list()} if left or copies else {}
        for name in left:
            if name in there:  # its writer was killed before it could make a copy of it
                super().delete(name)
            else:
                self._upload_soon(name)
        self._tidy(copies, there)
        return len(left)

    def finish(self) -> None:
        for name in self._failed():
            self._upload_soon(name)
        for upload in tuple(self._uploads.values()):
            upload.exception()  # waits
        self._raise_failed()

    def _upload_soon(self, name: str) -> None:
        try:
            with self._lock:
                self._uploader = self._uploader or ThreadPoolExecutor(UPLOADS, thread_name_prefix="cache-uploader")
                if name not in self._uploads or self._uploads[name].done():
                    self._uploads[name] = self._uploader.submit(self._upload, name)
        except RuntimeError:  # the interpreter is ending, and no more threads can be had
            self._upload(name)

    def _upload(self, name: str) -> None:
        """Bring a finished shard into the bucket, or wait until another process has done so.

        Raises:
            DatasetError: it is not there.
        """
        end = time.monotonic() + WAIT_SECONDS
        while not self._try_upload(name):
            if time.monotonic() > end:
                raise DatasetError(
                    f"another process holds {self.workplace / name} and has not uploaded it in {WAIT_SECONDS / 60:.0f} minutes",
                    hint="Does another run hang on this machine? End it.",
                )
            time.sleep(POLL_SECONDS)

    def _try_upload(self, name: str) -> bool:
        """Upload a shard and keep it as a copy if there is room; False if another process is about to."""
        path = self.workplace / name
        try:
            file = path.open("rb")
        except FileNotFoundError:  # another process has uploaded it
            return True
        with file:
            if lock(file) is False:
                return False
            if not path.exists():
                return True
            self._bucket.write(name, file)
            size = os.fstat(file.fileno()).st_size
        with suppress(OSError):  # it is where it belongs; what is left here goes with the next `resume`
            if self._room.take(size):
                self._make(self._copies.folder)
                os.replace(path, self._copies.folder / name)
            else:
                path.unlink()
        return True

    def _failed(self) -> dict[str, BaseException]:
        """What went wrong with uploads that are over, by shard; those that went well are forgotten."""
        with self._lock:
            failed = {name: error for name, upload in self._uploads.items() if upload.done() and (error := upload.exception())}
            self._uploads = {name: upload for name, upload in self._uploads.items() if name in failed or not upload.done()}
        return failed

    def _raise_failed(self) -> None:
        for error in self._failed().values():
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
        if size is None or not self._room.take(size):
            return
        with self._new_part(name) as part:
            with part.open("wb") as file:
                self._bucket.download(name, file)
                file.flush()
                os.fsync(file.fileno())  # or a power failure might leave the name without the bytes
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

    def _tidy(self, copies: Mapping[str, Item], there: Mapping[str, int]) -> None:
        """Delete copies of shards that are gone from the bucket or of another size there, and what killed runs had half fetched.

        Args:
            there: bytes of what is in the bucket, by name.
        """
        for name, item in copies.items():
            is_left = time.time() - item.modified > STALE_SECONDS if name.endswith(PART) else there.get(name) != item.size
            if is_left:
                self.drop_copy(name)


class Original(BucketShelf):
    """The same as other machines see it, and what only this one has yet: copies are not read."""

    def read(self, name: str, offset: int, length: int) -> bytearray:
        with suppress(FileNotFoundError):
            return self._read_bucket(name, offset, length)
        with suppress(FileNotFoundError, NotADirectoryError):
            return Shelf.read(self, name, offset, length)
        return self._read_bucket(name, offset, length)  # uploaded in between

    def drop_copy(self, name: str) -> bool:
        return False

    @property
    def copies(self) -> Shelf | None:
        return None


class Room:
    """The room for copies in all workplaces of one bucket. Safe to use from many threads."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        self._root, self._most_bytes = root, most_bytes
        self._held_bytes = 0
        self._counted = -math.inf
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Take some of it for one more copy; False if there is too little."""
        with self._lock:
            now = time.monotonic()
            if now - self._counted > COUNT_SECONDS:
                self._held_bytes, self._counted = copied_bytes(self._root), now
            if self._held_bytes + size > self._most_bytes or shutil.disk_usage(self._root).free - size < FREE_BYTES:
                return False
            self._held_bytes += size
            return True

    def forget(self) -> None:
        """Count anew before the next is taken."""
        with self._lock:
            self._counted = -math.inf


def copied_bytes(root: Path) -> int:
    """Bytes of all copies in the workplaces of one bucket."""
    total = 0
    for folder, _, files in os.walk(root):
        if os.path.basename(folder) == COPIES:
            for name in files:
                with suppress(OSError):  # another process has just renamed or deleted it
                    total += os.stat(os.path.join(folder, name)).st_size
    return total


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
