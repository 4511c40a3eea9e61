"""The largest batch of a run: as its datasets' rules tell it, without a look at a picture, or as the pictures make it that were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from simpletuner.data.buckets import describe
from simpletuner.data.geometry import GeometryRule, Measure, bucket_of
from simpletuner.data.plan import load_plan
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.datasets import Datasets
from simpletuner.types import Size

USUAL_ALIGNMENT_PX = 64


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """What a step is planned with."""

    size: Size
    count: int
    references: int
    """Pictures that each goes along with."""
    notes: tuple[str, ...]


def largest_batch(config: TrainConfig, family: ModelFamily, variables: Mapping[str, str]) -> LargestBatch:
    """Find the batch with most pixels among those that the datasets can give.

    Raises:
        ConfigError: the file of the datasets is wrong.
    """
    data, count = config.data, config.training.train_batch_size
    known = family.source.is_here or family.source.is_released
    alignment_px = data.aspect_bucket_alignment or (family.alignment_px if known else USUAL_ALIGNMENT_PX)
    if not data.data_backend_config.is_file():
        rule = GeometryRule(Measure(data.resolution, data.resolution_type), alignment_px, data.aspect_bucket_rounding, is_cropped=True)
        note = f"{data.data_backend_config} is not there: pictures are taken to be squares of resolution {data.resolution:g}"
        return LargestBatch(bucket_of(Fraction(1), rule), count, 0, (note,))
    plan = load_plan(data.data_backend_config, data, variables, alignment_px=alignment_px, checks_places=False)
    sizes = [(size, dataset.train_batch_size or count, dataset.id) for dataset in plan.datasets for size in _sizes(dataset.geometry)]
    size, most, name = max(sizes, key=lambda one: one[0].width * one[0].height * one[1])
    pictures = [one for one in plan.conditioning if not one.is_mask and name in one.sources] if family.takes_references else []
    notes = [
        f"dataset {dataset.id!r}: with resolution_type pixel, pictures that are no squares are larger than the ones planned with"
        for dataset in plan.datasets
        if dataset.geometry.resolution.unit == "pixel" and not (dataset.geometry.is_cropped and dataset.geometry.crop_aspect == "square")
    ]
    return LargestBatch(size, most, len(pictures), tuple(notes))


def _sizes(rule: GeometryRule) -> list[Size]:
    """Buckets of a dataset: those of the aspects that it is cropped to, or else a square, whose area all others have nearly."""
    aspects = [choice.aspect for choice in rule.choices] if rule.is_cropped and rule.crop_aspect in ("closest", "random") else []
    return [bucket_of(aspect, rule) for aspect in aspects or [Fraction(1)]]


def largest_found(datasets: Datasets, batch_size: int) -> LargestBatch:
    """Find the batch with most pixels among those that the pictures make.

    Args:
        batch_size: of datasets without their own.
    """
    trained = zip(datasets.trained, datasets.groups())
    rows = [(row.bucket, group.batch_size or batch_size, dataset.id) for (dataset, _), group in trained for row in describe(group, batch_size)]
    size, count, name = max(rows, key=lambda one: one[0].width * one[0].height * one[1])
    references = [one for one in datasets.companions[name] if not one.conditioning.is_mask]
    return LargestBatch(size, count, len(references), ())
