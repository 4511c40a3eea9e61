"""Checkpoints behind the run: what one is made of is copied at its step, and a thread brings the copies to the disk while training goes on.

Where main memory has no room for copies, and where nothing is trained any more, a checkpoint is written between two steps.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from simpletuner.adapters.adapter import Content, Keep, Write, as_it_is
from simpletuner.console import Console
from simpletuner.memory.parts import parts_of
from simpletuner.memory.peaks import left_in_main
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.signals import StopRequest

MOST_OF_WHAT_IS_LEFT = 0.5
"""Of what nobody has of main memory, that copies may take: caches, validation and the files themselves want some, too."""


class GivenUp(Exception):
    """A second signal came while a checkpoint was written."""


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(
        self, checkpoints: CheckpointFolder, device: torch.device, console: Console, stop: StopRequest, on_saved: Callable[[Path], None] | None = None
    ) -> None:
        """
        Args:
            device: where what is saved is computed with.
            on_saved: is given each checkpoint's folder once it has its name, by the thread that wrote it; no other is written until it returns.
        """
        self._checkpoints, self._device, self._console, self._stop, self._on_saved = checkpoints, device, console, stop, on_saved
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: futures.Future[None] | None = None
        self._saved: int | None = None
        self._bytes: int | None = None
        """Of copies of all that is saved, which is as much at each step; None before it was counted."""
        self._has_pinned = False

    def save(self, step: int, content: Callable[[Keep], Sequence[Write]], *, is_last: bool = False) -> None:
        """Begin the checkpoint of a step, unless it was made already. Waits for the one before.

        Args:
            content: takes what is to be written through a function that keeps it, and gives what writes that.
            is_last: write it now, since nothing is to go on meanwhile.

        Raises:
            OSError: this one or the one before cannot be written.
        """
        self.finish()
        if step == self._saved:
            return
        if is_last or not self._has_room(content):
            try:
                self._write(step, content(as_it_is))
            except GivenUp as given_up:
                raise self._stop.at_once() from given_up
            return
        copies = Copies(self._device)
        parts = content(copies)
        self._has_pinned = self._device.type == "cuda"
        self._under_way = self._thread.submit(self._write, step, [copies.wait, *parts])

    def check(self) -> None:
        """Raise what the last checkpoint failed with, if that is known by now. Waits for nothing."""
        if self._under_way is not None and self._under_way.done():
            self.finish()

    def settle(self) -> None:
        """Wait until nothing is written any more."""
        if self._under_way is not None:
            futures.wait([self._under_way])

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is there, and raise what it failed with."""
        self.settle()
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let nobody leave the body, in whatever way, before what was begun is finished; a second signal alone has it given up."""
        try:
            yield
            self.finish()
        except BaseException:
            try:
                self.finish()
            except GivenUp:
                pass
            except Exception as failure:  # what the run ends with matters more, and this is not to be lost either
                self._console.warn(f"the last checkpoint was not written: {failure}")
            raise
        finally:
            self._thread.shutdown()

    def go_on(self) -> None:
        """Ask, while a checkpoint is written, whether it is still wanted.

        Raises:
            GivenUp: it is not.
        """
        if self._stop.is_urgent:
            raise GivenUp

    def _write(self, step: int, parts: Sequence[Write]) -> None:
        def fill(folder: Path) -> None:
            for part in parts:
                self.go_on()
                part(folder)

        checkpoint = self._checkpoints.save(step, fill, self.go_on)
        self._saved = step
        if self._on_saved is not None:
            self._on_saved(checkpoint.folder)

    def _has_room(self, content: Callable[[Keep], Sequence[Write]]) -> bool:
        """Whether copies leave enough of main memory; says it where they do not."""
        if self._bytes is None:
            count = Count(is_rounded=self._device.type == "cuda")
            content(count)
            self._bytes = count.bytes
        left = left_in_main()
        if left is None or self._has_pinned or self._bytes <= left * MOST_OF_WHAT_IS_LEFT:  # what was pinned once stays so, for the next copies
            return True
        self._console.warn(
            f"training waits while checkpoints are written: copies of what is saved would take {self._bytes / 1e9:.1f} GB, "
            f"more than half of what main memory has left"
        )
        return False


class Count:
    """Keeps nothing, and counts what copies would take."""

    def __init__(self, *, is_rounded: bool) -> None:
        """
        Args:
            is_rounded: whether each tensor takes a power of two, as PyTorch's page-locked memory does.
        """
        self.bytes = 0
        self._is_rounded = is_rounded

    def __call__(self, content: Content) -> Content:
        for tensor in {id(one): one for one in tensors_in(content)}.values():
            sizes = [part.numel() * part.element_size() for part in parts_of(tensor)]
            self.bytes += sum(1 << max(0, size - 1).bit_length() for size in sizes) if self._is_rounded else sum(sizes)
        return content


class Copies:
    """Copies tensors to main memory, at once as the host sees it. What is saved of copies has the bytes that it would have of the originals.

    From a card they come by themselves, in the order of its work: what changes a tensor later waits there for the copy, and the host for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def __call__(self, content: Content) -> Content:
        tensors = list({id(one): one for one in tensors_in(content)}.values())
        owners = Counter(one.untyped_storage()._cdata for one in tensors if type(one) is Tensor)
        memo: dict[int, Any] = {}
        read: list[Tensor] = []  # kept to the end, so that no other tensor gets the identity of one
        for tensor in tensors:
            if hasattr(tensor, "__tensor_flatten__") or _is_whole(tensor, owners):
                self._copy(tensor, memo, read)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))
        return copy.deepcopy(content, memo)  # which copies what else there is: views of one storage, say, as views of one copy

    def wait(self, folder: Path) -> None:
        """Wait until the copies hold what they are to hold; the first thing that is done to fill a folder."""
        if self._event is not None:
            self._event.synchronize()

    def _copy(self, tensor: Tensor, memo: dict[int, Any], read: list[Tensor]) -> Tensor:
        if id(tensor) in memo:
            found: Tensor = memo[id(tensor)]
            return found
        kind: Any = type(tensor)
        if hasattr(tensor, "__tensor_flatten__"):  # state in 8 bits, with its scales
            names, context = tensor.__tensor_flatten__()
            inner = {name: self._copy(getattr(tensor, name), memo, read) for name in names}
            made = kind.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
        elif tensor.device.type == "cuda":
            made = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
        else:
            made = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = made
        read.append(tensor)
        return made


def _is_whole(tensor: Tensor, owners: Mapping[int, int]) -> bool:
    """Whether a copy of a plain tensor's numbers is a copy of all that would be saved of it."""
    if type(tensor) is not Tensor or tensor.requires_grad or vars(tensor):
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() == tensor.numel() * tensor.element_size() and owners[storage._cdata] == 1


def tensors_in(content: object) -> Iterator[Tensor]:
    """All tensors in dictionaries, lists and tuples, however deep."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from tensors_in(value)


class _Asking:
    """A file that asks before each write whether to go on."""

    def __init__(self, file: BinaryIO, go_on: Callable[[], None]) -> None:
        self._file, self._go_on = file, go_on

    def write(self, data: Any) -> int:
        self._go_on()
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_torch(content: object, path: Path, go_on: Callable[[], None]) -> None:
    """Write through Python's own file, whose errors say what is wrong; torch's writer hides a full disk."""
    with path.open("wb") as file:
        asking: Any = _Asking(file, go_on)
        try:
            torch.save(content, asking)
        except RuntimeError:  # in which torch wraps whatever a write raises
            go_on()
            raise
