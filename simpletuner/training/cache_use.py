"""Which cache entries a config uses: what a run of it would look for, and would have to make if it were gone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from simpletuner.console import Console
from simpletuner.data.contents import SetAside
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import prompts_of
from simpletuner.data.store import Store
from simpletuner.data.variation import expand
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.assemble import build_family
from simpletuner.training.caching import TextEncoders, Vae
from simpletuner.training.datasets import Datasets, find_datasets
from simpletuner.training.machine import start_accelerator
from simpletuner.training.prompts import pictures, prompts_to_show


def used_keys(config: TrainConfig, variables: Mapping[str, str], console: Console) -> dict[Path, set[str]]:
    """The keys that a run uses, by resolved cache folder. No network is loaded; images that were never read whole are read.

    The VAE's usual precision differs between a CPU and an accelerator, and so do the keys: ask on a machine like the one that trains.

    Args:
        variables: values for `{name}` in multidatabackend.json.

    Raises:
        SimpleTunerError: what a run would also refuse.
    """
    family = build_family(config)
    family.check_source()
    accelerator = start_accelerator(config)
    datasets = find_datasets(config, family, variables, console, accelerator)
    used = {datasets.plan.text_cache_dir.resolve(): used_embeds(config, family, datasets, console, accelerator.device)}
    for folder, keys in used_latents(config, family, datasets, console, accelerator.device).items():
        used.setdefault(folder, set()).update(keys)
    return used


def used_embeds(config: TrainConfig, family: ModelFamily, datasets: Datasets, console: Console, device: torch.device) -> set[str]:
    """Keys of all captions, their versions, and the prompts of validation."""
    encoders = TextEncoders(family, config.memory, device, Path(config.data.cache_dir))
    embeds = EmbedCache(Store(datasets.plan.text_cache_dir), encoders.encode, encoders.fingerprint(), 1, warn=console.warn)
    expansions = [expand(discovery.samples, dataset.variation) for dataset, discovery in datasets.found]
    shown = prompts_to_show(pictures(config.validation, config.training.seed, family))
    return {embeds.key(prompt) for prompt in (*prompts_of(expansions, config.data.caption_dropout_probability), *shown)}


def used_latents(config: TrainConfig, family: ModelFamily, datasets: Datasets, console: Console, device: torch.device) -> dict[Path, set[str]]:
    """Keys of all images with all kept crops, by resolved folder."""
    vae = Vae(family, config.memory, device, Path(config.data.cache_dir), stays=False)
    images = datasets.images()
    unread = [sample for sample in datasets.samples() if not images.content(sample)]
    with console.bar("reading new images", len(unread)) as bar:
        for sample in unread:
            with suppress(SetAside):
                images.open(sample)
            bar.advance()
    images.save()
    latents = LatentCache(None, vae.encode, vae.fingerprint(), images, 1, warn=console.warn)
    folders = {dataset.id: dataset.cache_dir_vae.resolve() for dataset, _ in datasets.found}
    used: dict[Path, set[str]] = {folder: set() for folder in folders.values()}
    for sample in datasets.crops():
        if images.content(sample):
            used[folders[sample.backend]].add(latents.key(sample))
    return used
