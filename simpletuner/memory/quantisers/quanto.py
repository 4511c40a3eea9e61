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
        # quanto imports it with the first weight, where its tensors would be counted as that one's
        import optimum.quanto.tensor.weights.marlin  # noqa: F401
        from optimum import quanto

        class Linear(quanto.nn.QLinear):
            """A layer for inputs of any strides: torch's int8 kernel on the CPU (2.13) takes the usual ones alone."""

            def forward(self, input: Tensor) -> Tensor:
                answer: Tensor = super().forward(input.contiguous())
                return answer

        self._kind = quanto.qtypes[weights]
        self._layer = Linear

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
