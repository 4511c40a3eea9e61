"""A cache as plain files that other tools read: safetensors, and one JSON that says what is where."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from simpletuner.data.cache_place import Where, as_place
from simpletuner.data.cache_tools import Advance, Damaged, Inventory, read_all
from simpletuner.data.records import DamagedEntry, unpack, verified
from simpletuner.data.shard_writer import SHARD_BYTES
from simpletuner.errors import DatasetError

INDEX_NAME = "index.json"


def export(where: Where, to: Path, stock: Inventory, advance: Advance, *, is_one_file_each: bool) -> list[Damaged]:
    """Write the entries of a cache.

    Args:
        to: a folder that is empty or not there yet. `index.json` in it, written last, names for each key the file, the tensors
            with their names in that file, and the facts that the entry came with.
        stock: what `take_stock` says of it.
        advance: told of each entry.
        is_one_file_each: a file `<key>.safetensors` an entry, in folders by the key's first two letters, whose tensors have their
            own names; otherwise files of about 256 MB, in which a tensor is called `<key>/<name>`.

    Returns:
        Entries that are damaged and were left out.

    Raises:
        DatasetError: there is something at `to`.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise DatasetError(f"{to} is there already", hint="Name a folder that is empty or does not exist.")
    to.mkdir(parents=True, exist_ok=True)
    shelf, index, damaged = as_place(where).shelf().original(), dict[str, Any](), list[Damaged]()
    waiting: dict[str, Tensor] = {}
    number = 1
    for key, place, data in read_all(shelf, stock.places(stock.is_current)):
        advance(1)
        try:
            if isinstance(data, OSError):
                raise DamagedEntry(f"it cannot be read ({data.strerror})")
            tensors, about = unpack(key, data), verified(data)[1].about
        except DamagedEntry as error:
            damaged.append(Damaged(key.hex(), place, {}, str(error)))
            continue
        name = key.hex()
        if is_one_file_each:
            file = f"{name[:2]}/{name}.safetensors"
            save(tensors, to / file, about)
            names = {tensor: tensor for tensor in tensors}
        else:
            if waiting and size_of(waiting) + size_of(tensors) > SHARD_BYTES:
                save(waiting, to / file_name(number), {})
                waiting, number = {}, number + 1
            file = file_name(number)
            names = {tensor: f"{name}/{tensor}" for tensor in tensors}
            waiting |= {names[tensor]: value for tensor, value in tensors.items()}
        index[name] = {"file": file, "tensors": names, "about": dict(about)}
    if waiting:
        save(waiting, to / file_name(number), {})
    write_whole(to / INDEX_NAME, json.dumps({"format": "simpletuner cache export, version 1", "entries": index}, indent=1).encode())
    return damaged


def file_name(number: int) -> str:
    return f"cache-{number:05d}.safetensors"


def size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def save(tensors: dict[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    # Tensors of one entry share the memory that they were read into, which safetensors refuses to save.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(own, metadata={"format": "pt", **about}))


def write_whole(path: Path, data: bytes) -> None:
    staged = path.with_name(path.name + ".tmp")
    staged.write_bytes(data)
    os.replace(staged, path)
