"""The nouns that cross rooms: plain frozen data, no behaviour.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Size:
    """Whole pixels, width first."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Crop:
    """A window into the resized image, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image becomes a training picture: upright size, size after resizing, window cut out of that."""

    original: Size
    resized: Size
    crop: Crop

    @property
    def bucket(self) -> Size:
        """The size of the picture the model sees."""
        return Size(self.crop.width, self.crop.height)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of one backend, with everything the sampler and the caches need to know of it."""

    backend: str
    """The id of the backend it came from."""
    name: str
    """Its path inside the backend, with forward slashes; never absolute."""
    content: str
    """Digest of the image's bytes; empty until they are first read whole, and then known to the ContentBook."""
    geometry: Geometry
    captions: tuple[str, ...]
    """Alternatives; one is chosen at each draw. Never empty: ("",) is an image without a caption."""
    is_regularisation: bool = False
    fingerprint: str = ""
    """Digest of the file's size and first bytes, known without reading it whole: what a resume compares."""
    crops: int = 1
    """Random crops that are drawn in turn; 0 is a fresh one at each draw. `geometry` holds the first."""

    @property
    def id(self) -> str:
        return f"{self.backend}/{self.name}"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What chance decides of a batch, and what was made of it ahead."""

    place: tuple[int, int]
    """Optimizer steps done before the one that it is for, and the position within that step's gradient accumulation."""
    latents: Tensor
    """Scaled, float32, (B, C, h, w)."""
    noise: Tensor
    """What the target is made of, (B, C, h, w)."""
    time: Tensor
    """(B,), in [0, 1]; 0 is data, 1 is noise."""
    mixed: Tensor | None = None
    """What is mixed in, where that is not the noise, (B, C, h, w)."""
    guidance: Tensor | None = None
    """(B,), what a model distilled from guidance is told."""
    way: Tensor | None = None
    """The times of a rollout, (K + 1, B); None where no sample is rolled out."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-step trains on: samples of one backend and one bucket."""

    samples: tuple[Sample, ...]
    prompts: tuple[str, ...]
    """What was encoded for each sample, after caption choice and dropout."""
    latents: Mapping[str, Tensor]
    """Raw, as the VAE gave them: `mean` and `std`, each (B, C, h, w)."""
    text: Mapping[str, Tensor]
    """The family's own names, e.g. `prompt` (B, T, D) and `mask` (B, T)."""
    mask: Tensor | None = None
    """(B, 1, h, w) in [0, 1], by which each place of the loss is multiplied; None is 1 everywhere."""
    references: tuple[Mapping[str, Tensor], ...] = ()
    """Of each reference picture, raw latents as in `latents`; `scaled`, (B, C, h, w), once they were made ready."""
    drawn: Drawn | None = None
    """What was drawn ahead; drawn when it is asked for if there is nothing."""

    @property
    def is_regularisation(self) -> bool:
        return self.samples[0].is_regularisation


@dataclass(frozen=True, slots=True)
class Noised:
    """Scaled latents with noise mixed in, and what the denoiser should answer."""

    latents: Tensor
    """(B, C, h, w)."""
    target: Tensor
    """(B, C, h, w)."""
    time: Tensor
    """(B,), in [0, 1]; 0 is data, 1 is noise."""
    weight: Tensor | None = None
    """(B,), by which each sample's loss is multiplied; None is by 1."""
    guidance: Tensor | None = None
    """(B,), what a model distilled from guidance is told; None tells it nothing."""
    drift: Tensor | None = None
    """(B, C, h, w), how far a rollout left the latents from where mixing in noise would have put them; None was not rolled out."""
