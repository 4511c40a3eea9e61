"""Frozen blocks that wait in main memory and are copied to the accelerator while others compute; nothing is ever copied back.

Four hooks a block: before its forward pass its weights are fetched, after it they may be let go, and the same on the way back, where the weights
are read once more. Which block comes next is known from the pass before, so that it is on its way already.

Each block has a storage of its own on the accelerator, which is emptied and filled again, always with the same bytes. Whatever autograd, or a
kernel's own backward pass (that of bitsandbytes' keeps the weight where autograd does not see it), refers to since the forward pass therefore
finds either the block's weights or no memory at all, but never another block's. Fully sharded training of PyTorch does it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Weight:
    """A weight of a streamed block."""

    module: nn.Module
    name: str
    host: nn.Parameter
    """Where it rests, in main memory."""
    device: nn.Parameter
    """Where it computes; without memory while the block is not there."""

    def show(self, parameter: nn.Parameter) -> None:
        """Let the module have one of the two."""
        self.module._parameters[self.name] = parameter


@dataclass(slots=True, eq=False)
class Block:
    """A block whose weights are streamed."""

    name: str
    module: nn.Module
    weights: Sequence[Weight]
    sources: Sequence[Tensor]
    """Bytes in main memory, tensor by tensor."""
    starts: Sequence[int]
    """Where each of them begins on the accelerator, in bytes."""
    memory: Tensor
    """All bytes of the block on the accelerator. It counts its own versions: filling it again is no change of the weights."""
    copied: Any = None
    """The event after which a copy under way is done."""

    @property
    def bytes(self) -> int:
        """Bytes of its weights."""
        return sum(source.numel() for source in self.sources)


class Lane:
    """How blocks come to a device: here at once, before anything else is done."""

    @torch.no_grad()
    def fill(self, block: Block, size: int) -> None:
        """Give a block its memory, of `size` bytes, and begin to copy its weights into it."""
        block.memory.untyped_storage().resize_(size)
        for source, start in zip(block.sources, block.starts):
            block.memory[start : start + source.numel()].copy_(source, non_blocking=True)

    def wait(self, block: Block) -> None:
        """Have what is computed from now on wait for the copy."""

    def empty(self, block: Block) -> None:
        """Take a block's memory away, once what has been asked for so far is computed."""
        block.memory.untyped_storage().resize_(0)


