"""The assistant: a frozen adapter beside the base while training, so that a model distilled to few steps keeps them; pictures go without it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.adapter import ADAPTER_FILE
from simpletuner.adapters.effect import FileEffect
from simpletuner.adapters.ranks import has_ranks_by_time
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.adapters.weights import file_of
from simpletuner.errors import ConfigError, MemoryLimitError, SimpleTunerError
from simpletuner.models.family import ModelFamily
from simpletuner.models.hub import fetch_file
from simpletuner.models.source import is_local
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.assistant_rules import location_of

ON_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?")
"""A repository, and a file in it."""
HINT = "Give its file or folder with assistant_lora_path, or set disable_assistant_lora to train without."
DIGEST_LETTERS = 12


@dataclass(frozen=True, slots=True)
class Assistant:
    """What stands beside the base; nothing, as it comes."""

    effect: FileEffect = field(default_factory=lambda: FileEffect({}))
    training: float = 0.0
    """Its strength while training, evaluation and rollouts included."""
    pictures: float = 0.0
    """Its strength in pictures."""
    identity: str = ""
    """What of it makes a difference to training; empty without one."""
    notes: tuple[str, ...] = ()
    """What of it has no effect here, to be said aloud."""

    def attach(self, denoiser: nn.Module, device: torch.device) -> None:
        """Hang it on a frozen base that is in its final precision and computes on `device`, below whatever adapter is trained."""
        self.effect.attach(denoiser, device)
        self.effect.set_strength(self.training)

    @contextmanager
    def in_pictures(self) -> Iterator[None]:
        """Have the strength of pictures while the body renders some."""
        self.effect.set_strength(self.pictures)
        try:
            yield
        finally:
            self.effect.set_strength(self.training)


def find_assistant(config: TrainConfig, family: ModelFamily, *, trains: bool = True) -> Assistant:
    """Read the assistant, fetching it if need be, against the model's configuration; nothing else is loaded.

    Args:
        trains: whether there is to be training, and not pictures alone.

    Raises:
        ConfigError: it cannot be had, or is for another model.
        SimpleTunerError: the hub did not answer.
    """
    location, options = location_of(config, family), config.adapters
    training = options.assistant_lora_strength if trains else 0.0
    if location is None or not (training or options.assistant_lora_inference_strength):
        return Assistant()
    try:
        path = fetched(location)
        empty = family.empty_denoiser()
        layout = layout_of(empty, family.denoiser_folder, family.original_layout)
        changes = read_changes(path, layout, f"{type(empty).__name__} of {family.source_name()}")
    except MemoryLimitError:
        raise
    except SimpleTunerError as error:
        raise type(error)(f"the assistant adapter {location} cannot be used: {error.message}", hint=HINT) from error
    digest = hashlib.sha256(file_of(path).read_bytes()).hexdigest()[:DIGEST_LETTERS]
    identity = f"{digest} at strength {training:g}" if training else ""
    masked = f"the assistant {location} was trained with T-LoRA, and is not told the time here: all of its ranks are used at all timesteps"
    notes = (masked,) if has_ranks_by_time(changes) else ()
    return Assistant(FileEffect(changes), training, options.assistant_lora_inference_strength, identity, notes)


def fetched(location: str) -> Path:
    """The file, or a folder that holds it, on this machine."""
    path, on_hub = Path(location).expanduser(), ON_HUB.fullmatch(location)
    if path.exists() or on_hub is None or (is_local(location) and not on_hub[2]):
        return path
    repository, name = on_hub[1], on_hub[2] or ADAPTER_FILE
    found = fetch_file(repository, name, None)
    if found is None:
        raise ConfigError(f"{repository} has no {name}", hint="A file of another name is written behind it: owner/name/file.safetensors.")
    return found
