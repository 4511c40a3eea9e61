"""Weights of torchao: tensors of their own kind inside Linear layers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

from simpletuner.memory.quantisers.frozen_product import frozen_product
from simpletuner.memory.quantisers.quantiser import Quantiser


class TorchAo(Quantiser):
    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        from torchao import quantization

        self._quantise = quantization.quantize_
        self._config = getattr(quantization, weights)()

    def quantise(self, layer: nn.Linear) -> nn.Module:
        holder = nn.Sequential(layer)
        self._quantise(holder, self._config)
        weight = holder[0].weight
        assert isinstance(weight, Tensor)
        return _frozen(weight, layer)

    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        assert isinstance(layer.weight, Tensor)
        tensors, notes = flatten_tensor_state_dict({"layer.weight": layer.weight.detach()})
        plain = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
        if layer.bias is not None:
            assert isinstance(layer.bias, Tensor)
            plain["bias"] = layer.bias.detach()
        return plain, json.dumps(notes)

    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        whole, _ = unflatten_tensor_state_dict({f"layer.{name}": tensor for name, tensor in tensors.items() if name != "bias"}, json.loads(note))
        if "bias" in tensors:
            layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        return _frozen(whole["layer.weight"], layer)


class FrozenLinear(nn.Linear):
    """A Linear layer whose weight is a tensor of torchao and has no gradient.

    Left to itself torchao either keeps a full-precision copy of the weight from the forward to the backward pass, or has no backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        return frozen_product(input, self.weight, self.bias, _plain, nn.functional.linear)


def _plain(weight: Tensor) -> Tensor:
    plain: Tensor = weight.dequantize()
    return plain


def _frozen(weight: Tensor, layer: nn.Linear) -> FrozenLinear:
    frozen = FrozenLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    frozen.weight = nn.Parameter(weight, requires_grad=False)
    frozen.bias = layer.bias
    return frozen.requires_grad_(False).eval()
