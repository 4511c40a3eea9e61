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


def _is_among(address: int, given: Any) -> bool:
    return any(address == tensor.untyped_storage()._cdata for tensor in tensors_in(given))


class _Mark(weakref.ref[torch.UntypedStorage]):
    """A storage that may be gone, and its address."""

    __slots__ = ("address",)
    address: int


class Tracker(TorchDispatchMode):
    """While it is entered, operations are watched; what was made before is counted once it is named."""

    def __init__(self, *, without: str | None = None) -> None:
        """
        Args:
            without: the type of a device whose tensors are not counted: "meta" among real ones, where nothing stands behind them.
        """
        super().__init__()
        self._without = without
        self.bytes: Counter[str] = Counter()
        """Of each kind, now."""
        self.at_peak: Mapping[str, int] = {}
        """The same when there were most of them, those in main memory left aside."""
        self.now = self.peak = self.host_peak = 0
        """Bytes on the device now and at most, and the most in main memory."""
        self._kind = WORK
        self._known: dict[int, tuple[str, int, _Mark]] = {}
        """Kind and bytes of each storage, by its address, and what tells its end."""
        self._new: dict[Any, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile; what would see to that takes longer than all this

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of what kind these tensors are, whether they were seen to be made or not."""
        for tensor in tensors:
            for part in parts_of(tensor):
                self._count(part.untyped_storage(), kind)

    def rename(self, old: str, new: str) -> None:
        """Have all of a kind be of another from now on."""
        self._known = {address: (new if kind == old else kind, size, mark) for address, (kind, size, mark) in self._known.items()}
        self.bytes[new] += self.bytes.pop(old, 0)

    def add(self, size: int, kind: str) -> None:
        """Count bytes that no tensor stands for."""
        self._grow(kind, size)
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
        if types and any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others: it first says what it does with those
        results = function(*arguments, **(named or {}))
        for tensor in (results,) if type(results) is Tensor else tensors_in(results):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._known and (self._gives_new(function) or not _is_among(address, (arguments, named))):
                self._count(storage, self._kind)
        return results

    def _gives_new(self, function: Any) -> bool:
        """Whether what an operation answers is never what it was given."""
        if function not in self._new:
            says_so = all(result.alias_info is None for result in function._schema.returns)
            self._new[function] = says_so and function is not torch.ops.aten._unsafe_view.default  # which is a view
        return self._new[function]

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        if self._without is not None and storage.device.type == self._without:
            return
        address = storage._cdata
        before = self._known.get(address)
        if before is None:
            size = storage.nbytes()
            mark = _Mark(storage, self._forget)  # a storage's Python object lives as long as the storage itself
            mark.address = address
        else:
            was, size, mark = before
            self._grow(was, -size)
        self._known[address] = kind, size, mark
        self.add(size, kind)

    def _forget(self, mark: _Mark) -> None:
        kind, size, _ = self._known.pop(mark.address)
        self._grow(kind, -size)

    def _grow(self, kind: str, size: int) -> None:
        self.bytes[kind] += size
        if kind != HOST:
            self.now += size

    def _compare(self) -> None:
        self.host_peak = max(self.host_peak, self.bytes[HOST])
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, {kind: size for kind, size in self.bytes.items() if size and kind != HOST}