class CudaLane(Lane):
    """Copies on a stream of its own. The memory is that stream's too, so that the allocator gives what one block left to the next at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def fill(self, block: Block, size: int) -> None:
        with torch.cuda.stream(self._stream):
            super().fill(block, size)
            block.copied = self._stream.record_event()

    def wait(self, block: Block) -> None:
        torch.cuda.current_stream(self._device).wait_event(block.copied)

    def empty(self, block: Block) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # later copies, into the same memory, come after what still reads it
        super().empty(block)


class Ring:
    """Decides which blocks are on the accelerator: those that compute, and as many of the next as there is room for."""

    def __init__(self, denoiser: nn.Module, blocks: Sequence[Block], room: int, lane: Lane) -> None:
        """
        Args:
            denoiser: holds the blocks; its forward pass is what a pass is.
            blocks: without memory on the accelerator. Called in this order, as far as is known before the first pass.
            room: blocks on the accelerator at a time; 2 let one come while another computes.
        """
        self.blocks, self.room = tuple(blocks), room
        self.place_bytes = max(block.memory.numel() for block in blocks)
        """Bytes of each block's place: all alike, so that each fits where another was."""
        self.peak_blocks = 0
        """The most blocks that were on the accelerator at a time. Above `room` only where several are computed again as one, and by one where
        checkpoints are of the older, reentrant kind."""
        self._lane = lane
        self._order = list(blocks)
        self._met: list[Block] = []
        self._runs = self._returns = False
        """Whether the denoiser's forward pass is under way, and whether it is one that gradients come back through."""
        self._calls = 0
        self._last_call = dict.fromkeys(blocks, 0)
        self._loaded: list[Block] = []
        self._held: dict[Block, int] = {}
        """Blocks that compute, to the number of the call that they do it for."""
        self._hooks = [denoiser.register_forward_pre_hook(self._begin), denoiser.register_forward_hook(self._end, always_call=True)]
        for block in blocks:
            self._hooks.append(block.module.register_forward_pre_hook(partial(self._before_forward, block), with_kwargs=True))
            self._hooks.append(block.module.register_forward_hook(partial(self._after_forward, block), with_kwargs=True))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the blocks that are on the accelerator, or on their way there."""
        return tuple(block.name for block in self._loaded)

    @property
    def resident_bytes(self) -> int:
        """Bytes of their places."""
        return len(self._loaded) * self.place_bytes

    def close(self) -> None:
        """Take all blocks off the accelerator, and leave the denoiser alone."""
        for hook in self._hooks:
            hook.remove()
        for block in list(self._held):
            self._let_go(block)
        for block in list(self._loaded):
            self._unload(block)

    # A pass of the whole denoiser.

    def _begin(self, denoiser: nn.Module, arguments: Any) -> None:
        for block in list(self._held):  # a pass before this one broke off, or its first block has no input with a gradient to tell its end
            self._let_go(block)
        self._runs, self._returns, self._met = True, torch.is_grad_enabled(), []
        self._fetch(self._after(None))

    def _end(self, denoiser: nn.Module, arguments: Any, answer: Any) -> None:
        """Learn the order: that of U-Nets is not the order in which they list their blocks."""
        self._runs = False
        self._order = [*self._met, *(block for block in self._order if block not in self._met)]

    # A block's passes.

    def _before_forward(self, block: Block, module: nn.Module, arguments: Any, named: Any) -> None:
        if not self._runs:  # computed again, within the backward pass
            self._hold(block, self._held.get(block, self._last_call[block]))
            return
        self._calls += 1
        self._last_call[block] = self._calls
        if block not in self._met:
            self._met.append(block)
        self._hold(block, self._calls)
        self._fetch(self._after(block))
        if torch.is_grad_enabled():
            for tensor in _tensors((arguments, named)):
                # A leaf's gradient may be whole before the block is done; that of any other comes after all that was computed later than it.
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(partial(self._after_backward, block, self._calls))

    def _after_forward(self, block: Block, module: nn.Module, arguments: Any, named: Any, answer: Any) -> None:
        call = self._last_call[block]
        if torch.is_grad_enabled():
            given = {id(tensor) for tensor in _tensors((arguments, named))}
            for tensor in _tensors(answer):
                if tensor.requires_grad and id(tensor) not in given:
                    tensor.register_hook(partial(self._before_backward, block, call))
        if self._runs:  # one that is computed again is held until its backward pass is done
            self._let_go(block)
            self._fetch(self._after(block))

    def _before_backward(self, block: Block, call: int, gradient: Tensor) -> None:
        for other, later in list(self._held.items()):  # autograd goes back in the order of the calls: what came later is done
            if later > call:
                self._let_go(other)
        self._hold(block, call)
        self._fetch(self._before(block))

    def _after_backward(self, block: Block, call: int, gradient: Tensor) -> None:
        if self._held.get(block) == call:
            self._let_go(block)
            self._fetch(self._before(block))

    # Which blocks come next.

    def _after(self, block: Block | None) -> Iterable[Block]:
        """In a forward pass: the rest of it, and then the way back, or the next pass."""
        rest = self._order[0 if block is None else self._order.index(block) + 1 :]
        return [*rest, *(reversed(self._order) if self._returns else self._order)]

    def _before(self, block: Block) -> Iterable[Block]:
        """On the way back: the rest of it, and then the next pass."""
        return [*reversed(self._order[: self._order.index(block)]), *self._order]

    # What is where.

    def _hold(self, block: Block, call: int) -> None:
        """Have a block's weights where it computes."""
        if block not in self._loaded:
            for other in list(self._loaded):
                if len(self._loaded) >= self.room and other not in self._held:
                    self._unload(other)
            self._load(block)
        if block not in self._held:
            self._lane.wait(block)
            for weight in block.weights:
                weight.show(weight.device)
        self._held[block] = call

    def _let_go(self, block: Block) -> None:
        """A block has computed; its weights may stay, if they are needed again soon."""
        del self._held[block]
        for weight in block.weights:
            weight.show(weight.host)

    def _fetch(self, coming: Iterable[Block]) -> None:
        """Let blocks come in this order, as far as there is room, in place of those that come later."""
        wanted = [block for block in dict.fromkeys(coming) if block not in self._held][: max(0, self.room - len(self._held))]
        for block in list(self._loaded):
            if block not in self._held and block not in wanted:
                self._unload(block)
        for block in wanted:
            if block not in self._loaded:
                self._load(block)

    def _load(self, block: Block) -> None:
        self._lane.fill(block, self.place_bytes)
        self._loaded.append(block)
        self.peak_blocks = max(self.peak_blocks, len(self._loaded))

    def _unload(self, block: Block) -> None:
        self._lane.empty(block)
        self._loaded.remove(block)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors among arguments or answers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
