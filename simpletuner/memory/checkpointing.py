"""Gradient checkpointing: of which blocks the activations are computed again on the way back, and where the blocks' inputs wait for that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from simpletuner.memory.compiling import CompiledForward

if TYPE_CHECKING:
    from simpletuner.options.memory import Memory

ATTENTION_WORDS = ("attention", "attn")
"""Of these one is in the name of every kernel that computes attention: PyTorch's, and those of packages."""


def enable_checkpointing(denoiser: nn.Module, options: Memory, copy: Callable[[Tensor], Tensor] | None = None) -> None:
    """Have a denoiser of diffusers compute its blocks as the options say; nothing if they ask for no checkpointing.

    Args:
        copy: as `InHostMemory` takes it.
    """
    if not options.gradient_checkpointing:
        return
    interval = options.gradient_checkpointing_interval or 1
    blocks = Recomputed(
        taken=interval,
        of=options.gradient_checkpointing_segment_stride or interval,
        keeps_attention=options.gradient_checkpointing_backend == "selective",
        waiting=InHostMemory(options.gradient_checkpointing_offload_bytes, copy) if options.gradient_checkpointing_backend == "offload" else None,
    )
    denoiser.enable_gradient_checkpointing(blocks)  # type: ignore[operator]


class InHostMemory:
    """Keeps large tensors that autograd saves in main memory until the backward pass asks for them."""

    def __init__(self, least_bytes: int, copy: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Args:
            least_bytes: smaller ones stay where they are.
            copy: a tensor to what it waits as; into pinned memory without waiting, by default.
        """
        self._least_bytes, self._copy = least_bytes, copy or to_host

    def hooks(self) -> AbstractContextManager[None]:
        return saved_tensors_hooks(self._put_away, self._bring_back)

    def _put_away(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        is_large = tensor.numel() * tensor.element_size() >= self._least_bytes
        return tensor.device, self._copy(tensor) if is_large else tensor

    def _bring_back(self, kept: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; the tensor itself if it is there already. The stream of the device keeps copies and later uses in order."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


class Recomputed:
    """What models of diffusers call for each block, in place of the block, when activations are not to be kept.

    Blocks are counted as they are first met, which is their order: of every `of` of them the first `taken` are computed again, each by
    itself. The others keep their activations. Dropouts draw the same the second time.
    """

    def __init__(self, taken: int = 1, of: int = 1, keeps_attention: bool = False, waiting: InHostMemory | None = None) -> None:
        """
        Args:
            keeps_attention: whether the answers of attention, which are small and dear, are kept.
            waiting: where the inputs of blocks wait; None is where they are.
        """
        self._taken, self._of, self._waiting, self._keeps_attention = taken, of, waiting, keeps_attention
        self._contexts: Callable[[], Any] = partial(create_selective_checkpoint_contexts, _KeepAttention()) if keeps_attention else noop_context_fn
        self._numbers: dict[nn.Module, int] = {}

    def __call__(self, block: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if not self._is_taken(block):
            return block(*arguments, **named)
        compiled = vars(block).get("forward") if isinstance(block, nn.Module) else None
        if self._keeps_attention and isinstance(compiled, CompiledForward) and compiled.is_on:
            compiled.contexts = self._contexts
            return block(*arguments, **named)
        with self._waiting.hooks() if self._waiting is not None else nullcontext():  # outside of the checkpoint, these get its inputs alone
            return checkpoint(block, *arguments, use_reentrant=False, context_fn=self._contexts, **named)

    def _is_taken(self, block: Callable[..., Any]) -> bool:
        if not isinstance(block, nn.Module):
            return True
        return self._numbers.setdefault(block, len(self._numbers)) % self._of < self._taken


class _KeepAttention:
    """Says of each operation in a block whether its answer is kept."""

    def __init__(self) -> None:
        self._policies: dict[Any, CheckpointPolicy] = {}

    def __call__(self, context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        policy = self._policies.get(operation)
        if policy is None:
            is_attention = any(word in str(operation) for word in ATTENTION_WORDS)
            policy = self._policies[operation] = CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
        return policy
