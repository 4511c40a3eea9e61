"""Autocast for tensors without numbers, of which PyTorch's own takes no notice.

The tables are those of PyTorch (ATen/autocast_mode.h, torch 2.13), as far as networks and losses use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# fmt: off
NARROW = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm", "addmv", "addr", "matmul",
    "__matmul__", "__rmatmul__", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_attention",
))
"""What is computed in the narrow dtype."""
WIDE = frozenset((
    "exp", "log", "pow", "__pow__", "reciprocal", "rsqrt", "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "interpolate", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "norm", "sum",
))
"""What a card computes in float32; a CPU leaves it as it comes."""
# fmt: on


@contextmanager
def casting(device: str) -> Iterator[None]:
    """Have autocast for the CPU, wherever it is on meanwhile, cast tensors on the meta device as it would on a device.

    Args:
        device: its type.
    """
    cast, clear = _Casting(WIDE if device == "cuda" else frozenset()), torch.clear_autocast_cache

    def clear_both() -> None:
        clear()
        cast.cache.clear()

    torch.clear_autocast_cache = clear_both
    try:
        with cast:
            yield
    finally:
        torch.clear_autocast_cache = clear


class _Casting(TorchFunctionMode):
    def __init__(self, wide: frozenset[str]) -> None:
        super().__init__()
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        """Of trained tensors, by their ids, those and what was made of them: they are cast once in an outermost autocast."""
        self._wide = wide

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is Tensor.backward:  # in which blocks are computed again: this must be on meanwhile, where PyTorch's own function takes it off
            (loss,) = arguments
            run = torch.autograd.Variable._execution_engine.run_backward
            with self:
                return run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if torch.is_autocast_enabled("cpu"):
            name = getattr(function, "__name__", "").split(".")[0]
            if name in NARROW:
                arguments, named = tree_map_only(Tensor, self._narrowed, (arguments, named))
            elif name in self._wide:
                arguments, named = tree_map_only(Tensor, _widened, (arguments, named))
        return function(*arguments, **(named or {}))

    def _narrowed(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf and tensor.dtype == torch.float32):
            return tensor.to(dtype)
        if id(tensor) not in self.cache:
            self.cache[id(tensor)] = tensor, tensor.to(dtype)
        return self.cache[id(tensor)][1]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
