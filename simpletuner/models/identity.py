"""Say which weights these are: a digest of a model part's files that changes exactly when one of them does.

A file's name is its SHA-256. That is also how the cache of huggingface_hub names large files, so those need no reading, and a model
keeps its identity when it moves from the hub to a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

MEMO_FILE = "file-digests.json"
READ_BYTES = 1 << 22
SETTLED_SECONDS = 2.0
"""A file younger than this may still change without its time of change doing so; its digest is not remembered."""


def digest_files(files: Mapping[str, Path], memo_folder: Path | None = None) -> str:
    """Digest files by name and content, 32 hexadecimal digits; where they lie makes no difference.

    Args:
        files: names, by which they are told apart, to paths.
        memo_folder: where digests of files are remembered by path, size, time of change and inode; None remembers nothing.
    """
    memo = _Memo(memo_folder)
    lines = [f"{name} {_digest_file(path, memo)}" for name, path in sorted(files.items())]
    memo.save()
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def unread(files: Iterable[Path], memo_folder: Path) -> list[Path]:
    """Those of some files that `digest_files` would have to read, each once."""
    memo = _Memo(memo_folder)
    return [real for real in dict.fromkeys(path.resolve() for path in files) if not _is_blob(real) and memo.get(_key(real)) is None]


def learn(files: Iterable[Path], memo_folder: Path, advance: Callable[[int], object]) -> None:
    """Read files and remember their digests, after each of them; `advance` is told of the bytes."""
    for path in files:
        memo = _Memo(memo_folder)
        _digest_file(path, memo, advance)
        memo.save()


def _digest_file(path: Path, memo: _Memo, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of the content, in hexadecimal."""
    real = path.resolve()
    if _is_blob(real):
        return real.name
    key = _key(real)
    known = memo.get(key)
    if known is None:
        known = _sha256(real, advance)
        if _key(real) == key and time.time() - real.stat().st_mtime > SETTLED_SECONDS:
            memo.put(key, known)
    return known


def _is_blob(real: Path) -> bool:
    """Whether a file's name is its digest, as the hub's cache names large files."""
    return real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) is not None


def _sha256(path: Path, advance: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


class _Memo:
    """What earlier runs found. Holds no paths: a key is a digest of path, size, time of change and inode."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / MEMO_FILE if folder is not None else None
        self._known = self._read()
        self._is_changed = False

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, digest: str) -> None:
        self._known[key] = digest
        self._is_changed = True

    def save(self) -> None:
        if self._path is None or not self._is_changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staged = self._path.with_name(f"{MEMO_FILE}.{os.getpid()}.tmp")
        staged.write_text(json.dumps(self._known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        staged.replace(self._path)

    def _read(self) -> dict[str, str]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:  # cut short by a full disk, say: reading the weights again costs seconds
            return {}
        return known if isinstance(known, dict) else {}


def _key(file: Path) -> str:
    found = file.stat()
    facts = f"{file}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}"  # the last: another file may be moved here with its time of change
    return hashlib.blake2b(facts.encode(errors="surrogateescape"), digest_size=16).hexdigest()
