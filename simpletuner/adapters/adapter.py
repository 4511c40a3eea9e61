"""The contract of an adapter kind: what is learned, and how it is attached, saved and read again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.options.adapters import Adapters

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name under which other tools look for an adapter."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a family tells an adapter about its denoiser."""

    class_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Short class names that users write, to the family's own classes."""
    suffixes: tuple[str, ...] = ()
    """Module name suffixes that a plain LoRA adapts by default."""
    folder: str = "transformer"
    """The denoiser's name in diffusers layout, which is also its key prefix."""


@dataclass(frozen=True, slots=True)
class Attached:
    """What came of attaching: figures for the summary."""

    modules: int
    """Modules that are adapted."""
    modules_total: int
    """Modules that could have been: every Linear and Conv."""
    parameters: int
    notes: tuple[str, ...] = ()
    """Things to say aloud, e.g. settings of the adapter's file that have no effect."""


class Adapter(ABC):
    """Trainable weights on a frozen denoiser, or the denoiser's own weights (`full`).

    Attached once, after the base is loaded and quantised and before the optimizer is built. Its parameters
    are float32 whatever the base's precision.
    """

    def __init__(self, options: Adapters, targets: Targets) -> None:
        self.options = options
        self.targets = targets

    @abstractmethod
    def attach(self, denoiser: nn.Module) -> Attached:
        """Freeze the base and put the adapter on it; initialised from torch's global generator.

        Raises:
            ConfigError: a target matches no module; the message lists what the model has.
        """

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by stable names, in a stable order."""

    @abstractmethod
    def set_strength(self, strength: float) -> None:
        """Scale the adapter's effect; at 0 the denoiser answers as the base does, bit for bit."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Switch dropouts on for training and off for validation."""

    @abstractmethod
    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights into `folder` in the layout that other tools read, with `metadata` in the header."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read back exactly what `save` wrote.

        Raises:
            ConfigError: a key is missing or unused; names the first few.
        """

    @abstractmethod
    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        """Python that renders a picture with diffusers and the saved adapter, ready to paste."""

    def tensors(self) -> dict[str, Tensor]:
        """The parameters' values, detached, sharing memory."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}
