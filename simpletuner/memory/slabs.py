"""Where weights wait in main memory: in few slabs, each of exactly a power of two bytes.

PyTorch's allocator of pinned memory rounds every block up to a power of two: a tensor at a time, half as much again was seen to be lost. Slabs
of such sizes lose nothing, and the tensors are laid into them densely.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.errors import MemoryLimitError

ALIGNMENT_BYTES = 256
"""What tensors begin at multiples of, here and on the accelerator."""
LARGEST_BYTES = 1 << 29
"""Of a slab: while one is filled, what goes into it is there twice."""
SMALL_BYTES = 1 << 20
"""The last slab is rounded up once no more than this is left."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor begins."""

    slab: int
    start: int
    """In bytes."""


def aligned(size: int) -> int:
    """Bytes that a tensor takes up, with what is left free behind it."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plan_slabs(sizes: Sequence[int]) -> tuple[list[int], list[Place]]:
    """Lay tensors out: the largest first, each where it still fits.

    Args:
        sizes: of the tensors, in bytes.

    Returns:
        The sizes of the slabs in bytes, and the place of each tensor.
    """
    left = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    places = [Place(0, 0)] * len(sizes)
    slabs: list[int] = []
    while left:
        slab, used, later = _slab_for([aligned(sizes[number]) for number in left]), 0, []
        for number in left:
            if used + aligned(sizes[number]) <= slab:
                places[number] = Place(len(slabs), used)
                used += aligned(sizes[number])
            else:
                later.append(number)
        slabs.append(slab)
        left = later
    return slabs, places


def _slab_for(sizes: Sequence[int]) -> int:
    """Bytes of the next slab, for tensors that are not placed yet, the largest first: the largest power of two in their sum."""
    total = sum(sizes)
    if total <= SMALL_BYTES:
        return _power_of_two(max(total, ALIGNMENT_BYTES))
    within = 1 << (total.bit_length() - 1)
    return max(min(within, LARGEST_BYTES), _power_of_two(sizes[0]))


def _power_of_two(size: int) -> int:
    """The least that is not below a size."""
    return 1 << (size - 1).bit_length()


def allocate(size: int, *, is_pinned: bool, folder: Path | None = None) -> Tensor:
    """Get a slab: bytes in main memory, or in a file that main memory shows a window of.

    Args:
        is_pinned: whether the accelerator reads it by itself, while the process goes on.
        folder: where the file is made; its name is taken away at once where the system allows it, so that nothing is left behind.

    Raises:
        MemoryLimitError: there is not so much.
    """
    try:
        if folder is None:
            return torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        return _in_file(size, folder)
    except (RuntimeError, OSError) as error:
        what = "disk" if folder else "pinned main memory" if is_pinned else "main memory"
        raise MemoryLimitError(
            f"there are no {size / 1e6:.0f} MB of {what} for weights that wait there: {str(error).splitlines()[0]}",
            hint="Let fewer blocks wait (blocks_to_swap, max_resident_weights), or quantise them with base_model_precision.",
        ) from error


def _in_file(size: int, folder: Path) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="weights-", suffix=".bin", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is found out now, and not by a crash when pages are written
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(handle)
        if os.name == "posix":
            os.unlink(name)
