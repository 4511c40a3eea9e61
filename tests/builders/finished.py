"""What a run leaves, without the run: an adapter moved away from its start, on a tiny model of a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from simpletuner.cli.choices import family_defaults
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.finish import metadata_of
from simpletuner.training.run_folder import CONFIG_FILE


def config_of(**options: Any) -> TrainConfig:
    return load_config([Setting(key, value, "test") for key, value in options.items()], family_defaults).config


def write_finished(folder: Path, lycoris: dict[str, Any] | None = None, size: float = 0.05, **options: Any) -> TrainConfig:
    """Write an adapter as the end of a run does, and the settings of the run.

    Args:
        lycoris: content of its lycoris_config; plain LoRA without.
        size: how far every number of the adapter is moved, at random but the same each time.
        options: of the run; `pretrained_model_name_or_path` and `model_family` among them.
    """
    folder.mkdir(parents=True)
    if lycoris is not None:
        path = folder.parent / f"{folder.name}-lycoris.json"
        path.write_text(json.dumps(lycoris))
        options |= {"lora_type": "lycoris", "lycoris_config": str(path)}
    config = config_of(output_dir=str(folder), **options)
    family = build_family(config)
    adapter, denoiser = build_adapter(config, family), family.load_denoiser(torch.float32, 0)
    torch.manual_seed(0)
    if config.adapters.train_text_encoder:
        adapter.attach_text(family.text_networks(family.load_text_encoders(torch.device("cpu"), torch.float32)))
    adapter.attach(denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    adapter.save(folder, metadata_of(config, family))
    (folder / CONFIG_FILE).write_text(json.dumps(config.flat(), default=str))
    return config
