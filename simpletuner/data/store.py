"""Tensors on disk under a key: written whole or not at all, verified when read, many to a file.

    records.py        one entry as bytes
    shards.py         files of many entries, and reading what they hold
    shard_writer.py   how such a file grows, and becomes a plain safetensors file
    catalogue.py      where each key's entry lies, in memory
    shelf.py          the few operations on files that all this needs
    bucket_shelf.py   the same for a bucket

Each writing process has a shard of its own in every folder, so that threads, processes and machines need no locks between
them. Nothing that was written is ever changed: an entry is replaced by writing it again, the newest whole one counts, and
`simpletuner cache gc` rewrites shards of which little is left. Callers see keys and tensors only, never files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from simpletuner.data.cache_place import Where, as_place
from simpletuner.data.catalogue import Catalogue
from simpletuner.data.records import DamagedEntry, Record, pack, unpack
from simpletuner.data.shard_writer import ShardWriter, adopt
from simpletuner.data.shards import Place, add_dead, stem_of
from simpletuner.data.shelf import OPEN, SEALED, Shelf
from simpletuner.errors import DatasetError, MemoryLimitError, SimpleTunerError

__all__ = ["DamagedEntry", "NewEntry", "Store", "key_of"]

STALE_SECONDS = 3600.0
"""What nobody has written to for so long belongs to no living writer. Process ids would say less: a folder may be shared by machines."""
LOOK_SECONDS = 1.0
TOUCH_SECONDS = 86400.0
"""How often reading a shard is noted: `cache gc --older-than` counts in days."""
TRIES = 3
NewEntry = tuple[str, Mapping[str, Tensor], Mapping[str, str]]
"""Key, tensors and facts, as `put` takes them."""


def key_of(**parts: str | int) -> str:
    """Make a key out of everything an entry depends on: 32 hex letters, the same on every machine and in every Python."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store:
    """One place of entries. Threads, processes and machines may read and write it at once."""

    def __init__(self, where: Where) -> None:
        self.place = as_place(where)
        self.identity = self.place.identity
        """The same for all stores of one place."""
        self._shelf = self.place.shelf()
        self._catalogue = Catalogue(self._shelf)
        self._writing = threading.Lock()
        self._writers: list[ShardWriter] = []
        """The shard that grows, if there is one."""
        self._unsealed: list[ShardWriter] = []
        """Shards that could not be sealed when they were to be."""
        self._used: dict[str, float] = {}
        """When the use of a shard was last noted, by this process's clock."""
        self._looked = -LOOK_SECONDS
        weakref.finalize(self, _seal_quietly, self._writers, self._unsealed, self._shelf)  # also when the interpreter ends

    def has(self, key: str) -> bool:
        """Whether there is an entry, of other processes as of a second ago; a damaged one counts until it is read."""
        if self._find(key):
            return True
        if time.monotonic() - self._looked < LOOK_SECONDS:  # a fill asks this of every image
            return False
        self._refresh()
        return bool(self._find(key))

    def keys(self) -> set[str]:
        """Every key: one look for a whole dataset instead of one a sample."""
        with self._refusing():
            return self._catalogue.keys()

    def put(self, key: str, tensors: Mapping[str, Tensor], describe: Mapping[str, str]) -> None:
        """Write an entry, or replace it; it is safe on disk when this returns.

        Args:
            tensors: of any device and layout; a view is written as what it shows, without the rest of its storage.
            describe: facts for whoever looks into the file later. No absolute paths: a cache may be moved and shared.

        Raises:
            MemoryLimitError: the disk is full; every earlier entry is kept.
            DatasetError: the folder cannot be used.
        """
        self.put_many([(key, tensors, describe)])

    def put_many(self, entries: Iterable[NewEntry]) -> None:
        """Write several entries, which together wait for the disk once; see `put`."""
        self.write([pack(_bytes_of(key), tensors, describe) for key, tensors, describe in entries])

    def write(self, records: Sequence[Record]) -> None:
        """Write entries that are packed already; see `put`."""
        with self._writing, self._refusing():
            try:
                for _ in range(TRIES):
                    records = self._append(records)
                    if not records:
                        return
            except BaseException:
                self._seal()
                raise
        raise DatasetError(
            f"the cache folder {self._shelf.workplace} loses files as they are written",
            hint="Is something deleting it? Point cache_dir to another folder.",
        )

    def get(self, key: str) -> dict[str, Tensor]:
        """Read an entry and verify it.

        Raises:
            KeyError: there is none.
            DamagedEntry: its bytes are not those that were written for this key.
        """
        damage: DamagedEntry | None = None
        for is_second in (False, True):
            if is_second:  # another process may have written it, or written it again, or merged its shard into another
                self._refresh()
            for place in self._find(key):
                try:
                    tensors = self._read(key, place)
                except FileNotFoundError:
                    continue
                except DamagedEntry as error:
                    damage = error
                except OSError as error:
                    damage = DamagedEntry(f"it cannot be read ({error.strerror})")
                else:
                    self._note_use(place.shard)
                    return tensors
        if damage is not None:
            raise damage
        raise KeyError(key)

    def remove(self, key: str) -> None:
        """Delete an entry, if it is there. Its bytes go with the next `simpletuner cache gc`."""
        self._refresh()
        self.drop(self._find(key))

    def drop(self, places: Iterable[Place]) -> None:
        """Delete the entries at these places, and nothing else that has their keys.

        Raises:
            DatasetError: the folder cannot be written to.
        """
        by_shard: dict[str, set[int]] = {}
        for place in places:
            by_shard.setdefault(stem_of(place.shard), set()).add(place.offset)
        with self._refusing():
            for stem, offsets in by_shard.items():
                add_dead(self._shelf, stem, offsets)
            self._catalogue.refresh()

    def close(self) -> None:
        """Make a safetensors file of what was written, and wait until it is where it belongs; a later `put` begins another.

        In a folder, what cannot be made one counts as it is.

        Raises:
            MemoryLimitError: the disk is too full to make what the bucket is to have; it is kept on this machine.
            DatasetError: the bucket does not take it; it is kept on this machine. Calling this again tries again.
        """
        with self._writing, self._refusing():
            problem = self._seal()
            self._shelf.finish()
            if problem is not None and self._shelf.publishes_late:
                raise problem

    def sweep(self, older_than_seconds: float = STALE_SECONDS) -> int:
        """Seal the shards that killed runs left, delete their temporary files, begin to upload what they had not, and count it all."""
        swept = 0
        mine = {writer.path.name for writer in self._writers}
        with self._refusing():
            listing = self._shelf.list()
        for name, item in listing.items():
            is_growing = name.startswith("shard-") and name.endswith(OPEN)
            is_old = time.time() - item.modified > older_than_seconds
            if name in mine or not (is_old or (is_growing and self._shelf.is_abandoned(name))):
                continue
            try:
                if is_growing:
                    swept += adopt(self._shelf, name)
                elif name.startswith("shard-") and name.endswith(".tmp"):
                    self._shelf.delete(name)
                    swept += 1
            except OSError:  # another process swept or finished it first, or the folder is read-only: harmless either way
                continue
        with self._refusing():
            return swept + self._shelf.resume()

    def _append(self, records: Sequence[Record]) -> list[Record]:
        """Write records into as many shards as they need, and give those that have to be written once more."""
        lost: list[Record] = []
        waiting = list(records)
        while waiting:
            writer = self._writers[0] if self._writers else None
            count = writer.fitting(waiting) if writer else 0
            if writer is None or count == 0:
                self._seal()
                self._shelf.prepare()
                self._writers.append(ShardWriter(self._shelf, waiting[0]))
                continue
            batch, waiting = waiting[:count], waiting[count:]
            places = writer.append(batch)
            if writer.is_in_place():
                self._catalogue.note([record.key for record in batch], places, writer.end)
            else:
                lost += batch
                self._writers.remove(writer)
                writer.close()
        return lost

    def _seal(self) -> OSError | DatasetError | None:
        return _seal_quietly(self._writers, self._unsealed, self._shelf)

    def _read(self, key: str, place: Place) -> dict[str, Tensor]:
        """Read an entry; from where it came, if it is damaged in this machine's copy."""
        try:
            return unpack(_bytes_of(key), self._shelf.read(place.shard, place.offset, place.length))
        except DamagedEntry:
            if not self._shelf.drop_copy(place.shard):
                raise
        return unpack(_bytes_of(key), self._shelf.read(place.shard, place.offset, place.length))

    def _find(self, key: str) -> list[Place]:
        with self._refusing():
            return self._catalogue.find(_bytes_of(key))

    def _refresh(self) -> None:
        with self._refusing():
            self._catalogue.refresh()
        self._looked = time.monotonic()

    def _note_use(self, shard: str) -> None:
        """Let a sealed shard's time of change say when it was last read, to the day."""
        now = time.monotonic()
        if shard.endswith(SEALED) and now - self._used.get(shard, -math.inf) > TOUCH_SECONDS:
            self._used[shard] = now
            self._shelf.touch(shard)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> SimpleTunerError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return MemoryLimitError(
                f"no space is left for the cache folder {self._shelf.workplace}; its {len(self.keys())} finished entries are kept",
                hint="Make room, or point cache_dir to a larger disk, and run the same command again: it continues where it was.",
            )
        return DatasetError(
            f"the cache folder {self._shelf.workplace} cannot be used: {error.strerror or error}",
            hint="Give read and write permission, or point cache_dir to another folder.",
        )


def _seal_quietly(writers: list[ShardWriter], unsealed: list[ShardWriter], shelf: Shelf) -> OSError | DatasetError | None:
    """Seal what grows, and give what was in the way: its entries count all the same, and it is sealed the next time or by a later sweep."""
    problem: OSError | DatasetError | None = None
    unsealed += writers
    writers.clear()
    for writer in tuple(unsealed):
        try:
            writer.seal(shelf)
            unsealed.remove(writer)
        except (OSError, DatasetError) as error:
            problem = error
    return problem


def _bytes_of(key: str) -> bytes:
    assert re.fullmatch(r"[0-9a-f]{32}", key), f"not a key: {key!r}"
    return bytes.fromhex(key)
