"""Which assistant a run has, and what is to be said of it: what a dry run tells, too, which loads nothing."""

from __future__ import annotations

from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig


def location_of(config: TrainConfig, family: ModelFamily) -> str | None:
    """Where the assistant lies: as the options say, or else the one of the model's flavour; None if there is to be none.

    All weights are trained without: they would learn to undo it.
    """
    options = config.adapters
    if options.disable_assistant_lora or options.model_type == "full":
        return None
    if options.assistant_lora_path is not None:
        return options.assistant_lora_path
    if family.starts_random or family.source.is_replaced(family.denoiser_folder):
        return None
    return family.assistants.get(family.source.flavour or "")


def assistant_notes(config: TrainConfig, family: ModelFamily) -> list[str]:
    """What is to be said of the assistant before a run, a sentence each."""
    options, location = config.adapters, location_of(config, family)
    if location is not None:
        how = "in pictures, too" if options.assistant_lora_inference_strength else "pictures are made without it"
        return [f"the frozen adapter {location} stands beside the base while training, at strength {options.assistant_lora_strength:g}; {how}"]
    own = family.assistants.get(family.source.flavour or "") if options.model_type == "full" and not options.disable_assistant_lora else None
    if own is not None:
        return [f"{own}, which keeps this model to its few steps while a LoRA is trained, cannot stand beside weights that are all trained"]
    usual = type(options).model_fields
    changed = [key for key in ("assistant_lora_strength", "assistant_lora_inference_strength") if getattr(options, key) != usual[key].default]
    return [f"{', '.join(changed)} without effect: there is no assistant_lora_path"] if changed and not options.disable_assistant_lora else []
