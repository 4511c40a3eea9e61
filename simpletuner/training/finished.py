"""What training left in a folder or a file: find it, and put its adapter on its base again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.adapters import weights
from simpletuner.adapters.adapter import ADAPTER_FILE, Adapter
from simpletuner.adapters.applying import apply_changes
from simpletuner.adapters.changes import Changes
from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.assemble import build_adapter, build_family
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.run_folder import CONFIG_FILE

LYCORIS_FILE = "lycoris_config.json"
"""Beside the weights, the settings that they were made with."""


def find_weights(place: Path) -> Path:
    """Find what was trained: a .safetensors file, or the folder that holds one, of a checkpoint or of a run's end.

    Of a run that has not ended, the newest checkpoint.

    Raises:
        ConfigError: there is none.
    """
    if holds_adapter(place):
        return place
    if not place.exists():
        raise ConfigError(f"{place} does not exist", hint="Give the output folder of a run, a checkpoint in it, or a .safetensors file.")
    damaged: list[str] = []
    if (place / "pipeline").is_dir() or any(place.glob("*/config.json")):
        return place  # all weights were trained
    latest = CheckpointFolder(place, None, damaged.append).latest()
    if latest is None:
        raise ConfigError(
            f"there is no {ADAPTER_FILE} and no whole checkpoint in {place}" + "".join(f"; {problem}" for problem in damaged),
            hint="Give the output folder of a run, a checkpoint in it, or a .safetensors file.",
        )
    return find_weights(latest.folder)


def holds_adapter(path: Path) -> bool:
    """Whether what `find_weights` found is an adapter, and not a denoiser of which all weights were trained."""
    return path.is_file() or (path / ADAPTER_FILE).is_file()


def settings_of(place: Path) -> tuple[Path | None, dict[str, Any]]:
    """Find the settings that a run left beside what it trained; or else what the adapter file says of its model.

    Returns:
        The file of settings, if there is one, and settings that stand in for it or are stronger.
    """
    folder = place if place.is_dir() else place.parent
    saved = next((path for path in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE) if path.is_file()), None)
    own: dict[str, Any] = {"lycoris_config": str(folder / LYCORIS_FILE)} if (folder / LYCORIS_FILE).is_file() else {}
    if saved is None and holds_adapter(place):
        said = weights.metadata_of(place)
        told = {"model_family": said.get("model_family"), "pretrained_model_name_or_path": said.get("base_model")}
        own |= {option: value for option, value in told.items() if value}
    return saved, own


@dataclass(frozen=True)
class Finished:
    """An adapter that was trained, and the model that it is for."""

    path: Path
    """The file, or the folder that holds it."""
    config: TrainConfig
    family: ModelFamily
    layout: Layout
    changes: Changes
    adapter: Adapter | None
    """Of the kind that made it; None for a file without the settings of its run."""

    @property
    def file(self) -> Path:
        return self.path / ADAPTER_FILE if self.path.is_dir() else self.path

    def metadata(self) -> Mapping[str, str]:
        return weights.metadata_of(self.path)

    def base(self) -> nn.Module:
        """The denoiser without the adapter, on the CPU in float32."""
        return self.family.load_denoiser(torch.float32, seed_from("model", self.config.training.seed))

    def trained(self) -> nn.Module:
        """The denoiser with the adapter, as training had it."""
        denoiser = self.base()
        if self.adapter is None:
            apply_changes(denoiser, self.changes)
        else:
            self.adapter.attach(denoiser)
            self.adapter.load(self.path)
            self.adapter.train(False)
        return denoiser.eval()


def open_finished(path: Path, config: TrainConfig, has_settings: bool) -> Finished:
    """Read an adapter against its base, of which the configuration alone is asked for.

    Args:
        path: as `find_weights` found it.
        has_settings: whether `config` tells how the adapter was trained, and not only on what.

    Raises:
        ConfigError: all weights were trained, the model is not there, or the adapter is for another.
    """
    family = build_family(config)
    if not holds_adapter(path):
        raise ConfigError(
            f"{path} holds a model of which all weights were trained, no adapter",
            hint="Its folder pipeline/ is a whole model that diffusers loads; `simpletuner merge` writes one from a checkpoint.",
        )
    family.check_source()
    empty = family.empty_denoiser()
    layout = layout_of(empty, family.denoiser_folder, family.original_layout)
    changes = read_changes(path, layout, f"{type(empty).__name__} of {family.source_name()}")
    return Finished(path, config, family, layout, changes, build_adapter(config, family) if has_settings else None)
