"""The pictures from which a model that improves pictures starts when it is looked at: the user's, or the first of the datasets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from simpletuner.data.images import decode_rgb
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.prompts import Picture

if TYPE_CHECKING:
    from simpletuner.training.datasets import Datasets

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def check_starts(config: TrainConfig, family: ModelFamily, shown: Sequence[Picture]) -> None:
    """Refuse what leaves such a model nothing to do or nothing to start from, before anything is loaded.

    Raises:
        ConfigError: too few sampling steps, or no picture at the place that the option names.
    """
    strength, steps = family.start_strength(config.diffusion), config.validation.validation_num_inference_steps
    if strength is None or not shown:
        return
    if int(steps * strength) < 1:
        raise ConfigError(
            f"validation_num_inference_steps {steps} leaves none to {family.source_name()}, which makes the last {strength:g} of them",
            hint=f"Set it to {math.ceil(1 / strength)} or more.",
        )
    if config.validation.validation_start_image is not None:
        _files(config.validation.validation_start_image)


def with_starts(shown: Sequence[Picture], config: TrainConfig, family: ModelFamily, datasets: Datasets | None) -> list[Picture]:
    """Give each picture the one that it starts from, cut to its size: all of a prompt the same, one prompt after the other the next.

    Args:
        datasets: those of the run, if there is one.

    Raises:
        ConfigError: a picture cannot be read, or there is none.
    """
    if family.start_strength(config.diffusion) is None or not shown:
        return list(shown)
    reads = _reads(config.validation.validation_start_image, datasets)
    if not reads:
        raise ConfigError(
            f"{family.source_name()} improves pictures and makes none: there is no picture to start from",
            hint="Set validation_start_image (--image of `simpletuner generate`) to a picture, or a folder of pictures.",
        )
    names = list(dict.fromkeys(picture.name for picture in shown))
    images = [reads[number % len(reads)]() for number in range(min(len(names), len(reads)))]

    def start(picture: Picture) -> Image.Image:
        size = (picture.size.width, picture.size.height)
        return ImageOps.fit(images[names.index(picture.name) % len(images)], size, Image.Resampling.LANCZOS)

    return [replace(picture, start=start(picture)) for picture in shown]


def _reads(place: Path | None, datasets: Datasets | None) -> list[Callable[[], Image.Image]]:
    """A call for each picture that there is, which reads it."""
    if place is not None:
        return [lambda path=path: _decode(path.read_bytes(), str(path)) for path in _files(place)]  # type: ignore[misc]
    if datasets is None:
        return []
    samples = [sample for dataset, discovery in datasets.trained if not dataset.is_regularisation for sample in discovery.samples]
    return [lambda one=one: _decode(datasets.backends[one.backend].read(one.name), one.id) for one in samples]  # type: ignore[misc]


def _files(place: Path) -> list[Path]:
    """The pictures at a place, by name.

    Raises:
        ConfigError: there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(path for path in place.glob("*") if path.suffix.lower() in SUFFIXES) if place.is_dir() else []
    if not found:
        raise ConfigError(
            f"validation_start_image {place} {'holds no picture' if place.is_dir() else 'does not exist'}",
            hint="Give a picture, or a folder that holds pictures.",
        )
    return found


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        return decode_rgb(data, name)
    except DatasetError as error:
        raise ConfigError(f"the picture to start from: {error.message}", hint="Set validation_start_image to another.") from error
