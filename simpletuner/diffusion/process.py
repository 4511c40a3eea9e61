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

    @property
    def total_steps(self) -> int:
        """Steps into which samplers and options cut the way from data to noise."""
        return 1000

    @property
    def last_time(self) -> float:
        """The noisiest time there is."""
        return 1.0

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

    def draw_guidance(self, count: int, generator: Generator) -> Tensor | None:
        """Draw what a model distilled from guidance is told, (B,); None where it is always told the same, or nothing."""
        return None

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor, mixed: Tensor | None = None) -> Noised:
        """Mix scaled latents with noise, both (B, C, h, w), at `time` (B,).

        Args:
            mixed: what is mixed in, where that is not the noise that the target is made of.
        """

    @abstractmethod
    def mix(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the data and of the noise there is in latents at `time` (B,): signal and spread, each (B,)."""

    @abstractmethod
    def estimate(self, latents: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The data and the noise that a prediction takes noised latents (B, C, h, w) at `time` (B,) to be made of."""

    def answer(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Bring what the denoiser answers into the form of `noised.target`."""
        return prediction

    def sigma(self, time: Tensor) -> Tensor:
        """Noise over signal at `time` (B,); infinite where there is no signal."""
        signal, spread = self.mix(time)
        return spread / signal
