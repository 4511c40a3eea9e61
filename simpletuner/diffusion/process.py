"""The contract of a diffusion process: draw times, mix in noise, say what the denoiser should answer.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from simpletuner.types import Noised


class Process(ABC):
    """How data turns into noise. Holds numbers only; the training step never learns which process it has."""

    @abstractmethod
    def sample_time(self, count: int, tokens: int, generator: Generator) -> Tensor:
        """Draw times to train at.

        Args:
            count: how many, B.
            tokens: image tokens the denoiser sees at this bucket; resolution-dependent shifts need it.
            generator: a CPU generator; the only source of randomness.

        Returns:
            float32 on the CPU, (B,), in [0, 1]; 0 is data, 1 is noise.
        """

    def draw_noise(self, shape: Sequence[int], step: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Draw noise for latents of a shape (B, C, h, w): what the target is made of, and what is mixed in if that is something else.

        Args:
            step: optimizer steps done before this one.
            generator: a CPU generator; the only source of randomness.
        """
        import torch

        return torch.randn(*shape, generator=generator), None

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor, mixed: Tensor | None = None) -> Noised:
        """Mix scaled latents with noise, both (B, C, h, w), at `time` (B,).

        Args:
            mixed: what is mixed in, where that is not the noise that the target is made of.
        """
