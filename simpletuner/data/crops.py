"""Random crops that change from draw to draw: which there are of a sample, and which one a draw shows.

Crop number n is a function of the run's seed, the sample's id and n; crop 0 is the one that the sample was found with. With
K crops kept of an image, its draws show them in turn from a place that differs by sample: K draws show each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from simpletuner.data.geometry import place
from simpletuner.randomness import seed_from
from simpletuner.types import Geometry, Sample


def crop_seed(seed: int, dataset: str, name: str) -> int:
    """Seed of an image's crop number 0, and of its aspect where that is drawn."""
    return seed_from("crop", seed, f"{dataset}/{name}")


def drawn_crop(sample: Sample, draw: int, seed: int) -> Sample:
    """The sample with the crop that its draw number `draw` shows, counted from 0 over the whole run."""
    if sample.crops == 1:
        return sample
    if sample.crops == 0:
        return with_crop(sample, draw, seed)
    return with_crop(sample, (seed_from("crop turn", seed, sample.id) + draw) % sample.crops, seed)


def kept_crops(samples: Iterable[Sample], seed: int) -> Iterator[Sample]:
    """Each sample once for each of its crops that draws can show, as far as that is known beforehand."""
    for sample in samples:
        yield sample
        for number in range(1, sample.crops):
            yield with_crop(sample, number, seed)


def with_crop(sample: Sample, number: int, seed: int) -> Sample:
    """The sample with its crop number `number`."""
    if number == 0:
        return sample
    geometry = sample.geometry
    crop = place(geometry.resized, geometry.bucket, "random", seed_from("crop", seed, sample.id, number))
    return replace(sample, geometry=Geometry(geometry.original, geometry.resized, crop))
