"""The product of a layer's inputs with what an adapter adds to its weight, from the factors of the change, which is never built.

The change is kron(A, U D): A (l, m) mixes the m groups of a layer's inputs into the l groups of its outputs, D (r, i) goes down to the rank and
U (o, r) up from it. LoKr with a whole second factor has no D, and U is (o, i); LoRA has no A, and m = l = 1. Inputs are contracted with the rank
first, then the groups are mixed, where a token is smallest, and the last product is added to the base's answer as it is made: nothing of the
outputs' size is read or written once more. For LoRA the same holds on the way back: its gradient to the inputs is added to the base's as it is made.

Letters: N tokens, m l groups of inputs and outputs, i o channels in each of them, r rank. I = m i, O = l o.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST_PRODUCTS = 65_535
"""Small products in one call: a CUDA grid has no more along its last axes, and kernels for more are not in every release of cuBLAS."""
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""A, D and U, in float32 and with the scale in A, or in U where there is no A. What is one factor instead of D and U is either of them."""


class QuickLora:
    """What a LoRA layer of PEFT gives; its `forward` takes the place of the layer's own.

    That one passes over the outputs once each for the product, the scale and the sum, there and back.
    """

    def __init__(self, layer: Any, name: str) -> None:
        """
        Args:
            layer: a Linear of PEFT, without variant, whose matrices are multiplied in the dtype of the inputs.
            name: of its one adapter.
        """
        self._layer, self._name = layer, name
        self._own: Callable[..., Tensor] = layer.forward

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        layer, name = self._layer, self._name
        dropout = layer.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if arguments or named or drops or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            return self._own(x, *arguments, **named)
        base, down, up = layer.base_layer, layer.lora_A[name].weight, times(layer.lora_B[name].weight, layer.scaling[name])
        return linear_and_product(base, x, down, up) if answers_plainly(base, x) else add_product(base(x), x, None, down, up)


def times(factor: Tensor, scale: float) -> Tensor:
    """A factor with a scale in it."""
    return factor if scale == 1 else factor * scale


def answers_plainly(layer: nn.Module, x: Tensor) -> bool:
    """Whether what a layer answers is the product with a frozen weight in the dtype of its inputs, and nothing else: nothing quantised, sharded,
    replaced or hooked."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight, bias = layer.weight, layer.bias
    is_cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # a plan's shapes know no autocast
    if type(weight) is not nn.Parameter or weight.dtype != x.dtype or is_cast:
        return False
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def linear_and_product(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What a frozen layer answers to x (..., I), and x (U D)^T added to it, as one operation."""
    answer: Tensor = _AddedProduct.apply(None, x, None, down, up, layer.weight, layer.bias)
    return answer


def add_product(base: Tensor, x: Tensor, mix: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """base + x kron(A, U D)^T, computed in the dtype of `base`; gradients of the factors are in their own.

    Args:
        base: (..., O).
        x: (..., I).
        mix: A (l, m), or none for one group.
        down: D (r, i), or none if `up` is (o, i).
        up: U (o, r), or none if `down` is (o, i).
    """
    added: Tensor = _AddedProduct.apply(base, x.to(base.dtype), mix, down, up, None, None)
    return added


class _AddedProduct(torch.autograd.Function):
    """Keeps x and, where there is a D, D x: plain autograd keeps the mixed groups and the cast factors too.

    Without `base` that is the product with `weight` and `bias`, for LoRA alone: for LoKr no gain of that could be measured.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | None,
        x: Tensor,
        mix: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        inner = x.reshape(-1, x.shape[-1] // (1 if mix is None else mix.shape[1]))  # (N m, i)
        if down is not None:
            inner = inner @ down.to(x.dtype).t()  # (N m, r)
        ctx.save_for_backward(x, None if down is None else inner, mix, down, up, weight)
        if base is None:
            assert weight is not None
            base = nn.functional.linear(x, weight, bias)
        # Not in place: a selective checkpoint may keep what the base answered.
        if up is not None:
            return torch.addmm(base.reshape(-1, up.shape[0]), _mixed(inner, mix), up.to(x.dtype).t()).view(base.shape)
        assert mix is not None
        by_token = inner.view(-1, mix.shape[1], inner.shape[1])
        groups = base.reshape(-1, mix.shape[0], inner.shape[1])
        return _by_token(mix.to(x.dtype).expand(len(by_token), -1, -1), by_token, groups).view(base.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, inner, mix, down, up, weight = ctx.saved_tensors
        grad = grads[0].contiguous()  # once, and not again by each product
        wants_base, wants_x, wants_mix, wants_down, wants_up, *_ = ctx.needs_input_grad
        lower = x.reshape(-1, x.shape[-1] // (1 if mix is None else mix.shape[1]))  # (N m, i)
        inner = lower if inner is None else inner
        grad_mixed = grad.view(-1, inner.shape[1] if up is None else up.shape[0])  # (N l, o)
        grad_up = (grad_mixed.t() @ _mixed(inner, mix)).to(up.dtype) if wants_up else None
        if up is not None:
            grad_mixed = grad_mixed @ up.to(x.dtype)  # (N l, r)
        grad_mix = _mix_gradient(grad_mixed, inner, mix) if wants_mix else None
        grad_down = grad_x = None
        if wants_down or wants_x:
            grad_inner = _mixed(grad_mixed, None if mix is None else mix.t())  # (N m, r)
            grad_down = (grad_inner.t() @ lower).to(down.dtype) if wants_down else None
            if wants_x and weight is not None:
                of_base = grad.view(-1, grad.shape[-1]) @ weight
                grad_x = of_base.addmm_(grad_inner, down.to(x.dtype)).view(x.shape)
            elif wants_x:
                grad_x = (grad_inner if down is None else grad_inner @ down.to(x.dtype)).view(x.shape)
        return grad if wants_base else None, grad_x, grad_mix, grad_down, grad_up, None, None


def _mixed(inner: Tensor, mix: Tensor | None) -> Tensor:
    """(N m, r) to (N l, r): a small product for each token, which needs no other order of axes."""
    if mix is None:
        return inner
    by_token = inner.view(-1, mix.shape[1], inner.shape[1])
    return _by_token(mix.to(inner.dtype).contiguous().expand(len(by_token), -1, -1), by_token).view(-1, inner.shape[1])


def _mix_gradient(grad_mixed: Tensor, inner: Tensor, mix: Tensor) -> Tensor:
    """The sum over tokens of (l, r) (r, m), in the dtype of `mix`."""
    outputs, inputs = mix.shape
    each = _by_token(grad_mixed.view(-1, outputs, inner.shape[1]), inner.view(-1, inputs, inner.shape[1]).transpose(1, 2))
    return each.sum(0, dtype=mix.dtype)


def _by_token(left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
    """base + left right, a small product for each token: (N, a, b) and (N, b, c) to (N, a, c)."""
    if left.shape[0] > MOST_PRODUCTS:
        lefts, rights = left.split(MOST_PRODUCTS), right.split(MOST_PRODUCTS)
        bases = [None] * len(lefts) if base is None else base.split(MOST_PRODUCTS)
        return torch.cat([_by_token(*parts) for parts in zip(lefts, rights, bases, strict=True)])
    return torch.bmm(left, right) if base is None else torch.baddbmm(base, left, right)
