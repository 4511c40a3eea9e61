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
from collections.abc import Mapping
from pathlib import Path

MEMO_FILE = "file-digests.json"
READ_BYTES = 1 << 22
SETTLED_SECONDS = 2.0
"""A file younger than this may still change without its time of change doing so; its digest is not remembered."""


def digest_files(files: Mapping[str, Path], memo_folder: Path | None = None) -> str:
    """Digest files by name and content, 32 hexadecimal digits; where they lie makes no difference.

    Args:
        files: names, by which they are told apart, to paths.
        memo_folder: where digests of large files are remembered by path, size and time of change; None remembers nothing.
    """
    memo = _Memo(memo_folder)
    lines = [f"{name} {_digest_file(path, memo)}" for name, path in sorted(files.items())]
    memo.save()
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _digest_file(path: Path, memo: _Memo) -> str:
    """SHA-256 of the content, in hexadecimal."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    known = memo.get(real)
    if known is None:
        known = _sha256(real)
        memo.put(real, known)
    return known


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _Memo:
    """What earlier runs found. Holds no paths: a key is a digest of path, size and time of change."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / MEMO_FILE if folder is not None else None
        self._known = self._read()
        self._is_changed = False

    def get(self, file: Path) -> str | None:
        return self._known.get(_key(file)) if self._path is not None else None

    def put(self, file: Path, digest: str) -> None:
        if self._path is not None and time.time() - file.stat().st_mtime > SETTLED_SECONDS:
            self._known[_key(file)] = digest
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
    return hashlib.blake2b(f"{file}\0{found.st_size}\0{found.st_mtime_ns}".encode(errors="surrogateescape"), digest_size=16).hexdigest()
