"""Samples of one size belong together: which buckets a dataset has, how many batches they make, and whether that is enough.

An epoch draws every sample `repeats + 1` times. A bucket whose draws do not fill its last batch makes a smaller one of
what is left: nothing is dropped, nothing is drawn twice to fill up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simpletuner.data.window import ALWAYS, Window
from simpletuner.errors import DatasetError
from simpletuner.types import Sample, Size


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one dataset, and how often they are drawn."""

    name: str
    """The dataset's id, unique in a run."""
    samples: Sequence[Sample]
    """In any order; their names differ."""
    repeats: int = 0
    """Further draws of each sample in an epoch."""
    probability: float = 1.0
    """Share of its batches that an epoch takes; 2.0 takes them twice."""
    batch_size: int | None = None
    """Its own, instead of the run's."""
    window: Window = ALWAYS
    """When it takes part."""


@dataclass(frozen=True, slots=True)
class BucketRow:
    """One bucket in the summary."""

    bucket: Size
    images: int
    batches: int
    """In one epoch, with repeats."""


def by_bucket(samples: Iterable[Sample]) -> dict[Size, list[Sample]]:
    """Samples by the size of the picture that the model sees, each bucket in the order of `samples`."""
    buckets: defaultdict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        crop = sample.geometry.crop
        buckets[crop.width, crop.height].append(sample)
    return {Size(*sides): members for sides, members in buckets.items()}


def describe(group: Group, batch_size: int) -> list[BucketRow]:
    """One row a bucket, the fullest first."""
    size = group.batch_size or batch_size
    rows = [
        BucketRow(bucket, len(samples), math.ceil(len(samples) * (group.repeats + 1) / size)) for bucket, samples in by_bucket(group.samples).items()
    ]
    return sorted(rows, key=lambda row: (-row.images, row.bucket.width, row.bucket.height))


def check_size(group: Group, batch_size: int, accumulation: int, processes: int) -> None:
    """Refuse a dataset that cannot fill one optimizer step.

    Args:
        batch_size: the run's; a dataset's own goes before it.
        accumulation: batches a process takes for one optimizer step.

    Raises:
        DatasetError: names the dataset, its draws, the draws needed, and the smallest `repeats` that would do.
    """
    images = len(group.samples)
    if not images:
        raise DatasetError(f"dataset '{group.name}' has no images", hint="Look at its folder, and at the rules by which images were skipped.")
    size = group.batch_size or batch_size
    draws, needed = images * (group.repeats + 1), size * accumulation * processes
    if draws >= needed:
        return
    factors = f"train_batch_size {size} x gradient_accumulation_steps {accumulation}" + (f" x {processes} processes" if processes > 1 else "")
    raise DatasetError(
        f"dataset '{group.name}': {images} images with repeats {group.repeats} are {draws} draws an epoch, "
        f"one optimizer step needs {needed} ({factors})",
        hint=f"Set repeats to {math.ceil(needed / images) - 1} or more for '{group.name}', add images, or lower train_batch_size.",
    )
