"""Denoising diffusion in discrete steps: data at step 0, (nearly) noise at the last one.

Letters: B batch, C latent channels, h w latent pixels, T steps, a the cumulative product of alphas at a step: x_t = sqrt(a) x + sqrt(1 - a) n.
SNR, the signal-to-noise ratio, is a / (1 - a).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from simpletuner.diffusion.process import Process
from simpletuner.types import Noised

if TYPE_CHECKING:
    from torch import Generator, Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, slots=True)
class Offset:
    """Noise whose mean differs by sample and channel, so that pictures may be as a whole dark or bright (Guttenberg 2023)."""

    strength: float
    probability: float
    """Share of the batches that get it."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """More noise in the input than the target tells of, against exposure bias (Ning et al. 2023)."""

    strength: float
    until_step: int
    """The strength falls to 0 on a straight line by this optimizer step; 0 keeps it."""

    def at(self, step: int) -> float:
        return self.strength * max(0.0, 1 - step / self.until_step) if self.until_step else self.strength


@dataclass(frozen=True, slots=True)
class Denoising(Process):
    """DDPM (Ho et al. 2020): the denoiser answers the noise, the velocity sqrt(a) n - sqrt(1 - a) x (Salimans & Ho 2022), or the data."""

    alphas: tuple[float, ...]
    """a at each of the T steps, falling; 0 at the last one where the schedule ends in pure noise."""
    prediction: Prediction
    weights: tuple[float, ...] | None = None
    """How often each step is trained, up to a factor; None is all alike."""
    is_stratified: bool = True
    """Each sample of a batch is drawn from a B-th of the steps of its own, the first from the noisiest: less variance, the same mean."""
    snr_gamma: float | None = None
    """Min-SNR weighting (Hang et al. 2023): errors count as much as the data's would, but none more than gamma."""
    snr_weight: float = 1.0
    """A number by which the weights of `snr_gamma` are multiplied."""
    offset: Offset | None = None
    perturbation: Perturbation | None = None
    learns_flow: bool = False
    """Diff2Flow (Schusterbauer et al. 2025): errors are measured on the velocity n - x that the answer amounts to, not on the answer."""

    @property
    def total_steps(self) -> int:
        return len(self.alphas)

    @property
    def last_time(self) -> float:
        return (len(self.alphas) - 1) / len(self.alphas)

    def sample_time(self, count: int, tokens: int, generator: Generator) -> Tensor:
        """Draw steps k, as k / T."""
        import torch

        total = len(self.alphas)
        weights = torch.ones(total, dtype=torch.float64) if self.weights is None else torch.tensor(self.weights, dtype=torch.float64)
        if not self.is_stratified or count > total:
            drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
        else:
            # Cut by weight, not by number, or a bias would leave no trace in a large batch.
            mass = weights.cumsum(0) / weights.sum()
            part = torch.arange(count - 1, -1, -1, dtype=torch.float64)
            where = (part + torch.rand(count, generator=generator, dtype=torch.float64)) / count
            drawn = torch.searchsorted(mass, where, right=True).clamp(max=total - 1)
        return drawn.float() / total

    def draw_noise(self, shape: Sequence[int], step: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        import torch

        noise = torch.randn(*shape, generator=generator)
        if self.offset is not None and float(torch.rand((), generator=generator)) < self.offset.probability:
            noise += self.offset.strength * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
        if self.perturbation is None:
            return noise, None
        return noise, noise + self.perturbation.at(step) * torch.randn(*shape, generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor, mixed: Tensor | None = None) -> Noised:
        signal, spread = self._mix(latents, time)
        targets = {"epsilon": lambda: noise, "v_prediction": lambda: signal * noise - spread * latents, "sample": lambda: latents}
        return Noised(
            latents=signal * latents + spread * (noise if mixed is None else mixed),
            target=noise - latents if self.learns_flow else targets[self.prediction](),
            time=time,
            weight=None if self.snr_gamma is None else self.snr_weight * self._weight(self._alpha(time)),
        )

    def mix(self, time: Tensor) -> tuple[Tensor, Tensor]:
        a = self._alpha(time)
        return a.sqrt(), (1 - a).sqrt()

    def estimate(self, latents: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = self._mix(latents, time)
        p = prediction.float()
        if self.prediction == "v_prediction":
            return signal * latents - spread * p, spread * latents + signal * p
        return ((latents - spread * p) / signal, p) if self.prediction == "epsilon" else (p, (latents - signal * p) / spread)

    def answer(self, prediction: Tensor, noised: Noised) -> Tensor:
        if not self.learns_flow:
            return prediction
        data, noise = self.estimate(noised.latents, prediction, noised.time)
        return noise - data

    def _alpha(self, time: Tensor) -> Tensor:
        """a at each time, (B,)."""
        return _table(self.alphas, time.device)[(time * len(self.alphas)).round().long()]

    def _mix(self, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """`mix`, to be multiplied with latents: (B, 1, 1, 1) each."""
        signal, spread = self.mix(time)
        return signal.view(-1, *[1] * (latents.ndim - 1)), spread.view(-1, *[1] * (latents.ndim - 1))

    def _weight(self, a: Tensor) -> Tensor:
        """min(SNR, gamma) over what the error that is measured weighs in terms of the data's.

        That is SNR for the noise, SNR + 1 for the velocity of v-prediction, 1 for the data and (1 + sqrt(SNR))^2 for that of flow matching.
        """
        import torch

        assert self.snr_gamma is not None
        snr = a / (1 - a)
        if self.learns_flow:
            return torch.clamp(snr, max=self.snr_gamma) / (1 + snr.sqrt()).square()
        if self.prediction == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1)  # the same as min(SNR, gamma) / SNR, and 1 where SNR is 0
        capped = torch.clamp(snr, max=self.snr_gamma)
        return capped / (snr + 1) if self.prediction == "v_prediction" else capped


@cache
def _table(alphas: tuple[float, ...], device: Any) -> Tensor:
    """The alphas on a device, moved once: a copy in each step would hold the host up."""
    import torch

    return torch.tensor(alphas, dtype=torch.float32, device=device)


def biased(total: int, strategy: str, portion: float, multiplier: float, begin: int, end: int) -> tuple[float, ...] | None:
    """Weights of `total` steps.

    Args:
        strategy: `earlier` is the less noisy share `portion` of the steps, `later` the noisier one, `range` is begin to end; `none` is no bias.
        multiplier: how much more often these are trained.
    """
    if strategy == "none" or multiplier == 1:
        return None
    count = int(total * portion)
    first, last = {"earlier": (0, count), "later": (total - count, total), "range": (begin, min(end, total))}[strategy]
    return tuple(multiplier if first <= step < last else 1.0 for step in range(total))


def restricted(total: int, share: float, is_inverted: bool) -> tuple[float, ...]:
    """Weights of `total` steps where the less noisy `share` of them alone is trained, as a refiner is; the others if inverted."""
    count = max(1, int(total * share))
    return tuple(float((step < count) != is_inverted) for step in range(total))
