"""Examine every dataset of a plan: what is in it, what it looks like, what it says, and what a run would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.console import Console
from simpletuner.data.buckets import Group, by_bucket, check_size
from simpletuner.data.companions import Companions, paired
from simpletuner.data.conditioning import Conditioning
from simpletuner.data.contents import ContentBook
from simpletuner.data.discover import discover
from simpletuner.data.doctor.conditioned import examine_beside, find_all_companions, wanted_by
from simpletuner.data.doctor.epochs import Steps, balance, steps_of
from simpletuner.data.doctor.findings import KINDS, Beside, Chart, Examined, ModelFacts, Problem, Report, named
from simpletuner.data.doctor.looks import Look, look_at_all
from simpletuner.data.doctor.shapes import bucket_rows, check_buckets, check_shapes, latent_bytes, total_cut_share
from simpletuner.data.doctor.twins import Seen, check_twins
from simpletuner.data.doctor.words import check_captions, count_tokens
from simpletuner.data.faults import RULES
from simpletuner.data.plan import DataPlan, ImageDataset
from simpletuner.data.variation import Expansion, expand
from simpletuner.errors import ConfigError, DatasetError, choose
from simpletuner.types import Sample

if TYPE_CHECKING:
    from simpletuner.options.data import Data
    from simpletuner.options.training import Training


SIZE_ADVICE = (
    'Leave them out by maximum_aspect_ratio and minimum_aspect_ratio, set "crop": true for squares, or set another resolution for the dataset.'
)
OUTSIDE_TABLE = "the row names a file outside the folder of the csv file, or what is no address"
OUTSIDE_TABLE_ADVICE = "Copy the files beside the csv file, and name them from its folder."


@dataclass(frozen=True, slots=True)
class Found:
    """A dataset that can be opened, with what was discovered and seen."""

    dataset: ImageDataset
    samples: tuple[Sample, ...]
    """Those that can be decoded."""
    looks: tuple[Look, ...]
    """Of the samples, in their order."""
    skipped: Mapping[str, tuple[str, ...]]
    """Rule to names."""
    notes: tuple[str, ...]
    expansion: Expansion
    """All that its captions can become."""

    faceless: tuple[str, ...] = ()
    """Names of samples that should be cut around a face, of which none was found."""

    @property
    def is_eval(self) -> bool:
        return self.dataset.is_eval

    @property
    def group(self) -> Group:
        """What the sampler draws from."""
        dataset = self.dataset
        return Group(dataset.id, self.samples, dataset.repeats, dataset.probability, dataset.train_batch_size, dataset.window)


def examine(
    plan: DataPlan,
    source: str,
    data: Data,
    training: Training,
    model: ModelFacts,
    console: Console,
    *,
    only: Sequence[str] = (),
    decodes: bool = False,
) -> Report:
    """Examine the datasets of a run, all of them whatever is wrong with one.

    Args:
        source: what the config is called.
        only: ids of those to examine; all if it is empty.
        decodes: decode every image at full size.

    Raises:
        ConfigError: `only` names a dataset that is not there.
    """
    chosen = choose_datasets(plan, only)
    charts: dict[str, Chart] = {}
    found: dict[str, Found] = {}
    errors: dict[str, str] = {}
    index_folder = Path(data.cache_dir) / "index"
    conditioning = wanted_by(plan.conditioning, {dataset.id for dataset in chosen})
    companions, refused = find_all_companions(conditioning, index_folder, console)
    for dataset in chosen:
        charts[dataset.id] = Chart(dataset.id, 1)
        mine = [one.id for one in conditioning if dataset.id in one.sources]
        try:
            if lost := [refused[name] for name in mine if name in refused]:
                raise lost[0]
            found[dataset.id] = find(dataset, [companions[name] for name in mine], index_folder, training.seed, console, decodes=decodes)
        except DatasetError as error:
            errors[dataset.id] = error.message
            charts[dataset.id].note_all("unusable", error.message.removeprefix(f"dataset {dataset.id!r}: "), error.hint or "")
        else:
            charts[dataset.id] = Chart(dataset.id, len(found[dataset.id].samples))
    check_twins([seen for one in found.values() for seen in images_of(one)], charts)
    tokens = count_tokens([one.expansion for one in found.values()], model)
    steps = steps_of([one.group for one in found.values() if not one.is_eval], training)
    examined = tuple(
        examine_one(found[dataset.id], charts[dataset.id], training, model, tokens, steps)
        if dataset.id in found
        else Examined(dataset, error=errors[dataset.id])
        for dataset in chosen
    )
    besides = tuple(beside_of(one, companions, refused, found, charts, console) for one in conditioning)
    problems = [*(problem for chart in charts.values() for problem in chart.problems), *steps.problems, *balance(examined)]
    rank = {name: number for number, name in enumerate(charts)}  # a problem between datasets names several, and stands where the first ones stand
    ordered = tuple(sorted(problems, key=lambda problem: (-problem.weight, rank.get(problem.dataset, -1))))
    return Report(source, examined, ordered, totals_of(examined, list(found.values()), data, model, training, steps), model.assumed, besides)


def choose_datasets(plan: DataPlan, only: Sequence[str]) -> list[ImageDataset]:
    """The datasets to examine, in the order of the plan."""
    known = [dataset.id for dataset in plan.pictures]
    for name in only:
        if name not in known:
            raise ConfigError(f"there is no enabled dataset of images {name!r}", hint=choose(name, known, "datasets"))
    return [dataset for dataset in plan.pictures if not only or dataset.id in only]


def beside_of(
    one: Conditioning,
    companions: Mapping[str, Companions],
    refused: Mapping[str, DatasetError],
    found: Mapping[str, Found],
    charts: dict[str, Chart],
    console: Console,
) -> Beside:
    """Examine one conditioning dataset, with a chart of its own."""
    if one.id in refused:
        return Beside(one, error=refused[one.id].message)
    charts[one.id] = Chart(one.id, max(1, len(companions[one.id].seen)))
    samples = {name: each.samples for name, each in found.items()}
    return examine_beside(companions[one.id], samples, {name: each.skipped for name, each in found.items()}, charts[one.id], console)


def find(dataset: ImageDataset, companions: Sequence[Companions], index_folder: Path, seed: int, console: Console, *, decodes: bool) -> Found:
    """Discover a dataset and look at all its images.

    What whole files say other than their headers is written into the index, as a run does that reads them.

    Raises:
        DatasetError: there is nothing to look at.
    """
    if fault := dataset.open().missing():
        raise DatasetError(fault, hint=f"Folders are relative to where the command runs, {Path.cwd()}.")
    looks: dict[str, Look] = {}
    while True:
        discovery = paired(dataset, discover(dataset, index_folder, seed, console), companions)
        new = [sample for sample in discovery.samples if sample.name not in looks]
        book = ContentBook(index_folder)
        with console.bar(f"look at {dataset.id}", len(new)) as bar:
            for sample, look in zip(new, look_at_all(dataset.open(), [sample.name for sample in new], decodes=decodes, advance=bar.advance)):
                looks[sample.name] = look
                if look.content:
                    book.learn(sample, look.content, look.header)
        book.save()
        if not book.has_set_aside:
            break
    skipped = {rule: list(names) for rule, names in discovery.skipped.items()}
    samples = []
    for sample in discovery.samples:
        if (rule := looks[sample.name].header.fault) is None:
            samples.append(sample)
        else:
            skipped.setdefault(rule, []).append(sample.name)
    if not samples:
        count = len(discovery.samples)
        said = "its only image cannot be read" if count == 1 else f"none of its {count} images can be read"
        raise DatasetError(said, hint="Look at the files and who may read them.")
    expansion = expand(samples, dataset.variation)
    return Found(
        dataset,
        tuple(samples),
        tuple(looks[sample.name] for sample in samples),
        {rule: tuple(names) for rule, names in skipped.items()},
        (*discovery.notes, *expansion.notes),
        expansion,
        tuple(name for name in discovery.faceless if looks[name].header.fault is None),
    )


def images_of(found: Found) -> list[Seen]:
    return [Seen(found.dataset.id, sample.name, found.is_eval, look) for sample, look in zip(found.samples, found.looks)]


def examine_one(found: Found, chart: Chart, training: Training, model: ModelFacts, tokens: Mapping[str, int], steps: Steps) -> Examined:
    """Examine one dataset by itself."""
    dataset, samples = found.dataset, found.samples
    note_skipped(found, chart)
    check_captions(samples, tokens, model, chart)
    check_shapes(samples, chart)
    faceless = dict.fromkeys(found.faceless, "cut at a place drawn for it")
    chart.note("no face", faceless, f"{named(len(faceless), 'image')} without a face that was found")
    rows = bucket_rows(found.group, training.train_batch_size)
    check_sizes(found, chart, training, model)
    if not found.is_eval:
        check_buckets(rows, chart)
    draws = 0 if found.is_eval else len(samples) * (dataset.repeats + 1)
    figures = {
        "draws": draws,
        "share_of_draws": steps.shares.get(dataset.id, 0.0),
        "batches": steps.batches.get(dataset.id, 0),
        "batches_of_run": steps.run_batches.get(dataset.id, 0),
        "partial_batches": sum(row.last_batch > 0 for row in rows),
        "cropped_share": round(total_cut_share(samples), 4),
        "latent_cache_bytes": latent_bytes(((look.content, sample) for sample, look in zip(samples, found.looks)), model),
        "narrowest_aspect": round(min(sample.geometry.original.width / sample.geometry.original.height for sample in samples), 3),
        "widest_aspect": round(max(sample.geometry.original.width / sample.geometry.original.height for sample in samples), 3),
        "longest_caption_tokens": max(tokens.get(caption, 0) for sample in samples for caption in sample.captions),
    }
    complaints = {name: tuple(listed) for name, listed in chart.complaints.items()}
    return Examined(dataset, samples, found.skipped, found.notes, complaints, rows, figures)


def note_skipped(found: Found, chart: Chart) -> None:
    """Note images that are left out, by rule."""
    total = len(found.samples) + sum(len(names) for names in found.skipped.values())
    for rule, names in found.skipped.items():
        is_row = rule == "outside" and found.dataset.options.type == "csv"
        reason = OUTSIDE_TABLE if is_row else RULES.get(rule, "see the notes")
        message = f"{named(len(names), 'row' if is_row else 'file')} skipped, {rule}: {reason}"
        advice = OUTSIDE_TABLE_ADVICE if is_row else ""
        chart.problems.append(Problem(rule, chart.dataset, message, tuple(names), len(names) / total, advice))


def check_sizes(found: Found, chart: Chart, training: Training, model: ModelFacts) -> None:
    """Note what makes a run refuse the dataset: too few draws for a step, pictures that the model cannot take."""
    for size, samples in by_bucket(found.samples).items():
        if refusal := model.refuse_size(size):
            details = {sample.name: f"{sample.geometry.original} becomes {size}" for sample in samples}
            message = f"{refusal}: {named(len(samples), 'image becomes', 'images become')} that by {found.dataset.geometry}"
            chart.note("unusable", details, message, SIZE_ADVICE, [f"{sample.name}, {sample.geometry.original}" for sample in samples])
    if found.is_eval:
        return
    try:
        check_size(found.group, training.train_batch_size, training.gradient_accumulation_steps, training.num_processes)
    except DatasetError as error:
        chart.note_all("unusable", error.message.removeprefix(f"dataset '{chart.dataset}': "), error.hint or "")


def totals_of(
    examined: Sequence[Examined], found: Sequence[Found], data: Data, model: ModelFacts, training: Training, steps: Steps
) -> dict[str, float]:
    """Add up the run."""
    prompts = {prompt for one in found for prompt in one.expansion.prompts}
    if data.caption_dropout_probability and prompts:
        prompts.add("")
    latents = 0 if data.vae_cache_disable else sum(int(one.figures.get("latent_cache_bytes", 0)) for one in examined)
    text = len(prompts) * model.text_bytes
    return {
        "images": sum(len(one.samples) for one in examined),
        "skipped": sum(one.count_skipped for one in examined),
        "batches_per_epoch": steps.batches_per_epoch,
        "steps_per_epoch": steps.steps_per_epoch,
        "steps": steps.total_steps,
        "images_per_step": training.train_batch_size * training.gradient_accumulation_steps * training.num_processes,
        "latent_cache_bytes": latents,
        "text_cache_bytes": text,
        "cache_bytes": latents + text,
    }


def counts_of(one: Examined) -> dict[str, int]:
    """How many images a dataset has, how many were skipped, and how many have each kind of problem."""
    kinds = Counter(complaint.kind for complaints in one.complaints.values() for complaint in complaints)
    return {
        "images": len(one.samples),
        "skipped": one.count_skipped,
        **{rule: len(names) for rule, names in one.skipped.items()},
        **{kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }
