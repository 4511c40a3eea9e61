"""The datasets of a run: found, counted, and given to caches and loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend
from simpletuner.data.buckets import Group, check_size, describe
from simpletuner.data.contents import ContentBook, ImageReader
from simpletuner.data.crops import kept_crops
from simpletuner.data.discover import Discovery, discover
from simpletuner.data.index import Changes
from simpletuner.data.plan import DataPlan, ImageDataset, load_plan
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.data.variation import Variation
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.options.training import Training
from simpletuner.training.summary import DatasetFacts
from simpletuner.types import Sample


@dataclass(frozen=True, slots=True)
class Datasets:
    """The plan of a run's data, and what was found of it."""

    plan: DataPlan
    found: tuple[tuple[ImageDataset, Discovery], ...]
    backends: Mapping[str, DataBackend]
    """By dataset id."""
    index_folder: Path
    seed: int
    book: ContentBook
    """What reading images whole has told of them, in this run and before."""

    def samples(self) -> list[Sample]:
        return [sample for _, discovery in self.found for sample in discovery.samples]

    def crops(self) -> list[Sample]:
        """Every sample with every crop of it that is kept."""
        return list(kept_crops(self.samples(), self.seed))

    def images(self) -> ImageReader:
        """Access to the pictures."""
        return ImageReader(self.backends, self.book)

    def looked_at_again(self, family: ModelFamily, console: Console, accelerator: Accelerator) -> Datasets:
        """The datasets as the index knows them now, after images were read whole: without those that turned out to be damaged.

        Raises:
            ConfigError: an image's true size makes a bucket that the model cannot take.
        """
        with accelerator.main_process_first():
            found = tuple((dataset, discover(dataset, self.index_folder, self.seed, console)) for dataset in self.plan.datasets)
        for dataset, discovery in found:
            check_buckets(dataset, discovery, family)
        said = {note for _, discovery in self.found for note in discovery.notes}
        for note in (note for _, discovery in found for note in discovery.notes if note not in said):
            console.say(f"note: {note}")
        # What changed since the last start is what the first look of this one saw.
        kept = tuple(
            (dataset, replace(after, changes=before.changes, caption_changes=before.caption_changes, settings=before.settings))
            for (dataset, after), (_, before) in zip(found, self.found)
        )
        return replace(self, found=kept, book=ContentBook(self.index_folder))

    def stores(self) -> Mapping[str, Store]:
        """Where each dataset's latents are kept, by dataset id."""
        return {dataset.id: Store(dataset.cache_dir_vae) for dataset, _ in self.found}

    def variations(self) -> Mapping[str, Variation]:
        """The versions of captions, of each dataset that has them."""
        return {dataset.id: dataset.variation for dataset, _ in self.found if dataset.variation is not None}

    def groups(self) -> list[Group]:
        return [
            Group(dataset.id, discovery.samples, dataset.repeats, dataset.probability, dataset.train_batch_size, dataset.window)
            for dataset, discovery in self.found
        ]

    def sampler(self, config: TrainConfig, accelerator: Accelerator) -> Sampler:
        """The order in which all of this is drawn.

        Raises:
            DatasetError: a dataset cannot fill one optimizer step, or the processes found different ones.
            ConfigError: at some step of the run no dataset takes part.
        """
        training = config.training
        for group in self.groups():
            check_size(group, training.train_batch_size, training.gradient_accumulation_steps, training.num_processes)
        sampler = Sampler(self.groups(), training.train_batch_size, training.seed, training.gradient_accumulation_steps * training.num_processes)
        total_steps(training, sampler)
        refuse_disagreement(sampler, accelerator)
        return sampler

    def facts(self, batch_size: int, versions: Mapping[str, str]) -> list[DatasetFacts]:
        """A line for the summary of each.

        Args:
            versions: dataset id to how many embeddings the versions of its captions make.
        """
        return [
            DatasetFacts(
                name=dataset.id,
                images=len(discovery.samples),
                buckets=[(str(row.bucket), row.images) for row in describe(group, batch_size)],
                repeats=dataset.repeats,
                is_regularisation=dataset.is_regularisation,
                skipped={rule: len(names) for rule, names in discovery.skipped.items()},
                captions=versions.get(dataset.id, ""),
                changes=changes_of(discovery),
            )
            for (dataset, discovery), group in zip(self.found, self.groups())
        ]


