"""What goes along with pictures, read for each batch: masks from caches of their own, references from the latents of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from simpletuner.data.companions import Companions
from simpletuner.data.images import read_mask, read_segmentation
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import Beside
from simpletuner.data.store import Store
from simpletuner.training.datasets import Datasets

DECODERS = {"mask": read_mask, "segmentation": read_segmentation}
MASKS_AT_ONCE = 8

Masks = Mapping[str, LatentCache]
"""Id of a conditioning dataset to the cache of its masks."""


def shrink_masks(masks: Tensor, stride: int) -> dict[str, Tensor]:
    """Bring masks (B, 1, H, W) down to latent pixels, (B, 1, h, w): each is the mean of the pixels that it covers."""
    return {"mask": adaptive_avg_pool2d(masks, (masks.shape[-2] // stride, masks.shape[-1] // stride))}


def mask_caches(datasets: Datasets, stores: Mapping[str, Store], stride: int, *, warn: Callable[[str], None], is_ondemand: bool) -> Masks:
    """Give a cache for each dataset of masks.

    Args:
        stores: dataset id to where its masks are kept; those of the others are made at each reading.
        stride: pixels to a latent pixel.
    """
    return {
        one.id: LatentCache(
            stores.get(one.id),
            partial(shrink_masks, stride=stride),
            f"{one.kind} in latent pixels of {stride}",
            datasets.images(DECODERS[one.kind]),
            MASKS_AT_ONCE,
            warn=warn,
            is_ondemand=is_ondemand,
            noun="mask",
        )
        for one in datasets.plan.conditioning
        if one.is_mask
    }


def besides_of(datasets: Datasets, latents: LatentCache, masks: Masks) -> dict[str, tuple[Beside, ...]]:
    """Dataset id to what goes along with its pictures."""

    samples = {dataset.id: discovery.samples for dataset, discovery in datasets.found}

    def beside(companions: Companions, name: str) -> Beside:
        conditioning = companions.conditioning
        rows = masks[conditioning.id] if conditioning.is_mask else latents
        return Beside(conditioning.is_mask, companions.of, rows, companions.digest(samples[name]))

    return {name: tuple(beside(one, name) for one in several) for name, several in datasets.companions.items() if several and name in samples}
