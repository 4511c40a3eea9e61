"""Which cache entries a config uses: what a run of it would look for, and would have to make if it were gone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from simpletuner.adapters.adapter import kind_of
from simpletuner.console import Console
from simpletuner.data.contents import SetAside
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.base import recipe_without_store, store_folder
from simpletuner.training.building import build_family
from simpletuner.training.caching import open_caches
from simpletuner.training.datasets import Datasets, find_datasets
from simpletuner.training.identities import identified_parts, learn_identities
from simpletuner.training.machine import start_accelerator
from simpletuner.training.prompts import pictures, prompts_to_show


def used_keys(config: TrainConfig, variables: Mapping[str, str], console: Console) -> dict[str, set[str]]:
    """The keys that a run uses, by identity of the place. No network is loaded; images that were never read whole are read.

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
    read_whole(datasets, console)
    learn_identities(family, identified_parts(config, family), Path(config.data.cache_dir), console)
    opened = open_caches(config, family, datasets, accelerator.device, console.warn)
    _, prompts = opened.prompts(datasets, prompts_to_show(pictures(config.validation, config.training.seed, family)))
    found = [opened.embeds.used(prompts), opened.latents(datasets).used(datasets.crops())]
    found += [masks.used(datasets.masks(name)) for name, masks in opened.masks(datasets).items()]
    used: dict[str, set[str]] = {}
    for part in found:
        for identity, keys in part.items():
            used.setdefault(identity, set()).update(keys)
    return used


def used_weights(config: TrainConfig) -> Path | None:
    """The folder in which a run keeps its quantised base, on a device like this machine's; None if it keeps none.

    Raises:
        SimpleTunerError: what a run would also refuse.
    """
    family = build_family(config)
    if kind_of(config.adapters) == "full":
        return None
    family.check_source()
    return store_folder(config, family, recipe_without_store(config, family, start_accelerator(config).device))


def read_whole(datasets: Datasets, console: Console) -> None:
    """Read the images that never were, whose keys nobody knows."""
    images = datasets.images()
    unread = [sample for sample in datasets.files() if not images.content(sample)]
    with console.bar("reading new images", len(unread)) as bar:
        for sample in unread:
            with suppress(SetAside):
                images.open(sample)
            bar.advance()
    images.save()
