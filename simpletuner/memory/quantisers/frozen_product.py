"""The product with a frozen weight of few bits: nothing but these few bits is kept for the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Plain = Callable[[Tensor], Tensor]
"""A weight of few bits to the weight (O, I) that it stands for."""


def frozen_product(input: Tensor, weight: Tensor, bias: Tensor | None, plain: Plain, multiply: Callable[..., Tensor] | None = None) -> Tensor:
    """x W^T + b, (..., I) to (..., O), with a gradient by x alone: g W.

    Args:
        plain: is called on the way back, and on the way there unless `multiply` is given.
        multiply: of input, weight and bias, for weights that a library multiplies with as they are.
    """
    product: Tensor = _FrozenProduct.apply(input, weight, bias, plain, multiply)
    return product


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plain: Plain, multiply: Callable[..., Tensor] | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.plain = plain
        if multiply is not None:
            return multiply(input, weight, bias)
        return nn.functional.linear(input, plain(weight).to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        return grad @ ctx.plain(weight).to(grad.dtype), None, None, None, None
