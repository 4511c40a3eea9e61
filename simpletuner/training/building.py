"""The family and the adapter that the options name; nothing is loaded yet."""

from __future__ import annotations

from simpletuner import plugins
from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.live_text import text_targets


def build_family(config: TrainConfig) -> ModelFamily:
    kind = plugins.load("simpletuner.models.families", config.models.model_family, ModelFamily)  # type: ignore[type-abstract]
    return kind(config.models)


def build_adapter(config: TrainConfig, family: ModelFamily) -> Adapter:
    kind = plugins.load("simpletuner.adapters.kinds", kind_of(config.adapters), Adapter)  # type: ignore[type-abstract]
    names = (family.denoiser_folder, family.original_layout, family.lora_target_sets, family.pipeline_loads_lora, text_targets(family))
    return kind(config.adapters, Targets(family.class_aliases, family.lora_targets, *names))
