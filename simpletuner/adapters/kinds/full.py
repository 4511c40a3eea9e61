"""Full training: the denoiser's own weights, saved as a folder that diffusers loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from simpletuner.adapters import snippet, weights
from simpletuner.adapters.adapter import Adapter, Attached, Keep, Targets, Write, as_it_is
from simpletuner.adapters.targets import adaptable, is_quantised
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.options.adapters import Adapters

METADATA_FILE = "simpletuner_metadata.json"


class Full(Adapter):
    """All weights of the denoiser, in the precision in which it was loaded."""

    trains_base: ClassVar[bool] = True

    def __init__(self, options: Adapters, targets: Targets) -> None:
        super().__init__(options, targets)
        self._denoiser: Any = nn.Identity()

    def attach(self, denoiser: nn.Module) -> Attached:
        modules = adaptable(denoiser)
        if any(is_quantised(module) for module in modules.values()):
            raise ConfigError("model_type full trains the base's weights, which are quantised", hint="Set base_model_precision to no_change.")
        denoiser.requires_grad_(True)
        self._denoiser = denoiser
        return Attached(
            modules=len(modules), modules_total=len(modules), parameters=sum(parameter.numel() for parameter in self.parameters().values())
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._denoiser.named_parameters())

    def set_strength(self, strength: float) -> None:
        """Accept 1 alone: the base that a strength would lead back to is not kept."""
        if strength != 1:
            raise ConfigError(
                f"model_type full has no strength but 1, {strength:g} was asked",
                hint="Compare with the base model itself; keep plain pictures as ordinary datasets instead of is_regularisation_data.",
            )

    def train(self, mode: bool) -> None:
        self._denoiser.train(mode)

    def saving(self, metadata: Mapping[str, str], keep: Keep = as_it_is) -> Write:
        """What writes `<folder>/transformer/` (or unet) in diffusers layout; the metadata becomes a JSON file beside it."""
        kept, model = keep(self._denoiser.state_dict()), copy.copy(self._denoiser)
        model.state_dict = lambda: kept  # all that diffusers asks the model for, besides its configuration

        def write(folder: Path) -> None:
            place = folder / self.targets.folder
            model.save_pretrained(place)
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # diffusers notes where the base was loaded from: this machine's paths
            (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (folder / METADATA_FILE).write_text(json.dumps(dict(metadata), indent=2, sort_keys=True) + "\n", encoding="utf-8")

        return write

    def load(self, folder: Path) -> None:
        """Read the weights file by file, so that no second copy of the model is ever held."""
        place = folder / self.targets.folder
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"no weights in {place}", hint=f"Give a folder that holds {self.targets.folder}/*.safetensors.")
        own = self._denoiser.state_dict()
        seen: set[str] = set()
        for file in files:
            found = weights.read(file)
            weights.check_keys(file, found, own.keys() & found.keys())
            weights.check_shapes(file, found, {name: own[name] for name in found})
            seen |= found.keys()
            with torch.no_grad():
                for name, value in found.items():
                    own[name].copy_(value)
        weights.check_keys(place, seen, own)

    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        part, model = self.targets.folder, type(self._denoiser).__name__
        lines = [
            f"{part} = {model}.from_pretrained({folder!r}, subfolder={part!r}, torch_dtype=dtype)",
            f"pipeline = {pipeline_class}.from_pretrained({base!r}, {part}={part}, torch_dtype=dtype)",
        ]
        return snippet.render([f"from diffusers import {pipeline_class}, {model}"], lines, arguments)
