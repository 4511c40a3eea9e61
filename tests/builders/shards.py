"""Looking into cache folders, and harming them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from simpletuner.data.cache_tools import cache_folders
from simpletuner.data.shards import Place, look_up
from simpletuner.data.shelf import OPEN, SEALED, Shelf
from simpletuner.data.store import DamagedEntry, Store, key_of


def shards_in(folder: Path) -> list[Path]:
    """The files that hold entries, in order of time."""
    return sorted(path for path in folder.rglob("shard-*") if path.suffix in (OPEN, SEALED))


def places_in(path: Path) -> dict[str, Place]:
    """Where in a shard which key's record lies, by the records themselves."""
    return {key.hex(): place for place, key, _ in look_up(Shelf(path.parent), path.name, 8, path.stat().st_size)}


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def damage_entries(folder: Path) -> int:
    """Change a bit in the last tensor of every entry at or below a folder, and count them."""
    count = 0
    for path in shards_in(folder):
        for place in places_in(path).values():
            flip(path, place.offset + place.length - 1)
            count += 1
    return count


def entries_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every entry at or below a folder."""
    stores = [Store(path) for path in cache_folders([folder])]
    return {key: store.get(key) for store in stores for key in sorted(store.keys())}


def tensors(number: int = 0) -> dict[str, Tensor]:
    return {"mean": torch.arange(6.0).reshape(1, 2, 3) + number, "mask": torch.tensor([True, False])}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape and torch.equal(left[name], right[name]) for name in left
    )


def filled(folder: Path, count: int) -> list[str]:
    """A sealed shard of so many entries, and their keys."""
    keys = [key_of(number=number) for number in range(count)]
    store = Store(folder)
    store.put_many((key, tensors(number), {"sample": f"cats/{number}.png"}) for number, key in enumerate(keys))
    store.close()
    return keys


def readable(folder: Path, keys: list[str]) -> set[int]:
    """Which of these entries can be read, each as it was written; damaged ones must say so."""
    store = Store(folder)
    found = set()
    for number, key in enumerate(keys):
        try:
            assert same(store.get(key), tensors(number))
            found.add(number)
        except (KeyError, DamagedEntry):
            pass
    return found
