"""8-bit weights that are multiplied as they are, forward and in the gradient to the input: both products of a frozen layer in 8 bits.

A weight has a scale for each output. On the way there inputs are rounded to 8 bits by tokens, so both scales come out of the sum. On the way back
outputs are what is summed over: the weight's scales go into the gradient before it is rounded, and the weight is read as it lies.

A few large inputs make the steps of their tokens coarse. Where inputs are turned first (ConvRot), in groups by a matrix H which is its own
inverse, each spreads over its group: (x H) (W H)^T = x W^T.

Letters: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.memory.quantisers.quantiser import Quantiser

FEWEST_TOKENS = 17
"""With fewer the weight is made plain: cuBLAS refuses them, and nothing is gained. It follows from shapes, so a resumed run does the same."""
LEVELS = {torch.int8: 126.0, torch.float8_e4m3fn: 440.0}
"""Where the largest number of a row goes: a little below the format's own largest, since steps rounded to bf16 may let it go beyond."""
LARGEST_GROUP = 64
"""Inputs that are turned together. With 256 what outliers cost is a tenth less, and turning them four times as dear."""


class EightBit(Quantiser):
    """`weights` is int8 or float8_e4m3fn, and `rotated` after it."""

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        kind, *rotated = weights.split()
        self._kind: torch.dtype = getattr(torch, kind)
        self._is_rotated = bool(rotated)

    def quantise(self, layer: nn.Linear) -> nn.Module:
        plain = layer.weight.detach()
        turn = self._turn(layer, plain)
        weight, scale = to_eight_bits(plain if turn is None else turned(plain, turn), self._kind)
        return _around(layer, weight, scale[:, 0].contiguous(), turn)

    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        return {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, ""

    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        if "bias" in tensors:
            layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        return _around(layer, tensors["weight"].view(self._kind), tensors["scale"], self._turn(layer, tensors["scale"]))

    def _turn(self, layer: nn.Linear, like: Tensor) -> Tensor | None:
        return rotation(layer.in_features).to(like) if self._is_rotated else None


class EightBitLinear(nn.Linear):
    """A frozen Linear layer that multiplies in 8 bits."""

    kind: torch.dtype
    """Of the numbers. The weight says int8 in any case: what a T5 multiplies is cast to the dtype of its weight, unless that is int8."""
    scale: Tensor
    """(O,), in the dtype of what is not quantised."""
    turn: Tensor | None
    """H, if inputs are turned."""
    multiplies_in_8_bits: bool = True
    """Without it the weight is made plain for each product, however many tokens there are. Settled before anything is compiled."""

    def plain_weight(self) -> Tensor:
        """The weight that the quantised one stands for, (O, I)."""
        weight = plain(self.weight.view(self.kind), self.scale)
        return weight if self.turn is None else turned(weight, self.turn)

    def forward(self, input: Tensor) -> Tensor:
        if self.turn is not None:
            input = turned(input, self.turn)
        weight = self.weight.view(self.kind)
        if not self.multiplies_in_8_bits or input.numel() // input.shape[-1] < FEWEST_TOKENS:
            answer: Tensor = _PlainProduct.apply(input, weight, self.scale)
        else:
            answer = _EightBitProduct.apply(input, weight, self.scale)
        return answer if self.bias is None else answer + self.bias


class _EightBitProduct(torch.autograd.Function):
    """x W^T, (..., I) to (..., O), and g W on the way back. Nothing is kept but the weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        wide = _wide(input.dtype)
        rows, steps = to_eight_bits(input.reshape(-1, input.shape[-1]).to(wide), weight.dtype)
        product = _product(rows, weight.t(), wide).mul_(steps).mul_(scale)
        return product.to(input.dtype).view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (weight, scale), (grad,) = ctx.saved_tensors, grads
        wide = _wide(grad.dtype)
        rows, steps = to_eight_bits(grad.reshape(-1, grad.shape[-1]).to(wide) * scale, weight.dtype)
        product = _product(rows, weight, wide).mul_(steps)
        return product.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1]), None, None


class _PlainProduct(torch.autograd.Function):
    """The same with the plain weight, of which no copy is kept either."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(input, plain(weight, scale.to(input.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (weight, scale), (grad,) = ctx.saved_tensors, grads
        return grad @ plain(weight, scale.to(grad.dtype)), None, None


def to_eight_bits(rows: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row in steps of its own.

    Steps have the dtype of the rows, and numbers are divided by the rounded step: 16 bits then cost hardly more than 32, at half the time.
    A row that is not finite has steps that are not, so that it does not go unnoticed.

    Returns:
        The numbers, (N, I), and the steps, (N, 1).
    """
    steps = (rows.abs().amax(1, keepdim=True) / LEVELS[kind]).clamp_min_(torch.finfo(rows.dtype).tiny)
    numbers = rows / steps
    return (numbers.round_() if kind == torch.int8 else numbers).to(kind), steps


def rotation(inputs: int) -> Tensor:
    """H for the largest group, a power of 4, that divides the inputs: a regular Hadamard matrix, symmetric and its own inverse."""
    smallest = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    whole = torch.ones(1, 1)
    while len(whole) < LARGEST_GROUP and inputs % (4 * len(whole)) == 0:
        whole = torch.kron(whole, smallest)
    return whole


def turned(rows: Tensor, turn: Tensor) -> Tensor:
    """(..., I), each group of inputs multiplied by H."""
    return (rows.reshape(-1, len(turn)) @ turn).view(rows.shape)


def plain(weight: Tensor, scale: Tensor) -> Tensor:
    """What 8-bit numbers (O, I) and scales (O,) stand for, in the dtype of the scales."""
    return weight.to(scale.dtype).mul_(scale[:, None])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The format that sums of 8-bit products are held in: they are too large for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _product(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) (K, M) in 8 bits."""
    if rows.dtype == torch.int8:
        return torch._int_mm(rows, columns).to(dtype)
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    by_columns = columns.t().contiguous().t()  # all that cuBLAS takes; on the way there it lies so
    return torch._scaled_mm(rows, by_columns, one, one, out_dtype=dtype)


def _around(layer: nn.Linear, weight: Tensor, scale: Tensor, turn: Tensor | None) -> EightBitLinear:
    quantised = EightBitLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    quantised.kind, quantised.weight = weight.dtype, nn.Parameter(weight.view(torch.int8), requires_grad=False)
    quantised.register_buffer("scale", scale)
    quantised.register_buffer("turn", turn, persistent=False)
    quantised.bias = layer.bias
    return quantised.requires_grad_(False).eval()
