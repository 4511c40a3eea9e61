"""An encoder that is called on many items at once, fewer when memory runs out, and answers item by item."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from simpletuner.errors import MemoryLimitError

Items = TypeVar("Items", Tensor, Sequence[str])
Row = dict[str, Tensor]
"""What an encoder makes of one item: tensors by name, without a batch axis."""


class RowEncoder(Generic[Items]):
    """An encoder with the number of items that it is known to take at once."""

    def __init__(
        self, encode: Callable[[Items], Mapping[str, Tensor]], batch_size: int, warn: Callable[[str], None], *, noun: str, option: str, hint: str
    ) -> None:
        """
        Args:
            encode: B items to tensors whose first axis is B.
            batch_size: items at once; halved for good when memory runs out, which `warn` is told.
            noun: what many items are called.
            option: the batch size's name as the user types it.
            hint: what to do when not even one item fits.
        """
        self.batch_size = batch_size
        self._encode: Callable[[Items], Mapping[str, Tensor]] = encode
        self._warn, self._noun, self._option, self._hint = warn, noun, option, hint

    def rows(self, items: Items) -> list[Row]:
        """Encode items in their order; the answers come to the CPU.

        Raises:
            MemoryLimitError: one item alone is too much.
        """
        rows: list[Row] = []
        while len(rows) < len(items):
            part = items[len(rows) : len(rows) + self.batch_size]
            encoded = self._try(part)
            if encoded is None:
                self._shrink(len(part))
                continue
            assert all(len(tensor) == len(part) for tensor in encoded.values()), "an encoder answers one row an item"
            arrived = {name: tensor.detach().cpu() for name, tensor in encoded.items()}
            rows += [{name: tensor[index] for name, tensor in arrived.items()} for index in range(len(part))]
        return rows

    def _try(self, part: Items) -> Mapping[str, Tensor] | None:
        """Encode, or give None if memory ran out. The error ends here: its traceback would hold on to the tensors."""
        try:
            return self._encode(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _shrink(self, count: int) -> None:
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        if self.batch_size == 1:
            raise MemoryLimitError(f"memory ran out while {self._noun} were encoded, with {self._option} 1", hint=self._hint)
        self.batch_size = max(1, min(count, self.batch_size) // 2)
        self._warn(f"memory ran out with {count} {self._noun} encoded at once; going on with {self._option} {self.batch_size}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory: torch has a class for accelerators, and only words for the rest."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # the last is cuBLAS's and cuDNN's
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def is_finite(row: Row) -> bool:
    """Whether no number of a row is infinite or NaN, as overflows in float16 are."""
    return all(bool(tensor.isfinite().all()) for tensor in row.values() if tensor.is_floating_point())
