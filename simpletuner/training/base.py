"""The frozen base: in the precision that the options name, layer by layer, and from what an earlier run quantised where that is kept."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from simpletuner.adapters.adapter import Adapter
from simpletuner.memory.offload import is_asked_for, placement
from simpletuner.memory.residency import weight_dtype
from simpletuner.memory.settle import Place, Recipe, WeightBytes, recipe_of
from simpletuner.memory.weight_store import WeightStore
from simpletuner.models.family import ModelFamily
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from

FOLDER = "weights"
"""In `cache_dir`."""


def load_denoiser(config: TrainConfig, family: ModelFamily, adapter: Adapter, accelerator: Accelerator, warn: Callable[[str], object]) -> nn.Module:
    """Load the base in the precision in which it will be used: on the CPU if it is trained itself, where its layers rest if not."""
    if adapter.trains_base:
        return family.load_denoiser(torch.float32, seed_from("model", config.training.seed))
    return load_frozen(config, family, accelerator, warn)


def load_frozen(config: TrainConfig, family: ModelFamily, accelerator: Accelerator, warn: Callable[[str], object]) -> nn.Module:
    """Load the base in the precision and place in which it is used where it is not trained itself."""
    return family.load_frozen(recipe_for(config, family, accelerator, warn), seed_from("model", config.training.seed))


def recipe_for(config: TrainConfig, family: ModelFamily, accelerator: Accelerator, warn: Callable[[str], object]) -> Recipe:
    """How the options want the frozen denoiser to be held.

    Args:
        warn: is told where quantised weights cannot be kept.

    Raises:
        ConfigError: no such precision.
    """
    memory, device = config.memory, accelerator.device
    recipe = recipe_of(memory.base_model_precision, weight_dtype(memory), device, family.delicate_layers)
    recipe = replace(recipe, through_device=memory.quantize_via == "accelerator")
    if is_asked_for(memory):
        recipe = replace(recipe, placement=partial(_placed, config, device))
    if not recipe.row.library or not memory.keep_quantised_weights or family.starts_random:
        return recipe
    root = Path(config.data.cache_dir)
    return replace(recipe, store=WeightStore(root / FOLDER / _name_of(recipe, family, root), accelerator.is_main_process, warn))


def risks(family: ModelFamily, layers: Sequence[str]) -> list[str]:
    """What is known of adapters on these layers of a denoiser, a sentence each."""
    return [known for pattern, known in family.risky_layers.items() if any(fnmatch.fnmatch(name, pattern) for name in layers)]


def text_recipes(options: Memory, device: torch.device) -> list[Recipe]:
    """How the options want the text encoders to be held, in their order.

    Raises:
        ConfigError: no such precision.
    """
    names = [options.text_encoder_1_precision, options.text_encoder_2_precision, options.text_encoder_3_precision, options.text_encoder_4_precision]
    keys = [f"text_encoder_{number}_precision" for number in range(1, 5)]
    return [recipe_of(name, weight_dtype(options), device, key=key) for name, key in zip(names, keys)]


def check_precisions(options: Memory, device: torch.device) -> None:
    """Refuse what this machine cannot do, before anything is made.

    Raises:
        ConfigError: no such precision, a missing package or compiler, or a device that cannot.
    """
    base = recipe_of(options.base_model_precision, weight_dtype(options), device)
    for recipe in (replace(base, through_device=options.quantize_via == "accelerator"), *text_recipes(options, device)):
        recipe.check()


def _placed(config: TrainConfig, device: torch.device, network: nn.Module, sizes: WeightBytes) -> Place:
    return placement(network, config.memory, device, sizes)


def _name_of(recipe: Recipe, family: ModelFamily, memo_folder: Path) -> str:
    """A name that changes with all that quantised weights depend on."""
    try:
        release = version(recipe.row.package)
    except PackageNotFoundError:  # the recipe itself says so, where it is used
        release = ""
    facts = (family.denoiser_fingerprint(memo_folder), recipe.row.name, release, recipe.dtype, recipe.keep, recipe.device.type)
    return f"{recipe.row.name}-{hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()}"
