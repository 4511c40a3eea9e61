"""The contract of an adapter kind: what is learned, and how it is attached, saved and read again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.options.adapters import Adapters

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name under which other tools look for an adapter."""
Content = TypeVar("Content")
Write = Callable[[Path], None]
"""Writes something into a folder."""


class Keep(Protocol):
    """Takes hold of tensors in dictionaries and lists that are to be written later."""

    def __call__(self, content: Content, /) -> Content:
        """The same content: itself, or copies of its tensors in main memory."""


def as_it_is(content: Content) -> Content:
    """Keep nothing but the tensors themselves: what is written is what they hold by then."""
    return content


@dataclass(frozen=True, slots=True)
class Targets:
    """What a family tells an adapter about its denoiser."""

    class_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Short class names that users write, to the family's own classes."""
    suffixes: tuple[str, ...] = ()
    """Module name suffixes that a plain LoRA adapts by default."""
    folder: str = "transformer"
    """The denoiser's name in diffusers layout, which is also its key prefix."""
    original_layout: str | None = None
    """The layout of the model's makers, by its name in `key_maps`; None where it is not known."""
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sets of suffixes that users may choose by a name."""
    pipeline_loads_lora: bool = True
    """Whether the pipeline of diffusers has `load_lora_weights`."""
    text: tuple[Targets, ...] = ()
    """What there is to say of the text encoders that a LoRA can be put on as well."""


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
    layers: tuple[str, ...] = ()
    """Names of the denoiser's layers that are adapted."""


class Adapter(ABC):
    """Trainable weights on a frozen denoiser, or the denoiser's own weights (`full`).

    Built early: the constructor reads the adapter's own file and refuses what is wrong with it, without loading
    anything. Attached once, after the base is loaded in its final precision, and before its blocks are given their
    places and the optimizer is built. Its parameters are float32 whatever the base's precision, and are made where
    the module they adapt rests; `to` brings them to where it computes.
    """

    trains_base: ClassVar[bool] = False
    """Whether the denoiser's own weights are trained. Such a base is loaded in float32 or bf16 and never
    quantised, and a step runs float32 under autocast when `mixed_precision` asks for less. Other kinds need no autocast."""

    def __init__(self, options: Adapters, targets: Targets) -> None:
        self.options = options
        self.targets = targets

    @abstractmethod
    def attach(self, denoiser: nn.Module) -> Attached:
        """Freeze the base and put the adapter on it; initialised from torch's global generator on the CPU.

        Raises:
            ConfigError: a target matches no module (the message lists what the model has), or the base's
                precision does not carry what was asked.
        """

    def attach_text(self, networks: Mapping[str, nn.Module]) -> None:
        """Freeze networks in text encoders and put the adapter on them too; asked of kinds that adapt them, before `attach`.

        Args:
            networks: by the folders of `targets.text`.
        """
        raise NotImplementedError

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by stable names, in a stable order."""

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """Those of them on text encoders, which have a learning rate of their own."""
        return {}

    def at_share(self, share: float) -> None:  # noqa: B027
        """Prepare for an optimizer step that begins at this share of the run, 0 to 1: what is not to learn any more is frozen.

        Most kinds learn throughout.
        """

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move what was made where the layers it is for rest, to where they compute. What lies inside the denoiser moves with it."""

    @abstractmethod
    def set_strength(self, strength: float) -> None:
        """Scale the adapter's effect; at 0 the denoiser answers as the base does, bit for bit.

        Raises:
            ConfigError: the kind has no strength but 1 (`full`).
        """

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Switch dropouts on for training and off for validation; they draw from torch's global generator."""

    def at_time(self, time: Tensor) -> None:  # noqa: B027
        """Prepare for a denoiser call at `time` (B,) or (1,), in [0, 1]; 0 is data, 1 is noise. Called before each, in training and validation.

        Most kinds are the same at all times.
        """

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights into `folder` in the layout that other tools read, with `metadata` beside them.

        The same weights and metadata give the same bytes. `metadata` holds no absolute paths.
        """
        self.saving(metadata)(folder)

    @abstractmethod
    def saving(self, metadata: Mapping[str, str], keep: Keep = as_it_is) -> Write:
        """Give what does as `save`, later: with copies that `keep` makes now, from any thread while the weights go on changing.

        Args:
            keep: is given all tensors that will be written, once.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read back exactly what `save` wrote into `folder`; or, where a kind saves one file, that file by its path.

        An adapter's file may also be of another tool and in any layout of `formats`; its effect is kept, whatever its alpha.

        Raises:
            ConfigError: no such file, it is for another model, or a key is missing or unused; names the first few.
        """

    @abstractmethod
    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        """Python that renders a picture with diffusers and the saved adapter, ready to paste.

        Args:
            pipeline_class: its name in diffusers.
            base: hub id or folder of the base model.
            arguments: of the pipeline's call; `seed`, if there, becomes a generator.
            folder: where `save` wrote.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The parameters' values, detached, sharing memory."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}


def kind_of(options: Adapters) -> str:
    """Name the file in `adapters/kinds` that these options ask for."""
    if options.model_type == "full":
        return "full"
    return "with_text" if options.train_text_encoder else options.lora_type
