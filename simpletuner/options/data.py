"""Options of images, captions and their caches; what is set here holds for every dataset that does not say otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from simpletuner.options.option import Problem, Section, option

LARGEST_MEGAPIXELS = 20
"""From here on, a size in megapixels was meant in pixels."""
SMALLEST_PIXELS = 8
"""Below it, a size in pixels was meant in megapixels."""


class Data(Section):
    """Where images come from, what becomes of them, and what is kept on disk."""

    data_backend_config: Path = option(Path("config/multidatabackend.json"), ask="Path of the file that lists your datasets?")
    """JSON file that lists the datasets."""

    resolution: float = option(1024.0, ask="Resolution to train at?", gt=0)
    """Size of training pictures, in the unit of `resolution_type`."""

    resolution_type: Literal["pixel", "area", "pixel_area"] = option("pixel_area", ask="What is the resolution measured in?")
    """Unit of sizes: `pixel` is the shorter edge, `area` megapixels, `pixel_area` the edge of a square of the same area."""

    aspect_bucket_rounding: int = option(2, ge=1, le=9, advanced=True)
    """Decimals of the width / height ratio by which images are sorted into buckets."""

    aspect_bucket_alignment: int | None = option(None, ge=1, advanced=True)
    """Both edges of a training picture are multiples of this many pixels; the family's own number if not given."""

    minimum_image_size: float | None = option(None, ge=0)
    """Leave out images smaller than this, in the unit of `resolution_type`."""

    maximum_image_size: float | None = option(None, ge=0, advanced=True)
    """First shrink images larger than this to `target_downsample_size`, so that a crop shows more of them."""

    target_downsample_size: float | None = option(None, ge=0, advanced=True)
    """Size that images above `maximum_image_size` are shrunk to before they are cropped."""

    caption_strategy: Literal["filename", "textfile", "instanceprompt", "parquet", "jsonl", "csv", "huggingface", "webdataset"] = option(
        "filename", ask="Where are the captions?", spellings={"instance_prompt": "instanceprompt", "webshart": "webdataset"}
    )
    """Where captions come from: file names, .txt files beside the images, `instance_prompt` for all, or what the dataset's place knows."""

    instance_prompt: str | None = option(None, ask="Caption of every image?")
    """Caption of every image with `caption_strategy` instanceprompt."""

    prepend_instance_prompt: bool = option(False, advanced=True)
    """Put `instance_prompt` before every caption."""

    only_instance_prompt: bool = option(False, advanced=True)
    """Use `instance_prompt` in place of every caption."""

    caption_dropout_probability: float = option(0.1, ge=0, le=1)
    """Share of pictures that are trained with an empty caption, which keeps guidance working."""

    masked_loss_probability: float = option(1.0, ge=0, le=1, advanced=True)
    """Share of pictures with a mask that are trained with it; the others learn from all of the picture."""

    broken_images: Literal["skip", "refuse"] = option("skip")
    """Whether files that are no usable images are left out and named (skip), or no training begins before they are gone (refuse)."""

    cache_dir: Path = option(Path("cache"))
    """Folder for encoded images and captions of datasets that name none of their own."""

    vae_batch_size: int = option(4, ge=1)
    """Images that the VAE encodes at once. Lower it if memory runs out while images are encoded."""

    text_encoder_batch_size: int = option(4, ge=1, advanced=True)
    """Captions that the text encoders encode at once."""

    vae_cache_ondemand: bool = option(False, was_opposite=["vae_cache_preprocess"])
    """Encode an image when it is first trained on, and keep it, rather than all of them before training."""

    vae_cache_disable: bool = option(False, advanced=True)
    """Encode an image each time it is trained on, and keep nothing."""

    vae_latent_sampling: Literal["fresh", "mean"] = option("fresh", advanced=True)
    """Take a new sample of what the VAE says of an image at each step (fresh), or always its mean."""

    dataloader_prefetch_qlen: int = option(4, ge=0, advanced=True)
    """Batches that are read ahead of training."""

    def problems(self) -> Iterator[Problem]:
        if self.maximum_image_size and not self.target_downsample_size:
            yield Problem(("maximum_image_size",), "maximum_image_size needs target_downsample_size, the size to shrink larger images to")
        sizes = {
            "resolution": self.resolution,
            "minimum_image_size": self.minimum_image_size,
            "maximum_image_size": self.maximum_image_size,
            "target_downsample_size": self.target_downsample_size,
        }
        unit = f"with resolution_type {self.resolution_type}"
        for key, size in sizes.items():
            if size and self.resolution_type == "area" and size >= LARGEST_MEGAPIXELS:
                yield Problem((key, "resolution_type"), f"{key} is in megapixels {unit}; {size:g} cannot be meant")
            if size and self.resolution_type != "area" and size < SMALLEST_PIXELS:
                yield Problem((key, "resolution_type"), f"{key} is in pixels {unit}; {size:g} cannot be meant")
