"""One denoiser call on made-up input, to compare a model with itself: trained, and as somebody else reads it.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.models.family import ModelFamily
from simpletuner.options.diffusion import Diffusion
from simpletuner.types import Batch, Crop, Geometry, Noised, Sample, Size

PROMPT = "a photo of a red boat on a lake"
CELLS = 4
"""A side of the picture, in multiples of what the family wants sides to be multiples of."""
TIME = 0.6


@dataclass(frozen=True, slots=True)
class Probe:
    """Input of one denoiser call."""

    family: ModelFamily
    noised: Noised
    batch: Batch

    @torch.no_grad()
    def __call__(self, denoiser: nn.Module) -> Tensor:
        """What the denoiser answers, (1, C, h, w), in float32."""
        return self.family.predict(denoiser, self.noised, self.batch).float()


@torch.no_grad()
def make_probe(family: ModelFamily, options: Diffusion) -> Probe:
    """Encode a prompt and a picture of noise on the CPU. The text encoders come and go before the VAE, as in training."""
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    text = family.encode_text(family.load_text_encoders(cpu, torch.float32), [PROMPT])
    side = CELLS * family.alignment_px
    picture = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    latents = family.scale_latents(family.encode_pixels(family.load_vae(cpu, torch.float32), picture)["mean"].float())
    process = family.process(options)
    noise, time = torch.randn(latents.shape, generator=generator), torch.tensor([TIME])
    noised = process.add_noise(latents, noise, time, None)
    guidance = process.draw_guidance(1, generator)
    size = Size(side, side)
    sample = Sample("probe", "noise", "", Geometry(size, size, Crop(0, 0, side, side)), (PROMPT,))
    return Probe(family, noised if guidance is None else replace(noised, guidance=guidance), Batch((sample,), (PROMPT,), {}, text))


@torch.no_grad()
def text_probe(family: ModelFamily, encoders: Any) -> Tensor:
    """What text encoders make of a prompt, all numbers in a row, in float32."""
    return torch.cat([tensor.float().flatten() for tensor in family.encode_text(encoders, [PROMPT]).values() if tensor.is_floating_point()])


def clean_text(family: ModelFamily) -> Any:
    """The text encoders without an adapter, on the CPU in float32."""
    return family.load_text_encoders(torch.device("cpu"), torch.float32)
