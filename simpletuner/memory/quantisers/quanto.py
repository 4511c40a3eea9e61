"""Integer and float8 weights of optimum-quanto, with a scale for each row or group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from simpletuner.memory.quantisers.quantiser import Quantiser

if TYPE_CHECKING:
    from torch import Tensor, nn


class Quanto(Quantiser):
    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        from optimum import quanto

        self._kind = quanto.qtypes[weights]
        self._layer = quanto.nn.QLinear

    def quantise(self, layer: nn.Linear) -> nn.Module:
        quantised = self._layer.from_module(layer, weights=self._kind)
        quantised.freeze()
        return quantised.requires_grad_(False).eval()  # freeze fixes the values but leaves the weights trainable

    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        return {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, ""

    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        quantised = self._layer.qcreate(layer, self._kind, device="meta")
        quantised.load_state_dict(dict(tensors), assign=True)
        return quantised.requires_grad_(False).eval()
