"""Text encoders that are trained, and so stay: they encode each batch's captions anew, and no text cache is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner.adapters.adapter import Adapter, Targets
from simpletuner.models.clip import LORA_TARGETS
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.caching import TextEncoders


@dataclass(frozen=True, slots=True)
class LiveText:
    """Text encoders on their device, as they are trained."""

    family: ModelFamily
    encoders: Any

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """What a batch's `text` holds, (B, ...), with a graph where there is one to be had."""
        return self.family.encode_text(self.encoders, prompts)

    def read(self, prompt: str) -> dict[str, Tensor]:
        """One prompt's tensors, without a batch axis."""
        return {name: tensor[0] for name, tensor in self.encode([prompt]).items()}


def text_targets(family: ModelFamily) -> tuple[Targets, ...]:
    """What an adapter is told of the text encoders that it can be put on."""
    return tuple(Targets(suffixes=LORA_TARGETS, folder=folder, original_layout=layout) for folder, layout in family.adaptable_text.items())


def live_text(config: TrainConfig, family: ModelFamily, adapter: Adapter, encoders: TextEncoders) -> LiveText | None:
    """Put the adapter on the text encoders, if it is for them; otherwise they are not needed any more."""
    if not config.adapters.train_text_encoder:
        return None
    loaded = encoders.get()
    torch.manual_seed(seed_from("text adapter", config.training.seed))
    adapter.attach_text(family.text_networks(loaded))
    if config.memory.gradient_checkpointing:
        for module in family.text_modules(loaded):
            # Reentrant checkpoints, the default of transformers 4, would leave layers behind frozen embeddings without gradients.
            module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    adapter.train(True)
    return LiveText(family, loaded)
