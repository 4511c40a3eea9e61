"""4-bit floats of bitsandbytes: blocks of 64 weights with a scale each, the scales themselves in 8 bits (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from simpletuner.memory.quantisers.frozen_product import frozen_product
from simpletuner.memory.quantisers.quantiser import Quantiser

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class BitsAndBytes(Quantiser):
    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        from bitsandbytes import functional
        from bitsandbytes.nn import Linear4bit, Params4bit

        self._parameter: Any = Params4bit

        class Linear(Linear4bit):
            """A layer that multiplies alike with and without gradients, where the library's own takes other kernels."""

            def plain_weight(self) -> Tensor:
                """The weight that the quantised one stands for, (O, I)."""
                weight: Any = self.weight
                plain: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
                return plain

            def forward(self, x: Tensor) -> Tensor:
                weight: Any = self.weight
                return frozen_product(x, weight, self.bias, partial(functional.dequantize_4bit, quant_state=weight.quant_state))

        self._layer = Linear

    def quantise(self, layer: nn.Linear) -> nn.Module:
        # Stored as numbers of the compute dtype: libraries ask a weight for its dtype, and a T5 casts what it multiplies to it.
        weight = self._parameter(layer.weight.data.contiguous(), requires_grad=False, quant_type=self.weights, quant_storage=layer.weight.dtype)
        return self._around(layer, weight, layer.weight.dtype).to(layer.weight.device)  # moving it quantises it

    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        return {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, ""

    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        import torch

        states = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name.startswith("weight.")}
        weight = self._parameter.from_prequantized(tensors["weight"], states, device=tensors["weight"].device)
        if "bias" in tensors:
            layer.bias = torch.nn.Parameter(tensors["bias"], requires_grad=False)
        return self._around(layer, weight, weight.quant_state.dtype)

    def _around(self, layer: nn.Linear, weight: Any, dtype: torch.dtype) -> Any:
        import torch

        with torch.device("meta"):
            quantised = self._layer(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type=self.weights)
        quantised.weight = weight
        weight.module = quantised
        quantised.bias = layer.bias
        return quantised.requires_grad_(False).eval()