def total_steps(training: Training, sampler: Sampler) -> int:
    """Optimizer steps of the run.

    Raises:
        ConfigError: at some step of it no dataset takes part.
    """
    per_step, end = sampler.batches_per_step, sampler.end
    epochs = training.num_train_epochs or 1
    total = training.max_train_steps or math.ceil(sum(sampler.batches_per_epoch(epoch) for epoch in range(epochs)) / per_step)
    if end is None or end >= total * per_step:
        return total
    epoch, _ = sampler.locate(end)
    if not training.max_train_steps and epoch >= epochs and end >= per_step:
        return end // per_step  # what is left over fills no step, and no epoch follows to fill it up
    raise ConfigError(
        f"no dataset takes part from step {end // per_step + 1} on, in epoch {epoch + 1}; the run has {total} steps",
        hint="Look at start_epoch, end_epoch, start_step and end_step: at every step at least one dataset must take part.",
    )


def changes_of(discovery: Discovery) -> str:
    """What is different from the last start: images, captions, settings; empty if nothing is."""
    parts = []
    if discovery.changes != Changes():
        parts.append(str(discovery.changes))
    if discovery.caption_changes != Changes():
        parts.append(f"captions {discovery.caption_changes}")
    return "; ".join([*([", ".join(parts)] if parts else []), *discovery.settings])


def refuse_disagreement(sampler: Sampler, accelerator: Accelerator) -> None:
    """See to it that all processes found the same: each looks at the files by itself.

    Raises:
        DatasetError: they did not.
    """
    if accelerator.num_processes == 1:
        return
    mine = torch.tensor([list(bytes.fromhex(sampler.digest()))], device=accelerator.device)
    if not bool((accelerator.gather(mine) == mine).all()):
        raise DatasetError(
            "the processes of this run found different images or captions",
            hint="Files were changed while they looked, or could not be read for a moment. Start the same command again.",
        )


def check_buckets(dataset: ImageDataset, discovery: Discovery, family: ModelFamily) -> None:
    """Refuse a dataset of which a picture is of a size that the model cannot take; names one such image.

    Raises:
        ConfigError: says what the dataset asks for and what to change in it.
    """
    for bucket, image in {sample.geometry.bucket: sample for sample in reversed(discovery.samples)}.items():
        try:
            family.check_size(bucket)
        except ConfigError as error:
            shown = f"{image.name}, {image.geometry.original}, becomes {bucket} by {dataset.geometry}"
            aligned = f" {error.hint}" if "alignment" in str(error.hint) else ""
            raise ConfigError(
                f"dataset {dataset.id!r}: {error.message} ({shown})",
                hint=f'Lower the resolution of the dataset, or set "crop": true for squares.{aligned}',
            ) from error


def find_datasets(config: TrainConfig, family: ModelFamily, variables: Mapping[str, str], console: Console, accelerator: Accelerator) -> Datasets:
    """Read the plan and find every dataset's samples. The first process looks; the others then find its index warm.

    Raises:
        ConfigError: the plan is wrong, or a bucket is a size that the model cannot take.
        DatasetError: data is missing or unusable.
    """
    plan = load_plan(config.data.data_backend_config, config.data, variables, alignment_px=family.alignment_px)
    for note in plan.notes:
        console.say(f"note: {note}")
    index_folder = Path(config.data.cache_dir) / "index"
    with accelerator.main_process_first():
        found = tuple((dataset, discover(dataset, index_folder, config.training.seed, console)) for dataset in plan.datasets)
    for dataset, discovery in found:
        for note in discovery.notes:
            console.say(f"note: {note}")
        check_buckets(dataset, discovery, family)
    datasets = Datasets(
        plan, found, {dataset.id: dataset.open() for dataset, _ in found}, index_folder, config.training.seed, ContentBook(index_folder)
    )
    for group in datasets.groups():
        size = group.batch_size or config.training.train_batch_size
        if len(group.samples) < size:
            console.say(f"note: dataset {group.name!r}: a batch of {size} holds some of its {len(group.samples)} images more than once")
    return datasets
