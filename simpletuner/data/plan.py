"""`multidatabackend.json`, typed and cross-checked: which datasets a run has, and by which rules.

Everything wrong is reported at once. Nothing here opens an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import plugins
from simpletuner.data.backend import DataBackend, DatasetOptions
from simpletuner.data.cache_entries import CACHES, CacheEntries, read_caches
from simpletuner.data.cache_place import CachePlace
from simpletuner.data.captions import CaptionRule
from simpletuner.data.checks import validate
from simpletuner.data.columns import open_place
from simpletuner.data.conditioning import Conditioning, Draft, check_entry, settle
from simpletuner.data.entries import Findings, read_entries
from simpletuner.data.filters import Filter, read_filters
from simpletuner.data.geometry import GeometryRule
from simpletuner.data.keys import IDLE
from simpletuner.data.rules import caption_rule, geometry_rule, variation_rule
from simpletuner.data.variation import Variation
from simpletuner.data.window import ALWAYS, Window
from simpletuner.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from simpletuner.options.data import Data

BACKENDS = "simpletuner.data.backends"
EVAL_IDLE = (
    *("repeats", "probability", "start_epoch", "end_epoch", "start_step", "end_step"),
    *("train_batch_size", "is_regularisation_data", "crops_per_image", "conditioning_type", "source_dataset_id"),
)
"""Keys that say how a dataset is trained on."""


@dataclass(frozen=True, slots=True)
class ImageDataset:
    """One enabled image dataset, with every rule settled."""

    id: str
    backend_type: type[DataBackend]
    options: DatasetOptions
    """As written, for the backend."""
    geometry: GeometryRule
    captions: CaptionRule
    repeats: int
    """Extra passes an epoch; 0 is once."""
    probability: float
    latents_place: CachePlace
    """Where its latents are cached; its own."""
    text_place: CachePlace
    """Where the embeddings of its captions are cached."""
    is_regularisation: bool = False
    train_batch_size: int | None = None
    """Images a batch; None is the run's."""
    max_num_samples: int | None = None
    window: Window = ALWAYS
    """Epochs and steps in which it takes part."""
    variation: Variation | None = None
    """In which versions captions are trained; None is as they are."""
    index_folder: Path | None = None
    """Where its place may keep what it learns of its files."""

    def open(self) -> DataBackend:
        """Give access to the images."""
        return open_place(self.backend_type, self.options, self.index_folder)

    @property
    def is_eval(self) -> bool:
        """Whether it is held out: never trained on, looked at to see how well the model does."""
        return self.options.dataset_type == "eval"

    @property
    def caption_rules(self) -> str:
        """Where captions come from, and in which versions they are trained."""
        return f"{self.captions}, {self.variation}" if self.variation else str(self.captions)

    def describe(self, *, caches_latents: bool = True) -> str:
        """Say all of it in a line."""
        parts = [
            f"images in {self.open().place}",
            str(self.geometry),
            f"captions: {self.caption_rules}",
            f"repeats {self.repeats}",
            *([f"probability {self.probability:g}"] if self.probability != 1 else []),
            *([f"batch {self.train_batch_size}"] if self.train_batch_size else []),
            *([f"at most {self.max_num_samples} images"] if self.max_num_samples else []),
            *([str(self.window)] if self.window != ALWAYS else []),
            *(["regularisation"] if self.is_regularisation else []),
            *(["held out for evaluation"] if self.is_eval else []),
            f"latents in {self.latents_place}" if caches_latents else "encoded anew at every step",
        ]
        return f"{self.id}: " + "; ".join(parts)


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What a run trains on."""

    datasets: tuple[ImageDataset, ...]
    """Enabled image datasets that are trained on, in the order of the file; at least one."""
    text_place: CachePlace
    """Where the embeddings of the empty prompt and of validation are cached."""
    notes: tuple[str, ...] = ()
    """Things to say aloud: settings that have no effect."""
    disabled: tuple[str, ...] = ()
    held_out: tuple[ImageDataset, ...] = ()
    """Those that are not trained on, but evaluated with."""
    conditioning: tuple[Conditioning, ...] = ()
    """Masks and references of any of these."""

    @property
    def pictures(self) -> tuple[ImageDataset, ...]:
        """All datasets of pictures with captions, trained on or held out."""
        return (*self.datasets, *self.held_out)

    @property
    def cache_places(self) -> list[CachePlace]:
        """Every place where this run caches something, each once."""
        places = [one.latents_place for one in self.pictures] + [one.latents_place for one in self.conditioning]
        places += [*(one.text_place for one in self.pictures), self.text_place]
        return list({place.identity: place for place in places}.values())

    def describe(self, *, caches_text: bool = True, caches_latents: bool = True) -> list[str]:
        """Plain lines, one a dataset, and where latents and text embeddings are kept, if they are."""
        lines = [dataset.describe(caches_latents=caches_latents) for dataset in self.pictures] + [one.describe() for one in self.conditioning]
        if caches_text:
            lines.append(f"text embeddings in {self.text_place}")
            other = [one for one in self.pictures if one.text_place.identity != self.text_place.identity]
            lines += [f"text embeddings of {one.id} in {one.text_place}" for one in other]
        return lines + [f"{name}: disabled" for name in self.disabled]


def load_plan(path: Path, options: Data, variables: Mapping[str, str], *, alignment_px: int, checks_places: bool = True) -> DataPlan:
    """Read and check the datasets of a run.

    Args:
        path: `data_backend_config`.
        options: section of config.json, for what an entry leaves open.
        variables: values of `{name}` in strings: `model_family`, `output_dir`, and `example` where there is one.
        alignment_px: what sides of a bucket are multiples of for this model; `aspect_bucket_alignment` overrides it.
        checks_places: refuse places that are not there; without it, whoever opens them asks `missing`.

    Raises:
        ConfigError: the file cannot be read or is wrong; every problem is listed.
        DatasetError: the file is right but folders are missing; every one is listed.
    """
    findings = Findings()
    enabled, disabled = read_entries(path, variables, findings)
    alignment_px = options.aspect_bucket_alignment or alignment_px
    datasets: list[ImageDataset] = []
    drafts: list[Draft] = []
    caches = read_caches(enabled, Path(options.cache_dir), variables["model_family"], findings)
    for label, kind, entry in enabled:
        if kind in CACHES:
            continue
        if kind == "conditioning":
            draft = conditioning(label, entry, caches, Path(options.cache_dir) / "index", findings)
            drafts += [draft] if draft else []
        else:
            dataset = image_dataset(label, entry, options, caches, alignment_px, findings)
            datasets += [dataset] if dataset else []
    conditions = settle(drafts, enabled, disabled, findings)
    check_companions(datasets, conditions, findings)
    check_caches([*datasets, *conditions], caches.text_place(), findings)
    datasets = with_variations(datasets, caches, options, findings)
    caches.check([one.options for one in datasets] + [one.options for one in conditions], disabled, findings)
    if not any(kind == "image" for _, kind, _ in enabled):
        findings.problems.append("there is no enabled dataset of images" + (f" ({', '.join(disabled)}: disabled)" if disabled else ""))
    plan = DataPlan(
        datasets=tuple(dataset for dataset in datasets if not dataset.is_eval),
        held_out=tuple(dataset for dataset in datasets if dataset.is_eval),
        conditioning=tuple(conditions),
        text_place=caches.text_place(),
        notes=tuple(dict.fromkeys(findings.notes)),
        disabled=tuple(disabled),
    )
    refuse(path, findings, [*datasets, *conditions] if checks_places else [], plan.cache_places if checks_places else [])
    return plan


def refuse(path: Path, findings: Findings, datasets: Sequence[ImageDataset | Conditioning], caches: Sequence[CachePlace]) -> None:
    """Raise if anything is wrong: with the file first, then with the places it names."""
    missing = [f"dataset {dataset.id!r}: {fault}" for dataset in datasets if (fault := dataset.open().missing())]
    missing += [f"cache: {fault}" for place in caches if (fault := place.missing())]
    if findings.problems:
        problems = list(dict.fromkeys([*findings.problems, *missing]))
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            "\n  ".join([f"{path} has {count}:", *problems]),
            hint="Every key and rule is in docs/dataloader.md; 'disabled: true' leaves a dataset out.",
        )
    if missing:
        raise DatasetError(
            "\n  ".join([f"{path} names data that is not there:", *missing]), hint=f"Folders are relative to where the command runs, {Path.cwd()}."
        )


def image_dataset(
    label: str, entry: dict[str, Any], options: Data, caches: CacheEntries, alignment_px: int, findings: Findings
) -> ImageDataset | None:
    """Check one image dataset and settle its rules; None if something is wrong with it."""
    before = len(findings.problems)
    found_place = place_of(label, entry, findings)
    if found_place is None:
        return None
    backend_type, written = found_place
    geometry = geometry_rule(written, options, alignment_px)
    captions = caption_rule(written, options)
    window = Window(written.start_epoch, written.end_epoch, written.start_step, written.end_step)
    findings.problems += [f"{label}: {problem}" for problem in window.problems()]
    for found in (geometry, captions):
        findings.problems += [f"{label}: {problem}" for problem in found.problems]
        findings.notes += [f"{label}: {note}" for note in found.notes]
    findings.notes += [f"{label}: {note}" for note in kind_notes(written)]
    if len(findings.problems) > before or geometry.rule is None or captions.rule is None:
        return None
    return ImageDataset(
        id=written.id,
        backend_type=backend_type,
        options=written,
        geometry=replace(geometry.rule, crops=1) if written.dataset_type == "eval" else geometry.rule,
        captions=captions.rule,
        repeats=written.repeats,
        probability=written.probability,
        latents_place=caches.latents_place(written),
        text_place=caches.text_place(written),
        is_regularisation=written.is_regularisation_data and written.dataset_type != "eval",
        train_batch_size=written.train_batch_size,
        max_num_samples=written.max_num_samples,
        window=window,
        index_folder=Path(options.cache_dir) / "index",
    )


def place_of(label: str, entry: dict[str, Any], findings: Findings) -> tuple[type[DataBackend], DatasetOptions] | None:
    """Find the kind of place where a dataset lies, and type its keys; None if something is wrong with them."""
    try:
        backend_type = plugins.load(BACKENDS, str(entry.get("type", "local")), DataBackend)  # type: ignore[type-abstract]
    except ConfigError as error:
        findings.problems.append(f"{label}: type {error.message}; {error.hint}")
        return None
    written = validate(backend_type.options_type, label, entry, IDLE, findings)
    if written is None:
        return None
    findings.problems += [f"{label}: {problem}" for problem in written.problems()]
    return backend_type, written


def kind_notes(written: DatasetOptions) -> Iterator[str]:
    """Name keys without effect in a dataset that is trained on, or in one that is held out."""
    is_eval = written.dataset_type == "eval"
    idle = EVAL_IDLE if is_eval else ("conditioning_type", "source_dataset_id")
    asked = [key for key in idle if key in written.model_fields_set]
    if asked:
        yield f"{', '.join(asked)} without effect: " + ("it is never trained on" if is_eval else "that is said of a conditioning dataset")


def conditioning(label: str, entry: dict[str, Any], caches: CacheEntries, index_folder: Path, findings: Findings) -> Draft | None:
    """Check one conditioning dataset, but for whose it is."""
    before = len(findings.problems)
    found = place_of(label, entry, findings)
    if found is None:
        return None
    backend_type, written = found
    check_entry(label, written, findings)
    return None if len(findings.problems) > before else Draft(label, written, backend_type, caches.latents_place(written), index_folder)


def check_companions(datasets: Sequence[ImageDataset], conditions: Sequence[Conditioning], findings: Findings) -> None:
    """Refuse a conditioning dataset that lies where its pictures lie: each picture would be its own mask."""
    for one in conditions:
        for dataset in datasets:
            if dataset.id in one.sources and dataset.open().place == one.open().place:
                findings.problems.append(
                    f"datasets {dataset.id!r} and {one.id!r} lie in one place, {one.open().place}: a picture would go along with itself; "
                    f"give {one.id!r} a folder of its own"
                )


def check_caches(datasets: Sequence[ImageDataset | Conditioning], text_place: CachePlace, findings: Findings) -> None:
    """Refuse two datasets that keep their latents in one place, and caches among pictures."""
    owners: dict[str, str] = {}
    for dataset in datasets:
        place = dataset.latents_place.identity
        if place in owners and owners[place] != dataset.id:
            findings.problems.append(
                f"datasets {owners[place]!r} and {dataset.id!r} have the same cache_dir_vae {dataset.latents_place}; each needs its own"
            )
        owners.setdefault(place, dataset.id)
    texts = [text_place, *(one.text_place for one in datasets if isinstance(one, ImageDataset))]
    caches = [(place.identity, "text embeddings", "cache_dir of a text_embeds entry") for place in texts]
    caches += [
        (one.latents_place.identity, f"what is made of {one.id!r}", "cache_dir_vae, or cache_dir of an image_embeds entry") for one in datasets
    ]
    for dataset in datasets:
        place = dataset.open().place
        names = (os.path.realpath(os.path.expanduser(place)), place.replace("/ at ", " at ").rstrip("/"))  # of a folder, or in a bucket
        findings.problems += [
            f"{what} would be cached in {place}, where the pictures of {dataset.id!r} lie and nothing is ever written; name another folder in {key}"
            for identity, what, key in caches
            if identity in names
        ]


def with_variations(datasets: Sequence[ImageDataset], caches: CacheEntries, options: Data, findings: Findings) -> list[ImageDataset]:
    """Settle in which versions each dataset's captions are trained, with the filters of the `text_embeds` entry that it uses."""
    filters: dict[str | None, tuple[Filter, ...]] = {}
    for text in caches.texts:
        filters[text.id], problems = read_filters(text.caption_filter_list)
        findings.problems += [f"dataset {text.id!r}: {problem}" for problem in problems]
    usual = caches.default_text.id if caches.default_text else None
    varied = []
    for dataset in datasets:
        entry = dataset.options.text_embeds or usual
        variation, notes = variation_rule(dataset.options, dataset.captions, filters.get(entry, ()), options)
        findings.notes += [f"dataset {dataset.id!r}: {note}" for note in notes]
        varied.append(replace(dataset, variation=variation))
    wanted = {dataset.options.text_embeds or usual for dataset in datasets}
    findings.notes += [
        f"dataset {name!r}: caption_filter_list without effect: no dataset uses this entry"
        for name in filters
        if filters[name] and name not in wanted
    ]
    return varied
