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
from simpletuner.adapters.effect import Effect, FileEffect
from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.ranks import RankRule, rule_of
from simpletuner.adapters.reading import adapts_text, read_changes, read_text_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.building import build_adapter, build_family
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
    return weights.file_of(path).is_file()


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


@dataclass(frozen=True, slots=True)
class TextChanges:
    """What an adapter changes in one text encoder."""

    layout: Layout
    changes: Changes

    def named(self) -> set[str]:
        """Its layers by their names in diffusers layout."""
        return {f"{self.layout.folder}.{layer}" for layer in self.changes}


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
    text: tuple[TextChanges, ...] = ()
    """What it changes in text encoders."""

    @property
    def file(self) -> Path:
        return weights.file_of(self.path)

    def metadata(self) -> Mapping[str, str]:
        return weights.metadata_of(self.path)

    def rank_rule(self) -> RankRule | None:
        """How the ranks of a T-LoRA follow the time, where the file tells it."""
        return rule_of(self.changes, self.metadata())

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

    def put_on_text(self, encoders: Any) -> list[Effect]:
        """Put on text encoders what was trained on them, as training had it; nothing if that was nothing."""
        if not self.text:
            return []
        networks = self.family.text_networks(encoders)
        if self.adapter is not None and self.config.adapters.train_text_encoder:
            adapter = build_adapter(self.config, self.family)  # a second one: text encoders and denoiser are not in memory together
            adapter.attach_text(networks)
            adapter.load(self.path)
            adapter.train(False)
            return [adapter]
        effects: list[Effect] = []
        for one in self.text:
            effect = FileEffect(one.changes)
            effect.attach(networks[one.layout.folder])
            effects.append(effect)
        return effects


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
    return read_finished(path, config, family, build_adapter(config, family) if has_settings else None)


def read_finished(path: Path, config: TrainConfig, family: ModelFamily, adapter: Adapter | None = None) -> Finished:
    """Read an adapter against the layers of a family's model, which is known to be there."""
    empty = family.empty_denoiser()
    layout = layout_of(empty, family.denoiser_folder, family.original_layout)
    changes = read_changes(path, layout, f"{type(empty).__name__} of {family.source_name()}", leaves_text=bool(family.adaptable_text))
    return Finished(path, config, family, layout, changes, adapter, read_text(path, family))


def read_text(path: Path, family: ModelFamily) -> tuple[TextChanges, ...]:
    """What an adapter changes in text encoders, of which the configurations alone are asked for; mostly nothing."""
    if not family.adaptable_text or not adapts_text(path):
        return ()
    empty = family.empty_text_networks()
    layouts = [layout_of(network, folder, family.adaptable_text[folder]) for folder, network in empty.items()]
    found = (TextChanges(layout, changes) for layout, changes in zip(layouts, read_text_changes(path, layouts)))
    return tuple(one for one in found if one.changes)
