"""LyCORIS adapters: LoKr, LoHa, LoRA and their relatives, in files that the LyCORIS library loads."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris.logging import logger as library_logger
from lycoris.modules import LycorisBaseModule, get_module, make_module
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.lokr import LokrModule
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from simpletuner.adapters import snippet, weights
from simpletuner.adapters.adapter import ADAPTER_FILE, Adapter, Attached, Keep, Targets, Write, as_it_is
from simpletuner.adapters.applying import Applied
from simpletuner.adapters.factored import quicken
from simpletuner.adapters.folded_scales import SCALED, fold, is_folded, scale_ratio
from simpletuner.adapters.formats import lycoris as lycoris_format
from simpletuner.adapters.key_maps import Layout, underscored
from simpletuner.adapters.lycoris_file import DEFAULT_TARGETS, FULL_DIMENSION, ONE_FOR_ALL, LycorisFile, Recipe, read_lycoris, saved_config
from simpletuner.adapters.rank_masks import RankMasks, snippet_lines
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.steady_modules import SteadyDyLora, SteadyFull, steady_modules
from simpletuner.adapters.targets import (
    adaptable,
    grouped,
    is_low_precision,
    is_quantised,
    layout_of,
    match_pattern,
    owner_classes,
    plain_weight,
    resolve_class,
)
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.options.adapters import Adapters

CONFIG_FILE = "lycoris_config.json"


class Lycoris(Adapter):
    """A network of the LyCORIS library on a frozen denoiser.

    The denoiser's modules get new `forward` methods; its own tree and state dict stay as they are.
    """

    def __init__(self, options: Adapters, targets: Targets) -> None:
        super().__init__(options, targets)
        self._file = read_lycoris(options.lycoris_config)
        self._modules: dict[str, Recipe] = {}
        self._network = LycorisNetwork(nn.Identity(), init_only=True)
        self._masks = RankMasks([], 1, 1.0)
        self._is_on = False
        self._layout = Layout(targets.folder, targets.original_layout, {})
        self._model = ""

    def attach(self, denoiser: nn.Module) -> Attached:
        denoiser.requires_grad_(False)
        self._layout, self._model = layout_of(denoiser, self.targets.folder, self.targets.original_layout), type(denoiser).__name__
        self._modules = _resolve_modules(self._file, denoiser, self.targets)
        _check_precision(self._file, self._modules, denoiser)
        self._network = _build(self._file, self._modules, denoiser)
        if not self._network.loras:
            raise ConfigError(f"the targets in {self._file.source} leave nothing to adapt", hint="Look at exclude_name and enable_conv.")
        _check_loads_back(self._network, self._file)
        if self.options.init_lokr_norm is not None:
            _perturb(self._network, self.options.init_lokr_norm, self._file)
        _check_rank_masks(self._network, self._file)
        for lora in self._network.loras:
            lora.to(device=lora.org_module[0].weight.device)
        quicken(self._network.loras)
        self._masks = RankMasks(self._network.loras, self._file.ranks_in_noise, self._file.rank_power)
        self._network.apply_to()
        self._is_on = True
        return Attached(
            modules=len(self._network.loras),
            modules_total=len(adaptable(denoiser)),
            parameters=sum(parameter.numel() for parameter in self.parameters().values()),
            notes=(*(f"{self._file.source}: {note}" for note in self._file.notes), *_notes(self._network, self._file)),
            layers=tuple(self._modules),
        )

    def to(self, device: torch.device) -> None:
        self._network.to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._network.named_parameters())

    def set_strength(self, strength: float) -> None:
        """At 0 the base's own forward methods are put back: adding zeros would still turn -0 into 0."""
        if self._is_on != (strength != 0):
            for lora in self._network.loras:
                lora.apply_to() if strength else lora.restore()
            self._is_on = strength != 0
        self._network.set_multiplier(strength)

    def train(self, mode: bool) -> None:
        self._network.train(mode)

    def at_time(self, time: Tensor) -> None:
        self._masks.at_time(time)

    def saving(self, metadata: Mapping[str, str], keep: Keep = as_it_is) -> Write:
        """What writes the weights in float32 under the library's key names, and the settings beside them.

        A factor into which a scale was folded is float64 where float32 could not give the trained number back.
        """
        config = saved_config(self._file, self._modules)
        network = {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(config["linear_dim"]),
            "ss_network_alpha": f"{config['linear_alpha']:g}",
            "ss_network_args": json.dumps({"algo": config["algo"]}),
        }
        header = {**metadata, **network, "format": "pt", "lycoris_config": json.dumps(config)}
        kept = keep(self._state())

        def write(folder: Path) -> None:
            weights.write(folder / ADAPTER_FILE, self._in_file(kept), header)
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        return write

    def load(self, folder: Path) -> None:
        expected = self._in_file(self._state())
        found = lycoris_format.write(read_changes(folder, self._layout, self._model), self._layout, keeps_precision=True)
        for name, like in expected.items():
            if name.endswith(".alpha"):
                found.setdefault(name, like)  # without effect there, or it would have been read
        weights.check_keys(folder, found, expected)
        weights.check_shapes(folder, found, expected)
        with torch.no_grad():
            for lora in self._network.loras:
                if isinstance(lora, (SteadyFull, SteadyDyLora)):
                    lora.take({name: found[f"{lora.lora_name}.{name}"] for name in lora.state_dict()})
                    continue
                if isinstance(lora, TLoraModule):  # its scale is of a difference, which no tensor could take over
                    lora.alpha.copy_(found[f"{lora.lora_name}.alpha"])
                    lora.scale = float(lora.alpha) / lora.lora_dim
                unscaled = scale_ratio(lora, found)
                for name, parameter in lora.named_parameters():
                    value = found[f"{lora.lora_name}.{name}"]
                    if name in SCALED.get(type(lora), ()) and unscaled != (1.0, 1.0):
                        value = value.double() * unscaled[0] / unscaled[1]
                    parameter.copy_(value)

    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        lines = [
            f"pipeline = {pipeline_class}.from_pretrained({base!r}, torch_dtype=dtype)",
            f"adapter, _ = create_lycoris_from_weights(1.0, {f'{folder}/{ADAPTER_FILE}'!r}, pipeline.{self.targets.folder})",
        ]
        if all(lora.bypass_mode for lora in self._network.loras) and not self._masks.modules:
            lines += ["for module in adapter.loras:", "    module.bypass_mode = True  # as in training: keeps small changes that bf16 weights lose"]
        lines += ["adapter.apply_to()", "adapter.to(device)"]
        named = "create_lycoris_from_weights"
        if self._masks.modules:
            named = f"compute_timestep_mask, {named}, set_timestep_mask"
            lines += snippet_lines(self.targets.folder, self._masks.most, self._file.ranks_in_noise, self._file.rank_power)
        return snippet.render([f"from diffusers import {pipeline_class}", f"from lycoris import {named}"], lines, arguments)

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """The parameters and alphas of every module, by its name."""
        own = {lora.lora_name: lora.custom_state_dict() if isinstance(lora, TLoraModule) else lora.state_dict() for lora in self._network.loras}
        return {module: {name: value.detach() for name, value in state.items()} for module, state in own.items()}  # T-LoRA's start is the base's

    def _in_file(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What the file holds of these states, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for lora in self._network.loras:
            state = {name: value.float().cpu() for name, value in states[lora.lora_name].items()}
            if is_folded(lora):
                state["alpha"] = torch.tensor(float(lora.lora_dim))
                state |= {name: fold(state[name], lora.scale) for name in SCALED[type(lora)] if name in state}
            tensors |= {f"{lora.lora_name}.{name}": value for name, value in state.items()}
        return tensors


def apply_as_the_library(file: Path, denoiser: nn.Module) -> Applied:
    """Put a file on a denoiser as the library's own loader does."""
    layers = {f"lycoris_{underscored(name)}": name for name in adaptable(denoiser)}
    with torch.random.fork_rng(devices=[]), _quiet():
        network, found = create_lycoris_from_weights(1.0, str(file), denoiser)
    network.eval().apply_to()
    used = {f"{lora.lora_name}.{name}" for lora in network.loras for name in lora.state_dict()}
    return Applied(frozenset(layers[lora.lora_name] for lora in network.loras), tuple(sorted(set(found) - used)))


def _resolve_modules(file: LycorisFile, denoiser: nn.Module, targets: Targets) -> dict[str, Recipe]:
    """Give the denoiser's own class names, each with its recipe, and check that every target is there."""
    wanted = {name: file.module_recipes.get(name, file.recipe) for name in (*file.module_recipes, *file.modules)}
    if not file.names_targets:
        known = owner_classes(denoiser)
        present = [name for name in DEFAULT_TARGETS if known & {name, *targets.class_aliases.get(name, ())}]
        wanted = dict.fromkeys(present or DEFAULT_TARGETS, file.recipe)
    for pattern in (*file.names, *file.name_recipes):
        match_pattern(pattern, denoiser, file.use_fnmatch, file.source)
    resolved: dict[str, Recipe] = {}
    for name, recipe in sorted(wanted.items(), key=lambda item: item[0] in file.module_recipes):  # own recipes last: they win
        for class_name in resolve_class(name, denoiser, targets.class_aliases, file.source):
            if class_name == name or class_name not in file.module_recipes:
                resolved[class_name] = recipe
    return resolved


def _build(file: LycorisFile, modules: Mapping[str, Recipe], denoiser: nn.Module) -> LycorisNetwork:
    """Make the library's network, silently and with its presets left as they were found."""
    preset = {
        "ENABLE_CONV": file.enable_conv,
        "TARGET_REPLACE_MODULE": list(modules),
        "TARGET_REPLACE_NAME": list(file.names),
        "LORA_PREFIX": "lycoris",
        "MODULE_ALGO_MAP": {name: _override(recipe, file.recipe) for name, recipe in modules.items() if recipe is not file.recipe},
        "NAME_ALGO_MAP": {name: _override(recipe, file.recipe) for name, recipe in file.name_recipes.items()},
        "USE_FNMATCH": file.use_fnmatch,
        "TARGET_EXCLUDE_NAME": [*file.excluded, *grouped(denoiser)],
    }
    settings = dict(file.recipe.settings)
    dim, alpha = settings.pop("linear_dim"), settings.pop("linear_alpha")
    try:
        with _class_state(preset), steady_modules(), _quiet():
            return LycorisNetwork(
                denoiser,
                lora_dim=dim,
                alpha=alpha,
                conv_lora_dim=settings.pop("conv_dim", dim),
                conv_alpha=settings.pop("conv_alpha", alpha),
                network_module=file.recipe.algo,
                warn_on_unmatched=False,
                **settings,
            )
    except ValueError as error:  # what the library says of a layer that an algorithm cannot divide
        raise ConfigError(f"LyCORIS cannot adapt this model as {file.source} says: {error}", hint="Try another linear_dim or algo.") from error


def _override(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """The settings of one target in the words of the library's algorithm maps."""
    words = {"linear_dim": "dim", "linear_alpha": "alpha"}
    chosen = {
        words.get(key, key): value
        for key, value in recipe.settings.items()
        if key not in ONE_FOR_ALL and (key not in words or value != base.settings[key])
    }
    return {"algo": recipe.algo, **chosen}


@contextlib.contextmanager
def _class_state(preset: Mapping[str, Any]) -> Iterator[None]:
    """Set a preset for the length of a block: the library keeps it on the class, where it would reach the next network."""
    before = {name: getattr(LycorisNetwork, name) for name in preset}
    try:
        for name, value in preset.items():
            setattr(LycorisNetwork, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own lines off the screen: ours say the same once and in place."""
    level = library_logger.level
    library_logger.setLevel(logging.ERROR)
    gc.freeze()  # T-LoRA sweeps for garbage once a module, which takes long where there are many objects; now there are few
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()
        library_logger.setLevel(level)


def _check_precision(file: LycorisFile, modules: Mapping[str, Recipe], denoiser: nn.Module) -> None:
    """Refuse a form that must read the base's weights where they are quantised: the library fails, or leaves part of it out."""
    recipes = [*modules.values(), *file.name_recipes.values(), *([file.recipe] if file.names else [])]
    reads_base = any(not recipe.is_factored or recipe.algo == "tlora" for recipe in recipes)
    if reads_base and any(is_quantised(module) for module in adaptable(denoiser).values()):
        raise ConfigError(
            f"the adapter in {file.source} must read the weights of the base, which are quantised",
            hint="Use lokr, lora, loha or glora without weight_decompose and bypass_mode: false, or set base_model_precision to no_change.",
        )


def _check_rank_masks(network: LycorisNetwork, file: LycorisFile) -> None:
    """Refuse convolutions over more than a pixel: the library adapts them by a wrong part of their weight."""
    convolutions = [lora for lora in network.loras if isinstance(lora, TLoraModule) and lora.isconv]
    wrong = [lora.lora_name for lora in convolutions if math.prod(lora.org_module[0].kernel_size) > 1]
    if wrong:
        raise ConfigError(
            f"algo tlora cannot adapt {wrong[0]} and {len(wrong) - 1} other convolutions",
            hint=f"Set enable_conv to false in apply_preset of {file.source}, or give them another algo in module_algo_map.",
        )


def _check_loads_back(network: LycorisNetwork, file: LycorisFile) -> None:
    """Refuse what the library could not load: it guesses the LoKr factor from shapes, and for some pairs guesses wrong."""
    seen = set()
    for lora in network.loras:
        shapes = _shapes(lora)
        if (type(lora), lora.shape, shapes) in seen:
            continue
        seen.add((type(lora), lora.shape, shapes))
        if not _loads_back(lora):
            better = _loadable_factor(lora)
            raise ConfigError(
                f"{lora.lora_name}: a {lora.shape[1]} -> {lora.shape[0]} layer with these settings gives a file that LyCORIS cannot load",
                hint=f"Use factor {better} for it in {file.source}." if better else f"Exclude it with exclude_name in {file.source}.",
            )


def _loads_back(lora: LycorisBaseModule) -> bool:
    if isinstance(lora, IA3Module):  # the library cannot load any such file; `_notes` says so
        return True
    state = {f"{lora.lora_name}.{name}": value.detach() for name, value in lora.state_dict().items()}
    with torch.random.fork_rng(devices=[]), _quiet():  # the trial's initialisation must not move the run's
        kind, parts = get_module(state, lora.lora_name)
        try:
            again = make_module(kind, parts, lora.lora_name, lora.org_module[0])
        except (RuntimeError, AttributeError):  # shapes that do not fit, a tensor that the guessed layout lacks
            return False
    return again is not None and _shapes(again) == _shapes(lora)


def _loadable_factor(lora: LycorisBaseModule) -> int | None:
    """The largest LoKr factor up to 16 that divides both sides of a layer and loads back."""
    for factor in (factor for factor in range(16, 1, -1) if isinstance(lora, LokrModule) and not any(side % factor for side in lora.shape[:2])):
        with torch.random.fork_rng(devices=[]), _quiet():
            trial = LokrModule(lora.lora_name, lora.org_module[0], 1.0, lora.lora_dim, factor=factor)
        if _loads_back(trial):
            return factor
    return None


def _shapes(lora: LycorisBaseModule) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, value.shape) for name, value in lora.state_dict().items())


def _perturb(network: LycorisNetwork, scale: float, file: LycorisFile) -> None:
    """Start LoKr from a small normal change of each weight: every block alike, `scale` times the weight's spread."""
    with torch.no_grad():
        for lora in network.loras:
            if not (isinstance(lora, LokrModule) and lora.use_w1 and lora.use_w2):
                raise ConfigError(
                    f"init_lokr_norm {scale:g} needs LoKr with whole factors, which {file.source} does not give {lora.lora_name}",
                    hint=f"Set algo to lokr and linear_dim to {FULL_DIMENSION}, or leave init_lokr_norm out.",
                )
            base = lora.org_module[0]
            weight = plain_weight(base)
            lora.lokr_w1.fill_(1.0)
            lora.lokr_w2.copy_(torch.randn(lora.lokr_w2.shape) * (scale * weight.float().std().item()))


def _notes(network: LycorisNetwork, file: LycorisFile) -> list[str]:
    """Say what attaching showed: settings without effect, precision lost."""
    said = []
    alpha, dim = (file.recipe.settings.get(key) for key in ("linear_alpha", "linear_dim"))
    if alpha != dim and all(isinstance(lora, LokrModule) and lora.use_w1 and lora.use_w2 for lora in network.loras):
        said.append(f"{file.source}: linear_alpha {alpha:g} has no effect: linear_dim {dim} keeps both LoKr factors whole")
    if any(isinstance(lora, IA3Module) for lora in network.loras):
        said.append(f"{file.source}: LyCORIS cannot load files of algo ia3; `simpletuner merge` bakes this adapter into a pipeline")
    if any(not (lora.bypass_mode or isinstance(lora, (SteadyFull, SteadyDyLora))) and is_low_precision(lora.org_module[0]) for lora in network.loras):
        said.append(f"{file.source}: the adapted weights are built in the base's 16 bits, which loses small changes; LoKr, LoRA and LoHa need not")
    return said
