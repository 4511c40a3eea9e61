"""Counts the bytes that tensors hold, as they are made and let go of, by what they are: on real tensors and on those that are shapes alone.

A storage is counted once, however many tensors look at it, from the operation that made it until nobody holds it any more. What a kernel takes
for itself and gives back before it answers is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.memory.parts import parts_of

WORK = "work"
"""What nobody has named: activations, and what operations hand to each other."""
HOST = "host"
"""What waits in main memory. It is counted apart."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors among an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if item is not None:
                yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


class Tracker(TorchDispatchMode):
    """While it is entered, operations are watched; what was made before is counted once it is named."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        """Of each kind, now."""
        self.at_peak: Mapping[str, int] = {}
        """The same when there were most of them, those in main memory left aside."""
        self.peak = self.host_peak = 0
        self._kind = WORK
        self._known: dict[int, tuple[str, int]] = {}
        """Kind and bytes of each storage, by its address."""

    @property
    def now(self) -> int:
        """Bytes on the device."""
        return self.bytes.total() - self.bytes[HOST]

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of what kind these tensors are, whether they were seen to be made or not."""
        for tensor in tensors:
            for part in parts_of(tensor):
                self._count(part.untyped_storage(), kind)

    def rename(self, old: str, new: str) -> None:
        """Have all of a kind be of another from now on."""
        self._known = {address: (new if kind == old else kind, size) for address, (kind, size) in self._known.items()}
        self.bytes[new] += self.bytes.pop(old, 0)

    def add(self, size: int, kind: str) -> None:
        """Count bytes that no tensor stands for."""
        self.bytes[kind] += size
        self._compare()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.host_peak = 0
        self._compare()

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Have what is made meanwhile be of a kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy that counts as one in main memory, wherever it is."""
        with self.making(HOST):
            return tensor.clone()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.prim.device.default:
            return function(*arguments)
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others: it first says what it does with those
        results = function(*arguments, **(named or {}))
        for tensor in tensors_in(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and not any(
                storage._cdata == one.untyped_storage()._cdata for one in tensors_in((arguments, named))
            ):
                self._count(storage, self._kind)
        return results

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        address = storage._cdata
        before = self._known.get(address)
        if before is None:
            size = storage.nbytes()
            # A storage's Python object lives as long as the storage itself.
            weakref.finalize(storage, self._forget, address).atexit = False
        else:
            size = before[1]
            self.bytes[before[0]] -= size
        self._known[address] = kind, size
        self.add(size, kind)

    def _forget(self, address: int) -> None:
        kind, size = self._known.pop(address)
        self.bytes[kind] -= size

    def _compare(self) -> None:
        self.host_peak = max(self.host_peak, self.bytes[HOST])
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, {kind: size for kind, size in self.bytes.items() if size and kind != HOST}
