"""Scheduled sampling: train from where the model itself comes to, in place of latents that noise was mixed into.

When pictures are made, a model goes on from its own answers; in training it never sees their errors. Here some samples start a few
steps nearer to noise, the model as it is takes them to the time that is trained, and there it learns (Bengio et al. 2015; for
diffusion Ren et al. 2024).

Letters: B batch, C latent channels, h w latent pixels, K steps of the longest way in a batch; x data, n noise; signal and spread as `Process.mix`
gives them; log(signal / spread) is half the logarithm of the SNR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from simpletuner.types import Noised

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from simpletuner.diffusion.loss import Loss
    from simpletuner.diffusion.process import Process

Strategy = Literal["uniform", "biased_early", "biased_late"]


@dataclass(frozen=True, slots=True)
class Chance:
    """How likely a sample is taken along, as the run goes on."""

    constant: float
    """Where there is no ramp."""
    first: float
    last: float
    ramp_steps: int
    """Optimizer steps from `first` to `last`; 0 is no ramp."""
    start_step: int
    """Until this optimizer step nothing is taken along."""
    shape: Literal["linear", "cosine"]

    def at(self, step: int) -> float:
        if step < self.start_step:
            return 0.0
        if not self.ramp_steps:
            return self.constant
        done = min(1.0, (step - self.start_step) / self.ramp_steps)
        risen = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.first + (self.last - self.first) * risen


@dataclass(frozen=True, slots=True)
class Reflex:
    """ReflexFlow (Huang et al. 2025, arXiv 2512.04904; later DEFAR, arXiv 2606.28226): learn from the drift of a rollout.

    The authors' code is not public; this is our reading of what they describe.
    """

    alpha: float
    """How much more an element counts that drifted."""
    direction: float
    """beta 1, weight of anti-drift rectification."""
    compensation: float
    """beta 2, weight of the loss that `alpha` reweighs."""

    def __call__(self, loss: Loss, prediction: Tensor, noised: Noised, mask: Tensor | None) -> Tensor:
        """The loss of samples with a drift, (B,); of those without one the plain loss.

        Frequency compensation: elements are weighed by 1 + alpha |drift| / max |drift|. Anti-drift rectification: the square of the distance
        between two unit vectors, the predicted velocity and the direction from the data to where the latents really are.
        """
        import torch
        from torch.nn.functional import normalize

        assert noised.drift is not None
        drift, whole = noised.drift.abs(), mask if mask is not None else 1.0
        largest = drift.flatten(1).amax(1).view(-1, *[1] * (drift.ndim - 1))
        weighed = loss(prediction, noised.target, noised.time, whole * (1 + self.alpha * drift / largest.clamp(min=1e-12)))
        t = noised.time.view(-1, *[1] * (drift.ndim - 1))
        away = noised.drift + t * noised.target  # (x_t + drift) - x, as x_t - x = t (n - x)
        ahead, right = (normalize((whole * vector.float()).flatten(1), dim=1) for vector in (prediction, away))
        rectified = (ahead - right).square().sum(1)
        return torch.where(largest.flatten() > 0, self.compensation * weighed + self.direction * rectified, weighed)


@dataclass(frozen=True, slots=True)
class ScheduledSampling:
    """Which samples are rolled out, and how far."""

    most_steps: int
    """The longest way, in steps of the process."""
    strategy: Strategy
    chance: Chance
    order: int
    """1 is Euler's method, which is DDIM's; 2 is DPM-Solver++(2M)."""
    reflex: Reflex | None

    def way(self, time: Tensor, step: int, process: Process, generator: Generator) -> Tensor | None:
        """Draw the times that each sample passes on its way to `time` (B,), from the noisiest.

        A sample with a short way waits at its start for the others. Everything is on the CPU, so that nothing waits for a device.

        Returns:
            (K + 1, B), the last row `time`; None where no sample is rolled out.
        """
        import torch

        is_taken = torch.rand(time.shape, generator=generator) < self.chance.at(step)
        u = torch.rand(time.shape, generator=generator)
        drawn = {"uniform": u, "biased_early": u.square(), "biased_late": u.sqrt()}[self.strategy]
        counts = torch.where(is_taken, (drawn * (self.most_steps + 1)).long(), 0)
        # Whole steps that are left towards noise; a little is added, as times in float32 may be a hair off a step.
        left = ((process.last_time - time.double()) * process.total_steps + 1e-3).floor().long().clamp(min=0)
        counts = counts.minimum(left)
        longest = int(counts.max())
        if longest == 0:
            return None
        ahead = counts[None].clamp(max=torch.arange(longest, -1, -1)[:, None])  # (K + 1, B)
        return (time.double() + ahead.double() / process.total_steps).clamp(max=process.last_time).float()


def roll_out(process: Process, predict: Callable[[Noised], Tensor], start: Noised, way: Tensor, order: int) -> Tensor:
    """Take latents along a way with the model as it is.

    Args:
        predict: what the denoiser answers.
        start: latents at `way[0]`.
        way: falling times, (K + 1, B), where the latents are.
        order: 1 or 2.

    Returns:
        Latents at `way[-1]`, (B, C, h, w).
    """
    import torch

    latents, before, gained = start.latents, None, None
    shape = (-1, *[1] * (latents.ndim - 1))
    for now, then in pairwise(way):
        data, noise = process.estimate(latents, predict(replace(start, latents=latents, time=now)), now)
        (signal, spread), (next_signal, next_spread) = process.mix(now), process.mix(then)
        moved = next_signal.view(shape) * data + next_spread.view(shape) * noise
        gain = torch.log(next_signal * spread / (next_spread * signal))  # of log(signal / spread); infinite from pure noise or to pure data
        if order == 2 and before is not None and gained is not None:
            # Lu et al. 2022, algorithm 2: the data is taken further along the line of the last two estimates. A sample that has only
            # begun to move gained nothing before, and has no such line.
            ratio = torch.nan_to_num(gain / (2 * gained), nan=0.0, posinf=0.0, neginf=0.0)
            further = ratio * (next_signal - signal * next_spread / spread)
            moved = moved + torch.nan_to_num(further, nan=0.0, posinf=0.0, neginf=0.0).view(shape) * (data - before)
        latents = torch.where((then < now).view(shape), moved, latents)
        before, gained = data, torch.where(then < now, gain, 0)
    return latents
