"""4-bit integers by torchao's affine quantisation: groups of 64 weights with a scale and a zero of their own, two weights a byte.

torchao's own tensors of 4 bits (0.18) are for inference: nothing turns them back into the weight that a gradient is multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.memory.quantisers.frozen_product import frozen_product
from simpletuner.memory.quantisers.quantiser import Quantiser

GROUP = 64
"""Inputs that share a scale."""
LEAST, MOST = 0, 15
TENSORS = ("weight", "scale", "zero", "bias")


class TorchAoInt4(Quantiser):
    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        from torchao.quantization import quant_primitives

        self._primitives = quant_primitives

    def quantise(self, layer: nn.Linear) -> nn.Module:
        weight, ops = layer.weight.detach(), self._primitives
        block, kind = (1, GROUP), torch.uint8
        scale, zero = ops.choose_qparams_affine(
            weight, ops.MappingType.ASYMMETRIC, block, kind, LEAST, MOST, scale_dtype=weight.dtype, zero_point_dtype=kind
        )
        whole = ops.quantize_affine(weight, block, scale, zero, kind, LEAST, MOST)  # (O, I)
        packed = whole[:, ::2] | whole[:, 1::2] << 4  # (O, I / 2)
        # Held as numbers of the compute dtype: libraries ask a weight for its dtype, and a T5 casts what it multiplies to it.
        return _frozen(layer, {"weight": packed.view(weight.dtype), "scale": scale, "zero": zero, "bias": layer.bias})

    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        return {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, ""

    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        return _frozen(layer, tensors)


class Int4Linear(nn.Linear):
    """A Linear layer with weights in 4 bits and no gradient by them."""

    scale: nn.Parameter
    """(O, I / 64)"""
    zero: nn.Parameter
    """(O, I / 64), uint8"""

    def plain_weight(self) -> Tensor:
        """The weight that the quantised one stands for, (O, I)."""
        from torchao.quantization.quant_primitives import dequantize_affine

        packed = self.weight.view(torch.uint8)  # (O, I / 2)
        whole = torch.stack((packed & MOST, packed >> 4), dim=-1).flatten(1)  # (O, I)
        plain: Tensor = dequantize_affine(whole, (1, GROUP), self.scale, self.zero, torch.uint8, LEAST, MOST, output_dtype=self.weight.dtype)
        return plain

    def forward(self, input: Tensor) -> Tensor:
        return frozen_product(input, self.weight, self.bias, lambda _: self.plain_weight())


def _frozen(layer: nn.Linear, tensors: Mapping[str, Tensor | None]) -> Int4Linear:
    frozen = Int4Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    for name in TENSORS:
        tensor = tensors.get(name)
        frozen.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
    return frozen.eval()
