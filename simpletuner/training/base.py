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
from simpletuner.errors import ConfigError
from simpletuner.memory.offload import is_asked_for, placement
from simpletuner.memory.precision import find
from simpletuner.memory.residency import DTYPES, weight_dtype
from simpletuner.memory.settle import Place, Recipe, WeightBytes, recipe_of
from simpletuner.memory.weight_store import WeightStore
from simpletuner.models.family import ModelFamily
from simpletuner.optim.rules import trains_in
from simpletuner.options.memory import Memory
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.checkpoint import Checkpoint

FOLDER = "weights"
"""In `cache_dir`."""


def load_denoiser(config: TrainConfig, family: ModelFamily, adapter: Adapter, accelerator: Accelerator, warn: Callable[[str], object]) -> nn.Module:
    """Load the base in the precision in which it will be used: on the CPU if it is trained itself, where its layers rest if not."""
    if adapter.trains_base:
        return family.load_denoiser(trained_dtype(config), seed_from("model", config.training.seed))
    return load_frozen(config, family, accelerator, warn)


def trained_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of a denoiser whose own weights are all trained.

    Raises:
        ConfigError: the optimizer cannot train in it.
    """
    return DTYPES[trains_in(config.optim, config.memory)]


def check_goes_on(config: TrainConfig, family: ModelFamily, checkpoint: Checkpoint | None) -> None:
    """Refuse to turn the weights of a checkpoint into another format unasked, where they are all trained; nothing is loaded for it.

    Args:
        checkpoint: what the run goes on from, if anything.

    Raises:
        ConfigError: they would be, and which option keeps them as they are.
    """
    if checkpoint is None or config.adapters.model_type != "full" or config.memory.base_model_default_dtype != "default":
        return
    found = _formats_in(checkpoint.folder / family.denoiser_folder)
    before, now = "bf16" if "BF16" in found else "fp32", trains_in(config.optim, config.memory)
    if before == now or not found:
        return
    said = f"{checkpoint.folder.name} was trained in {before}, and base_model_default_dtype default now is {now}"
    lost = "what the optimizer has gathered would be dropped"
    if now == "bf16":
        raise ConfigError(
            f"{said}: its weights would be rounded for good, and {lost}",
            hint="Set base_model_default_dtype to fp32 to go on as before, or to bf16 if that is wanted.",
        )
    raise ConfigError(
        f"{said}: {lost}",
        hint="Go on with the mixed_precision, optimizer and optimizer_config of before, or set base_model_default_dtype to fp32 if that is wanted.",
    )


def _formats_in(folder: Path) -> set[str]:
    """The formats of saved weights, as their files name them, such as BF16."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


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
    recipe = recipe_without_store(config, family, accelerator.device)
    folder = store_folder(config, family, recipe)
    if folder is None:
        return recipe
    about = {
        "base": str(family.source.part(family.denoiser_folder)),
        "precision": recipe.row.name,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "device": recipe.device.type,
    }
    return replace(recipe, store=WeightStore(folder, accelerator.is_main_process, warn, about))


def recipe_without_store(config: TrainConfig, family: ModelFamily, device: torch.device) -> Recipe:
    """The same where nothing is kept for the next start.

    Raises:
        ConfigError: no such precision.
    """
    memory = config.memory
    recipe = recipe_of(memory.base_model_precision, weight_dtype(memory), device, family.delicate_layers)
    recipe = replace(recipe, through_device=memory.quantize_via == "accelerator")
    if is_asked_for(memory):
        recipe = replace(recipe, placement=partial(_placed, config, device))
    return recipe


def store_folder(config: TrainConfig, family: ModelFamily, recipe: Recipe) -> Path | None:
    """Where the quantised base of a run is kept for its next start; None if it is not."""
    root = Path(config.data.cache_dir)
    return root / FOLDER / _name_of(recipe, family, root) if keeps_quantised(config, family) else None


def keeps_quantised(config: TrainConfig, family: ModelFamily) -> bool:
    """Whether a base that is not trained is quantised, and kept so for the next start."""
    memory = config.memory
    return bool(find(memory.base_model_precision).library) and memory.keep_quantised_weights and not family.starts_random


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
