"""The adapter of a run in the layout that `lora_format` names, beside or in place of the one that a run goes on from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from simpletuner.adapters.adapter import ADAPTER_FILE, Adapter
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.export import write
from simpletuner.training.finished import read_finished

OWN = "diffusers"
"""The layout that a run saves by itself; of a LyCORIS adapter it is that library's own."""


def file_beside(layout: str) -> str:
    return f"{Path(ADAPTER_FILE).stem}-{layout}.safetensors"


def write_beside(folder: Path, config: TrainConfig, family: ModelFamily) -> None:
    """Add a file in the layout that was asked for to a checkpoint; the run goes on from its own, which holds every bit."""
    layout = config.adapters.lora_format
    if config.adapters.model_type == "lora" and layout != OWN:
        write(read_finished(folder, config, family), layout, folder / file_beside(layout))


def write_in_place(folder: Path, config: TrainConfig, family: ModelFamily) -> None:
    """Give the adapter's file at a run's end the layout that was asked for."""
    layout = config.adapters.lora_format
    if layout != OWN:
        write_beside(folder, config, family)
        os.replace(folder / file_beside(layout), folder / ADAPTER_FILE)


def refuse_layout(adapter: Adapter, config: TrainConfig, family: ModelFamily) -> None:
    """Refuse, before anything is trained, an adapter that the layout cannot hold.

    Raises:
        ConfigError: names `lora_format`, and what can be done.
    """
    if config.adapters.model_type == "lora" and config.adapters.lora_format != OWN:
        with tempfile.TemporaryDirectory(dir=config.training.output_dir, prefix=".layout-") as name:
            adapter.save(Path(name), {})
            write_beside(Path(name), config, family)
