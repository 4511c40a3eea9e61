"""What a library that quantises does for one Linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class Quantiser(ABC):
    """A library, and which of its kinds of weights. Layers come and go one at a time, so that no network is ever whole in two forms."""

    def __init__(self, weights: str) -> None:
        """
        Args:
            weights: the kind, in the library's word.

        Raises:
            ImportError: the library is not installed.
        """
        self.weights = weights

    @abstractmethod
    def quantise(self, layer: nn.Linear) -> nn.Module:
        """Give a frozen layer of the same answers, nearly, with the weights in few bits, on the device where they are.

        The answer's gradient by the layer's input is kept; its weights have none.
        """

    @abstractmethod
    def pack(self, layer: nn.Module) -> tuple[dict[str, Tensor], str]:
        """Take a quantised layer apart for a file: plain tensors by name, and what else must be known, as text."""

    @abstractmethod
    def unpack(self, layer: nn.Linear, tensors: Mapping[str, Tensor], note: str) -> nn.Module:
        """Put a quantised layer together from what `pack` gave.

        Args:
            layer: its sizes; its own weights, on the meta device, are not read.
        """
