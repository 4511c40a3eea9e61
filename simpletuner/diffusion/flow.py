"""Flow matching: straight paths from data (time 0) to noise (time 1).

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.diffusion.process import Process
from simpletuner.diffusion.times import Times, resolution_shift, shift_time
from simpletuner.types import Noised

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, slots=True)
class FlowMatching(Process):
    """Rectified flow (Liu et al. 2022): x_t = (1 - t) x + t n, and the denoiser answers the velocity n - x."""

    times: Times
    """Drawn from before the shift."""
    shift: float | None
    """Towards noise above 1, none at 1; None lets the number of image tokens decide (`resolution_shift`)."""
    guidance: float | None = None
    """What a model distilled from guidance is told at each step; None is told nothing."""
    most_guidance: float | None = None
    """It is told something between `guidance` and this, drawn for each sample, in place of always the same."""

    def sample_time(self, count: int, tokens: int, generator: Generator) -> Tensor:
        shift = resolution_shift(tokens) if self.shift is None else self.shift
        return shift_time(self.times.sample(count, generator), shift)

    def draw_guidance(self, count: int, generator: Generator) -> Tensor | None:
        import torch

        if self.guidance is None or self.most_guidance is None:
            return None
        return self.guidance + (self.most_guidance - self.guidance) * torch.rand(count, generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor, mixed: Tensor | None = None) -> Noised:
        t = time.view(-1, *[1] * (latents.ndim - 1))  # (B, 1, 1, 1)
        return Noised(
            latents=(1 - t) * latents + t * (noise if mixed is None else mixed),
            target=noise - latents,
            time=time,
            guidance=None if self.guidance is None else time.new_full(time.shape, self.guidance),
        )

    def mix(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - time, time

    def estimate(self, latents: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """x = x_t - t v and n = x_t + (1 - t) v."""
        t, v = time.view(-1, *[1] * (latents.ndim - 1)), prediction.float()
        return latents - t * v, latents + (1 - t) * v
