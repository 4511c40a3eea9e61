"""Tensors of a safetensors file as views of the file: nothing is read until it is used, and what was read can be forgotten."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What a file calls its numbers, to torch's names."""


class MappedFile:
    """A whole safetensors file in the address space. Its tensors must not be used once the file is changed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: it is cut short, or holds numbers of an unknown kind.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise ValueError(f"{path.name} is cut short")
            header = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a private copy: torch wants writable memory
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, Tensor] = {name: self._view(path, 8 + length, entry) for name, entry in header.items()}

    def forget(self) -> None:
        """Give back the memory of what was read so far; whatever is used again is read again."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _view(self, path: Path, start: int, entry: Mapping[str, object]) -> Tensor:
        import torch

        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        assert isinstance(shape, list) and isinstance(offsets, list)
        if kind not in DTYPES:
            raise ValueError(f"{path.name} holds numbers of kind {kind}, which are not known")
        dtype, (begin, end) = getattr(torch, DTYPES[str(kind)]), offsets
        if start + end > len(self._map):
            raise ValueError(f"{path.name} is cut short")
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin).view(shape)
