"""Tensors without numbers: whatever is computed meanwhile has shapes, dtypes and the memory that it would take, and takes none.

PyTorch has them as fake tensors. Networks ask a few small whole numbers of their input, such as how many tokens a mask hides; these numbers,
and what follows from them alone, are kept beside the shapes, so that such questions have an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from simpletuner.memory.quantisers.quantiser import Quantiser
from simpletuner.memory.tracker import tensors_in

KEPT_DTYPES = (torch.bool, torch.int32, torch.int64)
"""Of what counts, and not of weights in few bits."""
LARGEST_KEPT = 100_000
"""Numbers in a tensor whose values are still kept: some hundred thousand tokens."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Have tensors without numbers made meanwhile. What stands on the meta device stands on the CPU, which knows more operations."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _KeepingNumbers(fake):
        yield


class _KeepingNumbers(TorchDispatchMode):
    """Between the program and the fake tensors: keeps what whole numbers and truth values there are."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._numbers = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # asked as often as all else together
            return function(*arguments)
        named = dict(named or {})
        if named.get("device") is not None and torch.device(named["device"]).type == "meta":
            named["device"] = torch.device("cpu")
        if function is torch.ops.aten._local_scalar_dense.default and self._of(arguments[0]) is not None:
            with unset_fake_temporarily():
                return self._of(arguments[0]).item()
        results = function(*arguments, **named)
        # PyTorch remembers what it made last by weak references, of which `Module.to` wants none.
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        made = list(tensors_in(results))
        if made and all(map(_is_kept, made)) and torch.Tag.nondeterministic_seeded not in function.tags:
            if all(self._of(tensor) is not None for tensor in tensors_in((arguments, named))):
                self._keep(function, arguments, named, made)
            else:
                for tensor in made:  # may have been written to
                    self._numbers.pop(tensor, None)
        return results

    def _of(self, tensor: Tensor) -> Any:
        """The tensor's numbers; None if they are not known."""
        return self._numbers.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _keep(self, function: Any, arguments: Any, named: Any, made: list[Tensor]) -> None:
        arguments, named = tree_map_only(Tensor, self._of, (arguments, named))
        with unset_fake_temporarily():
            results = function(*arguments, **named)
        for tensor, numbers in zip(made, tensors_in(results)):
            self._numbers[tensor] = numbers


def _is_kept(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.dtype in KEPT_DTYPES and tensor.numel() <= LARGEST_KEPT


class StandIn(Quantiser):
    """Takes the place of a library that is not installed, or cannot work on shapes: weights of so many bits, and the time of a layer's product."""

    def __init__(self, bits: float) -> None:
        super().__init__(f"{bits} bits")
        self._bits = bits

    def quantise(self, layer: nn.Linear) -> nn.Module:
        return _Packed(layer, self._bits)

    def pack(self, layer: nn.Module) -> Any:
        raise NotImplementedError

    def unpack(self, layer: nn.Linear, tensors: Any, note: str) -> nn.Module:
        raise NotImplementedError


class _Packed(nn.Linear):
    """A layer whose weight is bytes, of which it makes the plain weight when it multiplies, and once more on the way back."""

    def __init__(self, layer: nn.Linear, bits: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = torch.empty(int(layer.weight.numel() * bits / 8), 1, dtype=torch.uint8)  # a matrix, as a weight that can be streamed is
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.weight, self.bias, self.out_features)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient by x (..., I) alone: g W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.inputs = input.shape[-1]
        plain = torch.empty(outputs, input.shape[-1], dtype=input.dtype)  # (O, I)
        return nn.functional.linear(input, plain, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        plain = torch.empty(gradient.shape[-1], ctx.inputs, dtype=gradient.dtype)  # (O, I)
        return gradient @ plain, None, None, None
