"""Compiled blocks: the repeated blocks of a denoiser run as PyTorch's compiler makes them, while they train.

A block's `forward` is replaced, and nothing else: hooks, checkpoints and the ring of offloaded blocks stay outside, and weights keep their names.
Equal blocks share one graph. Where no gradient is wanted, as in pictures, evaluation and rollouts, a block computes as it always did: there
adapters are switched off and on, and each way would be compiled anew.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from simpletuner.memory.offload import repeated_blocks

MOST_GRAPHS = 64
"""Of one kind of block: one for each size of picture where sizes are compiled one by one."""
Forward = Callable[..., Any]


def no_other_cause(error: Exception) -> None:
    """For a compiler that is to blame for each of its errors."""


class Compiler:
    """Compiles blocks, and gives up on those kinds of them that it cannot."""

    def __init__(
        self,
        backend: str,
        warn: Callable[[str], object],
        *,
        mode: str = "default",
        is_dynamic: bool = True,
        memory_budget: float = 1.0,
        raise_other_cause: Callable[[Exception], None] = no_other_cause,
    ) -> None:
        """
        Args:
            backend: inductor, or another that torch.compile knows.
            warn: is told why a kind of block is not compiled.
            is_dynamic: whether one graph serves all sizes of pictures and captions.
            memory_budget: share of the activations that are kept, of those that the compiler would keep; above 0, where it would draw anew
                what dropouts drew.
            raise_other_cause: raises if an error in the compiler's words has another cause, such as a signal or too little memory.
        """
        self._backend, self._warn, self._mode, self.is_dynamic = backend, warn, mode, is_dynamic
        self._memory_budget, self._raise_other_cause = memory_budget, raise_other_cause
        self.failed: set[type[nn.Module]] = set()

    def attach(self, denoiser: nn.Module) -> Sequence[CompiledForward]:
        """Have the blocks of a denoiser computed by what is compiled. Nothing is compiled before it is first called.

        Args:
            denoiser: with its adapter.
        """
        # Settings of the process: PyTorch reads them when a graph is missing, and newer releases alone take some of them as arguments.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
        torch._functorch.config.activation_memory_budget = self._memory_budget
        again = self._compiled(_compute_again)
        found = []
        for block in repeated_blocks(denoiser).values():
            inner = _apart(block.forward) if _is_wrapped(block) else block.forward
            forward = CompiledForward(self, block, inner, self._compiled(inner), again)
            block.forward = forward
            found.append(forward)
        return found

    def give_up(self, kind: type[nn.Module], error: Exception) -> None:
        """Have blocks of this kind compute as they did before, and say why; unless the compiler is not to blame, which is raised."""
        self._raise_other_cause(error)
        if kind not in self.failed:
            self.failed.add(kind)
            self._warn(f"{kind.__name__} is not compiled and trains as it did before: {reason(error)}")

    def _compiled(self, function: Forward) -> Forward:
        settings: dict[str, Any] = {"dynamic": None if self.is_dynamic else False, "fullgraph": True, "backend": self._backend}
        if self._backend == "inductor":
            # Dropouts then draw what they draw without a compiler.
            settings["options"] = {**torch._inductor.list_mode_options(self._mode, None), "fallback_random": True}
        compiled: Forward = torch.compile(function, **settings)
        return compiled


class CompiledForward:
    """Stands in for the `forward` of one block."""

    def __init__(self, compiler: Compiler, block: nn.Module, inner: Forward, compiled: Forward, again: Forward) -> None:
        """
        Args:
            inner: what is compiled of the block.
            compiled: what it becomes.
            again: a compiled checkpoint.
        """
        self._compiler, self._block, self._inner, self._compiled, self._again = compiler, block, inner, compiled, again
        self.plain: Forward = block.forward
        """The block's own."""
        self.contexts: Callable[[], Any] | None = None
        """Of a selective checkpoint, which is then part of what is compiled: outside it could not see the operations in there."""

    @property
    def kind(self) -> type[nn.Module]:
        return type(self._block)

    @property
    def is_on(self) -> bool:
        """Whether what is compiled is used now."""
        return self._block.training and torch.is_grad_enabled() and self.kind not in self._compiler.failed

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.is_on:
            return self.plain(*arguments, **named)
        if self._compiler.is_dynamic:
            _mark_sizes((arguments, named))
        try:
            if self.contexts is None:
                return self._compiled(*arguments, **named)
            return self._again(self._inner, self.contexts, arguments, named)
        except torch._dynamo.exc.TorchDynamoException as error:  # of the compiler, inductor's included; not what a block itself raises
            self._compiler.give_up(self.kind, error)
        if self.contexts is None:
            return self.plain(*arguments, **named)
        return _compute_again(self.plain, self.contexts, arguments, named)


def _is_wrapped(block: nn.Module) -> bool:
    """Whether a block has weights that are tensors made of others, as quanto and torchao hold them."""
    return any(is_traceable_wrapper_subclass(parameter) for parameter in block.parameters())


def _apart(forward: Forward) -> Forward:
    """Have several answers be tensors of their own. With such weights PyTorch compiles nothing that gives two parts of one, as Flux's blocks do."""

    def answer(*arguments: Any, **named: Any) -> Any:
        found = forward(*arguments, **named)
        return tuple(one.clone() if isinstance(one, Tensor) else one for one in found) if isinstance(found, tuple) else found

    return answer


def _compute_again(forward: Forward, contexts: Callable[[], Any], arguments: Any, named: Any) -> Any:
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)


def _mark_sizes(arguments: Any) -> None:
    """Say which axes change from batch to batch: all but the last, which are features; of masks the last one as well."""
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor):
            has_features = tensor.is_floating_point() and tensor.dim() < 4
            for axis in range(tensor.dim() - has_features):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)


def reason(error: Exception) -> str:
    """The first line of an error that says something, without a stack."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)


def missing_for(device: torch.device) -> str | None:
    """What PyTorch's compiler lacks on this machine, in words; None if nothing is known to be missing."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what PyTorch calls
        return None if shutil.which(compiler) or sys.platform == "win32" else f"no C++ compiler is here ({compiler})"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if any(shutil.which(name) for name in ("gcc", "clang", "cc")) else "no C compiler is here (gcc or clang), which triton needs"
