"""The datasets of a run: found, counted, and given to caches and loader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend
from simpletuner.data.buckets import Group, check_size, describe
from simpletuner.data.companions import Companions, find_companions, paired
from simpletuner.data.contents import ContentBook, ImageReader
from simpletuner.data.crops import kept_crops
from simpletuner.data.discover import Discovery, discover, skip_notes, take_up
from simpletuner.data.faults import OF_BROKEN_FILES
from simpletuner.data.held_out import HeldOut, held_out_of, idle_notes
from simpletuner.data.images import read_pixels
from simpletuner.data.index import Changes, open_index
from simpletuner.data.plan import DataPlan, ImageDataset, load_plan
from simpletuner.data.sampler import Sampler, total_steps
from simpletuner.data.store import Store
from simpletuner.data.variation import Variation
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.summary import DatasetFacts
from simpletuner.types import Geometry, Sample


@dataclass(frozen=True, slots=True)
class Datasets:
    """The plan of a run's data, and what was found of it."""

    plan: DataPlan
    found: tuple[tuple[ImageDataset, Discovery], ...]
    """All datasets of pictures, those that are held out too."""
    companions: Mapping[str, tuple[Companions, ...]]
    """Dataset id to what goes along with its pictures."""
    backends: Mapping[str, DataBackend]
    """By dataset id, those of conditioning datasets too."""
    index_folder: Path
    seed: int
    book: ContentBook
    """What reading images whole has told of them, in this run and before."""
    held_out: HeldOut
    refuses_broken: bool = False
    """Whether an image that turns out to be broken ends the run."""

    @property
    def trained(self) -> list[tuple[ImageDataset, Discovery]]:
        return [(dataset, discovery) for dataset, discovery in self.found if not dataset.is_eval]

    def held_out_samples(self) -> dict[str, Sequence[Sample]]:
        """Samples that are never trained on, by dataset id."""
        return {dataset.id: discovery.samples for dataset, discovery in self.found if dataset.is_eval}

    def pictures(self) -> list[Sample]:
        return [sample for _, discovery in self.found for sample in discovery.samples]

    def samples(self) -> list[Sample]:
        """Everything of which latents are made, each in its first crop: pictures, and the references that go along with them."""
        return [*self.pictures(), *self._companions(self.pictures(), is_mask=False)]

    def crops(self) -> list[Sample]:
        """All of that with every crop that is kept."""
        pictures = list(kept_crops(self.pictures(), self.seed))
        return [*pictures, *self._companions(pictures, is_mask=False)]

    def masks(self, conditioning: str) -> list[Sample]:
        """The masks of one conditioning dataset that pictures have, with every crop that is kept."""
        return [
            one.of(sample)
            for dataset, discovery in self.found
            for one in self.companions[dataset.id]
            if one.conditioning.is_mask and one.conditioning.id == conditioning
            for sample in kept_crops(discovery.samples, self.seed)
        ]

    def files(self) -> list[Sample]:
        """Every file that is read whole: pictures, references, masks, each in its first crop."""
        masks = self._companions(self.pictures(), is_mask=True)
        return [*self.samples(), *masks]

    def notes(self) -> list[str]:
        """What is to be said of all that was found."""
        besides = dict.fromkeys(note for several in self.companions.values() for one in several for note in one.notes)
        return [*(note for _, discovery in self.found for note in discovery.notes), *besides]

    def _companions(self, pictures: Sequence[Sample], *, is_mask: bool) -> list[Sample]:
        besides = [(sample, one) for sample in pictures for one in self.companions.get(sample.backend, ())]
        return [one.of(sample) for sample, one in besides if one.conditioning.is_mask == is_mask]

    def images(self, decode: Callable[[bytes, Geometry, str], Tensor] = read_pixels) -> ImageReader:
        """Access to the pictures, decoded as they are, or as masks."""
        return ImageReader(self.backends, self.book, decode)

    def looked_at_again(self, family: ModelFamily, console: Console, accelerator: Accelerator) -> Datasets:
        """The datasets as the index knows them now, after images were read whole: without those that turned out to be damaged.

        Raises:
            ConfigError: an image's true size makes a bucket that the model cannot take.
        """
        with accelerator.main_process_first():
            found, companions = look(self.plan, self.held_out, self.index_folder, self.seed, console)
        if self.refuses_broken:
            refuse_broken(found)
        for dataset, discovery in found:
            check_buckets(dataset, discovery, family)
        said = {*self.notes()}
        for note in (note for note in replace(self, found=found, companions=companions).notes() if note not in said):
            console.say(f"note: {note}")
        # What changed since the last start is what the first look of this one saw.
        kept = tuple(
            (dataset, replace(after, changes=before.changes, caption_changes=before.caption_changes, settings=before.settings))
            for (dataset, after), (_, before) in zip(found, self.found)
        )
        return replace(self, found=kept, companions=companions, book=ContentBook(self.index_folder))

    def take_up(self) -> None:
        """This run trains on all of this: the next start counts changes from here."""
        for dataset, _ in self.found:
            take_up(dataset, self.index_folder, self.seed)
        for one in self.plan.conditioning:
            with open_index(self.index_folder / f"{one.id}.sqlite") as index:
                index.take_up({})

    def stores(self) -> Mapping[str, Store]:
        """Where each dataset's latents are kept, by dataset id."""
        pictures = {dataset.id: Store(dataset.latents_place) for dataset in self.plan.pictures}
        return pictures | {one.id: Store(one.latents_place) for one in self.plan.conditioning}

    def variations(self) -> Mapping[str, Variation]:
        """The versions of captions, of each dataset that has them."""
        return {dataset.id: dataset.variation for dataset, _ in self.found if dataset.variation is not None}

    def groups(self) -> list[Group]:
        return [
            Group(dataset.id, discovery.samples, dataset.repeats, dataset.probability, dataset.train_batch_size, dataset.window)
            for dataset, discovery in self.trained
        ]

    def sampler(self, config: TrainConfig, accelerator: Accelerator, console: Console) -> Sampler:
        """The order in which all of this is drawn.

        Raises:
            DatasetError: a dataset cannot fill one optimizer step, or the processes found different ones.
            ConfigError: at some step of the run no dataset takes part.
        """
        training = config.training
        for group in self.groups():
            check_size(group, training.train_batch_size, training.gradient_accumulation_steps, training.num_processes)
        sampler = Sampler(self.groups(), training.train_batch_size, training.seed, training.gradient_accumulation_steps * training.num_processes)
        say_never_drawn(sampler, total_steps(training, sampler), console)
        besides = [one.digest(discovery.samples) for dataset, discovery in self.trained for one in self.companions[dataset.id]]
        refuse_disagreement(hashlib.blake2b(repr((sampler.digest(), besides)).encode(), digest_size=16).hexdigest(), accelerator)
        return sampler

    def facts(self, batch_size: int, versions: Mapping[str, str]) -> list[DatasetFacts]:
        """A line for the summary of each that is trained on.

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
                takes_part=turns_of(dataset),
                beside=", ".join(f"{one.conditioning.kind} of {one.conditioning.id}" for one in self.companions[dataset.id]),
            )
            for (dataset, discovery), group in zip(self.trained, self.groups())
        ]


def turns_of(dataset: ImageDataset) -> str:
    """When and how often a dataset takes part, if not always and as often as others."""
    often = f"probability {dataset.probability:g}" if dataset.probability != 1 else ""
    return ", ".join(part for part in (often, str(dataset.window)) if part)


def say_never_drawn(sampler: Sampler, steps: int, console: Console) -> None:
    """Name datasets of which a run of so many steps shows nothing."""
    for name, count in sampler.counts(steps * sampler.batches_per_step).items():
        if not count:
            console.say(f"note: dataset {name!r}: none of it is trained on, the run ends before it takes part")


def changes_of(discovery: Discovery) -> str:
    """What is different from the last start: images, captions, settings; empty if nothing is."""
    parts = []
    if discovery.changes != Changes():
        parts.append(str(discovery.changes))
    if discovery.caption_changes != Changes():
        parts.append(f"captions {discovery.caption_changes}")
    return "; ".join([*([", ".join(parts)] if parts else []), *discovery.settings])


def refuse_disagreement(digest: str, accelerator: Accelerator) -> None:
    """See to it that all processes found the same: each looks at the files by itself.

    Args:
        digest: of what this one found, in hex.

    Raises:
        DatasetError: they did not.
    """
    if accelerator.num_processes == 1:
        return
    mine = torch.tensor([list(bytes.fromhex(digest))], device=accelerator.device)
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
                hint=f'Lower the resolution of the dataset, set "crop": true for squares, or leave such shapes out with '
                f"maximum_aspect_ratio and minimum_aspect_ratio.{aligned}",
            ) from error


def look(
    plan: DataPlan, held_out: HeldOut, index_folder: Path, seed: int, console: Console
) -> tuple[tuple[tuple[ImageDataset, Discovery], ...], dict[str, tuple[Companions, ...]]]:
    """Find every dataset's pictures, and what goes along with them; pictures that lack it are left out.

    Raises:
        DatasetError: data is missing or unusable.
    """
    known = {one.id: find_companions(one, index_folder, console) for one in plan.conditioning}
    companions = {dataset.id: tuple(known[one.id] for one in plan.conditioning if dataset.id in one.sources) for dataset in plan.pictures}
    looked_at = [dataset for dataset in plan.pictures if not dataset.is_eval or dataset.id in held_out.datasets]
    paired_up = [(dataset, paired(dataset, discover(dataset, index_folder, seed, console), companions[dataset.id])) for dataset in looked_at]
    return tuple((dataset, held_out.of(discovery) if dataset.is_eval else discovery) for dataset, discovery in paired_up), companions


def refuse_references(plan: DataPlan, family: ModelFamily) -> None:
    """See to it that references are shown to a model that looks at them.

    Raises:
        ConfigError: it does not.
    """
    references = [one.id for one in plan.conditioning if not one.is_mask]
    if references and not family.takes_references:
        raise ConfigError(
            f"{family.options.model_family} takes no reference pictures, but {', '.join(map(repr, references))} holds some",
            hint="Set 'disabled: true' there, or train a model that edits pictures, such as flux2.",
        )


def refuse_broken(found: Iterable[tuple[ImageDataset, Discovery]]) -> None:
    """Refuse files that are no usable images, where the user wants that.

    Raises:
        DatasetError: names them by dataset and rule.
    """
    notes = [
        f"dataset {dataset.id!r}: {note}"
        for dataset, discovery in found
        for note in skip_notes({rule: names for rule, names in discovery.skipped.items() if rule in OF_BROKEN_FILES})
    ]
    if notes:
        raise DatasetError(
            "broken_images is refuse, and some files cannot be used:\n  " + "\n  ".join(notes),
            hint="Mend or remove them, or set broken_images to skip. `simpletuner dataset check` lists every file.",
        )


def find_datasets(config: TrainConfig, family: ModelFamily, variables: Mapping[str, str], console: Console, accelerator: Accelerator) -> Datasets:
    """Read the plan and find every dataset's samples. The first process looks; the others then find its index warm.

    Raises:
        ConfigError: the plan is wrong, or a bucket is a size that the model cannot take.
        DatasetError: data is missing or unusable.
    """
    plan = load_plan(config.data.data_backend_config, config.data, variables, alignment_px=family.alignment_px)
    for note in (*plan.notes, *idle_notes(config.validation, config.data, plan)):
        console.say(f"note: {note}")
    refuse_references(plan, family)
    held_out, index_folder = held_out_of(config.validation, plan), Path(config.data.cache_dir) / "index"
    with accelerator.main_process_first():
        found, companions = look(plan, held_out, index_folder, config.training.seed, console)
    refuses = config.data.broken_images == "refuse"
    if refuses:
        refuse_broken(found)
    for dataset, discovery in found:
        check_buckets(dataset, discovery, family)
    backends = {dataset.id: dataset.open() for dataset in plan.pictures} | {one.id: one.open() for one in plan.conditioning}
    datasets = Datasets(plan, found, companions, backends, index_folder, config.training.seed, ContentBook(index_folder), held_out, refuses)
    for note in datasets.notes():
        console.say(f"note: {note}")
    for group in datasets.groups():
        size = group.batch_size or config.training.train_batch_size
        if len(group.samples) < size:
            console.say(f"note: dataset {group.name!r}: a batch of {size} holds some of its {len(group.samples)} images more than once")
    return datasets
