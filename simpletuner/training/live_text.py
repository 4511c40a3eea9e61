"""Text encoders that are trained, and so stay: they encode each batch's captions anew, beside what is cached of those that are not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    frozen: Callable[[str], Mapping[str, Tensor]]
    """What the other encoders make of a prompt, without a batch axis."""
    device: torch.device

    def encode(self, prompts: Sequence[str], frozen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a batch's `text` is to hold, (B, ...), with a graph where there is one to be had.

        Args:
            frozen: what the other encoders make of the prompts, (B, ...).
        """
        here = {name: tensor.to(self.device, non_blocking=True) for name, tensor in frozen.items()}
        return self.family.encode_trained(self.encoders, prompts, here)

    def read(self, prompt: str) -> dict[str, Tensor]:
        """One prompt's tensors, without a batch axis."""
        frozen = {name: tensor[None] for name, tensor in self.frozen(prompt).items()}
        return {name: tensor[0] for name, tensor in self.encode([prompt], frozen).items()}


def text_targets(family: ModelFamily) -> tuple[Targets, ...]:
    """What an adapter is told of the text encoders that it can be put on."""
    return tuple(Targets(suffixes=LORA_TARGETS, folder=folder, original_layout=layout) for folder, layout in family.adaptable_text.items())


def live_text(
    config: TrainConfig, family: ModelFamily, adapter: Adapter, encoders: TextEncoders | None, frozen: Callable[[str], Mapping[str, Tensor]]
) -> LiveText | None:
    """Put the adapter on the text encoders that stay; None if none does.

    Args:
        frozen: what the others make of a prompt, without a batch axis.
    """
    if encoders is None:
        return None
    loaded = encoders.get()
    torch.manual_seed(seed_from("text adapter", config.training.seed))
    adapter.attach_text(family.text_networks(loaded))
    if config.memory.gradient_checkpointing:
        for module in family.adaptable_encoders(loaded).values():
            # Reentrant checkpoints, the default of transformers 4, would leave layers behind frozen embeddings without gradients.
            module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    adapter.train(True)
    return LiveText(family, loaded, frozen, encoders.device)
