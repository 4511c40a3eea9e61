"""What the stores of quantised layers hold, whether it is whole, and what can go; nothing here is needed to train."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.memory.weight_store import ABOUT, SEAL, sha256_of, sweep


@dataclass(frozen=True, slots=True)
class Shelf:
    """One base, quantised by one recipe."""

    folder: Path
    about: dict[str, str]
    """Its base, precision, dtype and device; empty if an earlier release made it."""
    layers: int
    bytes: int
    """Of all its files."""
    used: float | None
    """When a run last read or made it, in seconds since 1970."""
    shards: dict[str, str | None] = field(repr=False)
    """The files that must be there, each with its SHA-256 where that is known; empty if the folder is not whole."""


def find_shelves(roots: Iterable[Path]) -> list[Shelf]:
    """Every store at or below these folders; what runs are making now is none."""
    found: dict[Path, Shelf] = {}
    for root in roots:
        for folder, below, files in os.walk(root):
            below[:] = [name for name in below if not name.endswith(".tmp")]
            if SEAL in files or ABOUT in files or any(is_shard(name) for name in files):
                found[Path(folder).resolve()] = open_shelf(Path(folder))
    return sorted(found.values(), key=lambda shelf: shelf.folder)


def is_shard(name: str) -> bool:
    return name.startswith("layers-") and name.endswith(".safetensors")


def open_shelf(folder: Path) -> Shelf:
    """Read what a store says of itself; tensors are not read."""
    written, about = _read(folder / SEAL), _read(folder / ABOUT)
    digests = about.get("sha256", {})
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    used = (folder / SEAL).stat().st_mtime if written else max((file.st_mtime for file in files), default=None)
    shards = {name: digests.get(name) for name in written}
    return Shelf(folder, about.get("about", {}), sum(map(len, written.values())), sum(file.st_size for file in files), used, shards)


def faults_of(shelf: Shelf, advance: Callable[[int], object]) -> dict[str, str]:
    """Read all files of a store; gives those that are not as they were written, with what is wrong.

    Args:
        advance: told of bytes that were read.
    """
    if not shelf.shards:
        return {SEAL: "it is missing or damaged, so that no run reads these layers"}
    faults = {}
    for name, digest in shelf.shards.items():
        try:
            found = sha256_of(shelf.folder / name, advance)
        except OSError as error:
            faults[name] = f"it cannot be read: {error.strerror}"
            continue
        problem = _cut_short(shelf.folder / name) if digest is None else "" if found == digest else "its bytes are not those that were written"
        if problem:
            faults[name] = problem
    return faults


def drop(shelf: Shelf) -> None:
    """Delete a store; a run that wants it makes it again."""
    (shelf.folder / SEAL).unlink(missing_ok=True)  # first, so that a deletion that is cut short leaves nothing that looks whole
    shutil.rmtree(shelf.folder, ignore_errors=True)


def unused(shelves: Iterable[Shelf], used: Collection[Path] | None, before: float | None) -> list[Shelf]:
    """Those that are to go.

    Args:
        used: folders that stay; None is none of them, and age alone counts.
        before: only stores last read before this time, in seconds since 1970.
    """
    stays = None if used is None else {folder.resolve() for folder in used}
    return [
        shelf
        for shelf in shelves
        if (stays is None or shelf.folder.resolve() not in stays) and (before is None or (shelf.used is not None and shelf.used < before))
    ]


def sweep_roots(shelves: Iterable[Shelf]) -> None:
    """Delete what runs that ended in the middle had gathered beside these."""
    for root in {shelf.folder.parent for shelf in shelves}:
        sweep(root)


def _cut_short(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return ""
    except (OSError, SafetensorError) as error:
        return f"it is damaged: {error}"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
