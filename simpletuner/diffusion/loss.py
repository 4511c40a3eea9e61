"""How far a prediction is from its target: one number a sample.

Letters: B batch, C latent channels, h w latent pixels, d = prediction - target, c the error at which Huber losses turn from
quadratic to linear, t the time in [0, 1], sigma the noise over the signal at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.errors import ConfigError, choose

Curve = Callable[[Tensor], Tensor]
"""A number of each time: (B,) to (B,)."""


def l2(d: Tensor, c: Tensor) -> Tensor:
    """d^2. Has no c."""
    return d.square()


def huber(d: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c): d^2 where |d| is far below c, 2 c |d| far above."""
    return c * smooth_l1(d, c)


def smooth_l1(d: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c): d^2 / c where |d| is far below c, 2 |d| far above.

    Written as 2 d^2 / (sqrt(d^2 + c^2) + c), which is the same; the difference of two near numbers would lose the small errors
    in float32.
    """
    squared = d.square()
    return 2 * squared / (torch.sqrt(squared + c * c) + c)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2, "huber": huber, "smooth_l1": smooth_l1}
"""`loss_type` to the loss of each element."""


def constant(t: Tensor, sigma: Tensor, c: float) -> Tensor:
    """c at every time."""
    return torch.full_like(t, c)


def exponential(t: Tensor, sigma: Tensor, c: float) -> Tensor:
    """c^t: 1 at the data, c at the noise."""
    return c**t


def snr(t: Tensor, sigma: Tensor, c: float) -> Tensor:
    """(1 - c) / (1 + sigma)^2 + c: 1 at the data, c where there is nothing but noise."""
    return (1 - c) / (1 + sigma).square() + c


SCHEDULES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {"constant": constant, "exponential": exponential, "snr": snr}
"""`huber_schedule` to c at each time (Khrapov et al. 2024, arXiv 2403.16728): robust where noise hides the picture, exact near it."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a run: rows of the tables above, and the numbers that they want."""

    name: str
    """A row of `LOSSES`."""
    huber_c: float = 0.1
    """c of the Huber losses, above 0; what the schedule makes of it is theirs."""
    schedule: str = "constant"
    """A row of `SCHEDULES`."""
    sigma: Curve = torch.zeros_like
    """Noise over signal at each time, which the process knows; `snr` alone asks for it."""

    def __call__(self, prediction: Tensor, target: Tensor, time: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean loss of each sample.

        Args:
            prediction, target: (B, C, h, w), any floating dtype; compared in float32.
            time: (B,), in [0, 1]; 0 is data, 1 is noise.
            mask: by which each element's loss is multiplied, broadcast to (B, C, h, w). The mean is over all elements none the less: what
                is masked out counts as without an error.

        Returns:
            float32, (B,).
        """
        d = prediction.float() - target.float()
        elements = LOSSES[self.name](d, self._c(time).view(-1, *[1] * (d.ndim - 1)))
        return (elements if mask is None else elements * mask.float()).flatten(1).mean(1)

    def _c(self, time: Tensor) -> Tensor:
        """c of each sample, (B,)."""
        t = time.float()
        return SCHEDULES[self.schedule](t, self.sigma(t), self.huber_c)


def loss_function(name: str, huber_c: float, schedule: str = "constant", sigma: Curve = torch.zeros_like) -> Loss:
    """Give the loss of a run.

    Args:
        sigma: noise over signal at each time, (B,) to (B,).

    Raises:
        ConfigError: no such loss, or no such schedule.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss_type {name!r} does not exist", hint=choose(name, LOSSES, "losses"))
    if schedule not in SCHEDULES:
        raise ConfigError(f"huber_schedule {schedule!r} does not exist", hint=choose(schedule, SCHEDULES, "schedules"))
    return Loss(name, huber_c, schedule, sigma)
