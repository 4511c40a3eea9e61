"""What an adapter adds to a Linear or convolution, from its factors, without ever building the change of the weight.

The change is kron(A, U D): A (l, m) mixes the m groups of a layer's inputs into the l groups of its outputs, D (r, i) goes down to the rank and
U (o, r) up from it. LoKr with a whole second factor has no D, and U is (o, i); LoRA has no A, and m = l = 1. Inputs are contracted with the rank
first, then the groups are mixed, where a token is smallest, and the last product is added to the base's answer as it is made: nothing of the
outputs' size is read or written once more.

Letters: N tokens or pixels, B pictures, m l groups of inputs and outputs, i o channels in each of them, r rank. I = m i, O = l o.
"""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

MOST_PRODUCTS = 65_535
"""Small products in one call: a CUDA grid has no more along its last axes, and kernels for more are not in every release of cuBLAS."""
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""A, D and U, in float32 and with the scale in A, or in U where there is no A. What is one factor instead of D and U is either of them."""


def quicken(modules: list[Any]) -> None:
    """Have these modules of a LyCORIS network, those that can, answer from here instead of by the library's own factored form."""
    for module in modules:
        if module.bypass_mode and _is_plain(module):
            module.bypass_forward = Factored(module)


class Factored:
    """What a module of LoKr, LoRA or LoCon gives in its layer's place; takes the place of the library's own method.

    For each call that one casts every factor, copies the activations into another order of axes and back (in convolutions all five axes),
    and passes over what is added once each for the scale, the scalar and the sum. Autograd keeps three of these copies.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_convolution = module.module_type != "linear"

    def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor:
        module = self._module
        base: Tensor = module.org_forward(x)
        if self._is_convolution:
            return base + _convolved(x, _factors(module, scale), module.kw_dict, len(module.shape) - 2)
        mix, down, up = _factors(module, scale)
        return add_product(base, x, mix, down, up)


def add_product(base: Tensor, x: Tensor, mix: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """base + x kron(A, U D)^T, computed in the dtype of `base`; gradients of the factors are in their own.

    Args:
        base: (..., O).
        x: (..., I).
        mix: A (l, m), or none for one group.
        down: D (r, i), or none if `up` is (o, i).
        up: U (o, r), or none if `down` is (o, i).
    """
    added: Tensor = _AddedProduct.apply(base, x.to(base.dtype), mix, down, up)
    return added


class _AddedProduct(torch.autograd.Function):
    """Keeps x and, where there is a D, D x: plain autograd keeps the mixed groups and the cast factors too."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, mix: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
        inner = x.reshape(-1, x.shape[-1] // (1 if mix is None else mix.shape[1]))  # (N m, i)
        if down is not None:
            inner = inner @ down.to(x.dtype).t()  # (N m, r)
        ctx.save_for_backward(x, None if down is None else inner, mix, down, up)
        if up is not None:
            return torch.addmm(base.reshape(-1, up.shape[0]), _mixed(inner, mix), up.to(x.dtype).t()).view(base.shape)
        assert mix is not None
        by_token = inner.view(-1, mix.shape[1], inner.shape[1])
        groups = base.reshape(-1, mix.shape[0], inner.shape[1])
        return _by_token(mix.to(x.dtype).expand(len(by_token), -1, -1), by_token, groups).view(base.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, inner, mix, down, up = ctx.saved_tensors
        (grad,) = grads
        wants_base, wants_x, wants_mix, wants_down, wants_up = ctx.needs_input_grad
        lower = x.reshape(-1, x.shape[-1] // (1 if mix is None else mix.shape[1]))  # (N m, i)
        inner = lower if inner is None else inner
        grad_mixed = grad.reshape(-1, inner.shape[1] if up is None else up.shape[0])  # (N l, o)
        grad_up = (grad_mixed.t() @ _mixed(inner, mix)).to(up.dtype) if wants_up else None
        if up is not None:
            grad_mixed = grad_mixed @ up.to(x.dtype)  # (N l, r)
        grad_mix = _mix_gradient(grad_mixed, inner, mix) if wants_mix else None
        grad_down = grad_x = None
        if wants_down or wants_x:
            grad_inner = _mixed(grad_mixed, None if mix is None else mix.t())  # (N m, r)
            grad_down = (grad_inner.t() @ lower).to(down.dtype) if wants_down else None
            if wants_x:
                grad_x = (grad_inner if down is None else grad_inner @ down.to(x.dtype)).view(x.shape)
        return grad if wants_base else None, grad_x, grad_mix, grad_down, grad_up


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


def _convolved(x: Tensor, factors: Factors, window: Any, kernel: int) -> Tensor:
    """What is added to a convolution's answer, (B, I, ...) to (B, O, ...).

    Args:
        window: stride, padding and dilation of the first product.
        kernel: axes of a picture.
    """
    mix, down, up = (None if factor is None else factor.to(x.dtype) for factor in factors)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[kernel - 1]
    pictures, groups = len(x), 1 if mix is None else mix.shape[1]
    if down is not None:
        x = convolve(x.reshape(pictures * groups, -1, *x.shape[2:]), down, None, **window)  # (B m, r, ...)
    if mix is not None:
        by_group = x.reshape(pictures, groups, -1)
        x = torch.bmm(mix.expand(pictures, -1, -1), by_group).view(pictures * len(mix), -1, *x.shape[2:])  # (B l, r, ...)
    if up is not None:
        x = convolve(x, up, None, **({} if down is not None else window))  # (B l, o, ...)
    return x.reshape(pictures, -1, *x.shape[2:])


def _factors(module: Any, scale: float) -> Factors:
    """The factors of a module of the library, their products of parameters alone built: these are small."""
    scale = float(module.scale) * scale
    kernel = module.shape[2:]
    ones = [1] * len(kernel)
    if isinstance(module, LoConModule):
        return None, module.lora_down.weight, _times(module.lora_up.weight, scale)
    mix = _times(module.lokr_w1 if module.use_w1 else module.lokr_w1_a @ module.lokr_w1_b, scale)
    if module.use_w2:
        return _whole(mix, module.lokr_w2)
    up, down = module.lokr_w2_a, module.lokr_w2_b  # (o, r) and (r, i k)
    rank, outputs, inputs = up.shape[1], up.shape[0], down.shape[1]
    if not kernel and rank * (inputs + outputs) >= inputs * outputs:
        return _whole(mix, up @ down)
    return mix, down.view(rank, -1, *kernel), up.view(outputs, rank, *ones)


def _whole(mix: Tensor, factor: Tensor) -> Factors:
    """Groups are mixed where there is less of them: of inputs, before the factor (o, i, ...), or of outputs, after it."""
    return (mix, None, factor) if factor.shape[0] > factor.shape[1] else (mix, factor, None)


def _times(factor: Tensor, scale: float) -> Tensor:
    return factor if scale == 1 else factor * scale


def _is_plain(module: Any) -> bool:
    """Whether a module is of those that are computed here: no Tucker core between its factors, no groups of channels, no dropout."""
    if type(module) not in (LokrModule, LoConModule) or module.tucker or module.wd:
        return False
    layer = module.org_module[0]
    window_differs = getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros"
    drops = bool(module.rank_dropout) or not isinstance(module.drop, nn.Identity)
    return not (window_differs or drops)
