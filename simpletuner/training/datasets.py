"""The datasets of a run: found, counted, and given to caches and loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend
from simpletuner.data.buckets import Group, check_size, describe
from simpletuner.data.discover import Discovery, discover
from simpletuner.data.images import read_pixels
from simpletuner.data.index import Changes, digest
from simpletuner.data.plan import DataPlan, ImageDataset, load_plan
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.summary import DatasetFacts
from simpletuner.types import Sample


@dataclass(frozen=True, slots=True)
class Datasets:
    """The plan of a run's data, and what was found of it."""

    plan: DataPlan
    found: tuple[tuple[ImageDataset, Discovery], ...]
    backends: Mapping[str, DataBackend]
    """By dataset id."""

    def samples(self) -> list[Sample]:
        return [sample for _, discovery in self.found for sample in discovery.samples]

    def pixels(self, sample: Sample) -> Tensor:
        """One training picture, (3, H, W) in [-1, 1]."""
        data = self.backends[sample.backend].read(sample.name)
        if digest(data) != sample.content:  # or its latents would be kept under the old picture's key
            raise DatasetError(f"{sample.id} was changed since the run began", hint="Start the same command again.")
        return read_pixels(data, sample.geometry, sample.id)

    def stores(self) -> Mapping[str, Store]:
        """Where each dataset's latents are kept, by dataset id."""
        return {dataset.id: Store(dataset.cache_dir_vae) for dataset, _ in self.found}

    def groups(self) -> list[Group]:
        return [
            Group(dataset.id, discovery.samples, dataset.repeats, dataset.probability, dataset.train_batch_size) for dataset, discovery in self.found
        ]

    def sampler(self, config: TrainConfig) -> Sampler:
        """The order in which all of this is drawn.

        Raises:
            DatasetError: a dataset cannot fill one optimizer step.
        """
        training = config.training
        for group in self.groups():
            check_size(group, training.train_batch_size, training.gradient_accumulation_steps, training.num_processes)
        return Sampler(self.groups(), training.train_batch_size, training.seed)

    def facts(self, batch_size: int) -> list[DatasetFacts]:
        """A line for the summary of each."""
        return [
            DatasetFacts(
                name=dataset.id,
                images=len(discovery.samples),
                buckets=[(str(row.bucket), row.images) for row in describe(group, batch_size)],
                repeats=dataset.repeats,
                is_regularisation=dataset.is_regularisation,
                skipped={rule: len(names) for rule, names in discovery.skipped.items()},
                changes=changes_of(discovery),
            )
            for (dataset, discovery), group in zip(self.found, self.groups())
        ]


def changes_of(discovery: Discovery) -> str:
    """What is different from the last start, images and captions; empty if nothing is."""
    parts = []
    if discovery.changes != Changes():
        parts.append(str(discovery.changes))
    if discovery.caption_changes != Changes():
        parts.append(f"captions {discovery.caption_changes}")
    return ", ".join(parts)


def find_datasets(config: TrainConfig, family: ModelFamily, variables: Mapping[str, str], console: Console, accelerator: Accelerator) -> Datasets:
    """Read the plan and find every dataset's samples. The first process looks; the others then find its index warm.

    Raises:
        ConfigError: the plan is wrong, or a bucket is a size that the model cannot take.
        DatasetError: data is missing or unusable.
    """
    plan = load_plan(config.data.data_backend_config, config.data, variables, alignment_px=family.alignment_px)
    for note in plan.notes:
        console.say(f"note: {note}")
    with accelerator.main_process_first():
        index_folder = Path(config.data.cache_dir) / "index"
        found = tuple((dataset, discover(dataset, index_folder, config.training.seed, console)) for dataset in plan.datasets)
    for dataset, discovery in found:
        for note in discovery.notes:
            console.say(f"note: {note}")
        for size in {sample.geometry.bucket for sample in discovery.samples}:
            try:
                family.check_size(size)
            except ConfigError as error:
                raise ConfigError(f"dataset {dataset.id!r}: {error.message}", error.hint) from error
    return Datasets(plan, found, {dataset.id: dataset.open() for dataset, _ in found})
