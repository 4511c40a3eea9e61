"""Whether the text encoders of a family can be trained, asked before anything is loaded."""

from __future__ import annotations

from simpletuner import plugins
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig

NOTE = "train_text_encoder: captions are encoded at every step, and no text cache is made"
FROZEN_NOTE = "train_text_encoder: captions are encoded at every step by the encoders that are trained; what {frozen} makes of them is cached"


def check_text_training(config: TrainConfig, family: ModelFamily) -> list[str]:
    """Refuse to train text encoders where that cannot be, before anything is loaded.

    Returns:
        What is to be said of it, a sentence each.

    Raises:
        ConfigError: names the families that can, or the option that is in the way.
    """
    if not config.adapters.train_text_encoder:
        return []
    if not family.adaptable_text:
        folder = "simpletuner.models.families"
        kinds = {name: plugins.load(folder, name, ModelFamily) for name in plugins.names(folder)}  # type: ignore[type-abstract]
        raise ConfigError(
            f"train_text_encoder: no reader of adapter files has a place for text encoders of model_family {config.models.model_family}",
            hint=f"Leave it out. The families that have one: {', '.join(name for name, kind in kinds.items() if kind.adaptable_text)}.",
        )
    trained = {key.split(".")[0] for key in family.adaptable_text}
    options = [f"text_encoder_{key.removeprefix('text_encoder').strip('_') or 1}_precision" for key in sorted(trained)]
    wrong = [option for option in options if getattr(config.memory, option) != "no_change"]
    if wrong:
        raise ConfigError(
            f"train_text_encoder: {', '.join(wrong)} must be no_change, for these text encoders are trained",
            hint="Leave it out; only encoders that are not trained can be quantised.",
        )
    if family.frozen_text:
        return [FROZEN_NOTE.format(frozen=" and ".join(family.frozen_text))]
    key = "text_encoder_batch_size"
    is_set = config.value(key) != type(config.data).model_fields[key].default
    return [NOTE, *([f"{key} has no effect: with train_text_encoder captions are encoded with the pictures of their batch"] if is_set else [])]
