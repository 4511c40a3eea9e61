"""Figures of a step, read when the device has them anyway, so that the loop never waits for a number."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Figures:
    """What one optimizer step came to."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    grad_norm: float
    learning_rate: float
    epoch: int
    samples: tuple[str, ...]
    """Ids of the samples on this process."""
    seconds: float
    """From the step before to this one, as the loop saw it."""

    def values(self) -> dict[str, float]:
        """Under the names that dashboards of this field use."""
        return {"train_loss": self.loss, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate, "epoch": float(self.epoch + 1)}


class Coming:
    """Numbers that a device is still computing, on their way to main memory. Nothing waits for them until they are read."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event = numbers, None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = pinned.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers, once the device has them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


class Meter:
    """Holds the figures of one step until the next one is on its way."""

    def __init__(self) -> None:
        self._pending: tuple[int, float, int, tuple[str, ...], float, Coming] | None = None
        self._last = time.monotonic()

    def put(self, step: int, loss: Tensor, grad_norm: Tensor, learning_rate: float, epoch: int, samples: tuple[str, ...]) -> Figures | None:
        """Take the figures of this step and give those of the step before it."""
        ready = self.take()
        both = Coming(torch.stack([loss.detach().float(), grad_norm.detach().float()]))
        now = time.monotonic()
        self._pending = (step, learning_rate, epoch, samples, now - self._last, both)
        self._last = now
        return ready

    def take(self) -> Figures | None:
        """Give what is held, waiting for the device if it must."""
        if self._pending is None:
            return None
        step, learning_rate, epoch, samples, seconds, both = self._pending
        self._pending = None
        loss, grad_norm = both.read()
        return Figures(step, loss, grad_norm, learning_rate, epoch, samples, seconds)

    def restart_clock(self) -> None:
        """Forget the time since the last figures, e.g. after a validation."""
        self._last = time.monotonic()
