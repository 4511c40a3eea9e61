"""Tensors on disk under a key: written whole or not at all, verified when read.

<folder>/3f/3f9a...c1.safetensors                   one entry; its checksum stands in the file's metadata
<folder>/3f/3f9a...c1.<process>-<random>.tmp        one being written, or left by a killed run; swept later

Callers see keys and tensors only, never files: how entries lie in the folder may change behind the same verbs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from simpletuner.errors import DatasetError, MemoryLimitError, SimpleTunerError

SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0
"""A temporary file this old belongs to no living writer. Process ids would say less: a folder may be shared by machines."""


class DamagedEntry(Exception):
    """An entry is there but is not what was written. Whoever reads makes it again and says so; no user ever sees this."""


def key_of(**parts: str | int) -> str:
    """Make a key out of everything an entry depends on: 32 hex letters, the same on every machine and in every Python."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store:
    """One folder of entries. Threads, processes and machines may read and write it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, key: str) -> bool:
        """Whether there is an entry; a damaged one counts until it is read."""
        return self._path(key).is_file()

    def keys(self) -> set[str]:
        """Every key, from directory listings alone: one look for a whole dataset instead of one a sample."""
        return {path.name.removesuffix(SUFFIX) for path in self._files() if path.name.endswith(SUFFIX)}

    def put(self, key: str, tensors: Mapping[str, Tensor], describe: Mapping[str, str]) -> None:
        """Write an entry, or replace it; it is safe on disk when this returns.

        Args:
            tensors: of any device and layout; a view is written as what it shows, without the rest of its storage.
            describe: facts for whoever looks into the file later. No absolute paths: a cache may be moved and shared.

        Raises:
            MemoryLimitError: the disk is full; every earlier entry is kept.
            DatasetError: the folder cannot be used.
        """
        # safetensors refuses tensors that share a storage, as the halves of one encoder's answer do.
        own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        facts = {**describe, "key": key}
        data = safetensors.torch.save(own, metadata={**facts, "checksum": _checksum(own, facts)})
        path = self._path(key)
        staged = path.with_name(f"{key}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_synced(staged, data)
                # The folder itself is not synced: a rename lost in a power failure costs one entry made again.
                os.replace(staged, path)
            except BaseException:  # a signal too must not leave half an entry lying about
                staged.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._refusal(error) from error

    def get(self, key: str) -> dict[str, Tensor]:
        """Read an entry and verify it.

        Raises:
            KeyError: there is none.
            DamagedEntry: its bytes are not those that were written for this key.
        """
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise DamagedEntry(f"it cannot be read ({error.strerror})") from error
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError) as error:
            raise DamagedEntry(f"it is no safetensors file ({error})") from error
        metadata = _metadata(data)
        wanted = metadata.pop("checksum", None)
        if metadata.get("key") != key or _checksum(tensors, metadata) != wanted:
            raise DamagedEntry("its checksum does not match")
        return tensors

    def remove(self, key: str) -> None:
        """Delete an entry, if it is there."""
        self._path(key).unlink(missing_ok=True)

    def sweep(self, older_than_seconds: float = STALE_SECONDS) -> int:
        """Delete temporary files that killed runs left, and count them."""
        swept = 0
        for path in self._files():
            try:
                if path.name.endswith(".tmp") and time.time() - path.stat().st_mtime > older_than_seconds:
                    os.unlink(path)
                    swept += 1
            except OSError:  # another process swept or finished it first, or the folder is read-only: harmless either way
                continue
        return swept

    def _path(self, key: str) -> Path:
        assert re.fullmatch(r"[0-9a-f]{8,}", key), f"not a key: {key!r}"
        return self.folder / key[:2] / (key + SUFFIX)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        try:
            shards = [entry.path for entry in os.scandir(self.folder) if re.fullmatch(r"[0-9a-f]{2}", entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return  # nothing yet; if there never can be, `put` says so
        except OSError as error:
            raise self._refusal(error) from error
        for shard in shards:
            with os.scandir(shard) as entries:
                yield from entries

    def _refusal(self, error: OSError) -> SimpleTunerError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return MemoryLimitError(
                f"no space is left for the cache folder {self.folder}; its {len(self.keys())} finished entries are kept",
                hint="Make room, or point cache_dir to a larger disk, and run the same command again: it continues where it was.",
            )
        return DatasetError(
            f"the cache folder {self.folder} cannot be used: {error.strerror or error}",
            hint="Give read and write permission, or point cache_dir to another folder.",
        )


class WriteBehind:
    """A thread that puts entries while the caller makes the next ones; its errors reach the caller at the next put or at the end."""

    def __init__(self, ahead: int) -> None:
        """
        Args:
            ahead: entries that may wait to be written, and so be lost to a `kill -9`.
        """
        self._ahead = max(1, ahead)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._waiting: deque[Future[None]] = deque()

    def put(self, store: Store, key: str, tensors: Mapping[str, Tensor], describe: Mapping[str, str]) -> None:
        """Hand over an entry; waits only while too many are waiting already."""
        self._settle(self._ahead - 1)
        self._waiting.append(self._pool.submit(store.put, key, tensors, describe))

    def _settle(self, may_wait: int) -> None:
        while self._waiting and (len(self._waiting) > may_wait or self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Also after an error all that was handed over is written: it was encoded, and it is whole.
        self._pool.shutdown(wait=True)
        if error is None:
            self._settle(0)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _metadata(data: bytes) -> dict[str, str]:
    """The text metadata of a safetensors file that loads: its length in 8 bytes, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """BLAKE2b over names, types, shapes and values, and over what is said of them; independent of the file's layout."""
    digest = hashlib.blake2b(json.dumps(dict(facts), sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
