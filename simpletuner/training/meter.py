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


class Meter:
    """Holds the figures of one step until the next one is on its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[int, float, int, tuple[str, ...], float, Tensor, torch.cuda.Event | None] | None = None
        self._last = time.monotonic()

    def put(self, step: int, loss: Tensor, grad_norm: Tensor, learning_rate: float, epoch: int, samples: tuple[str, ...]) -> Figures | None:
        """Take the figures of this step and give those of the step before it."""
        ready = self.take()
        both = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        event = None
        if self._device.type == "cuda":
            pinned = torch.empty(2, dtype=torch.float32, pin_memory=True)
            both = pinned.copy_(both, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        now = time.monotonic()
        self._pending = (step, learning_rate, epoch, samples, now - self._last, both, event)
        self._last = now
        return ready

    def take(self) -> Figures | None:
        """Give what is held, waiting for the device if it must."""
        if self._pending is None:
            return None
        step, learning_rate, epoch, samples, seconds, both, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        loss, grad_norm = both.tolist()
        return Figures(step, loss, grad_norm, learning_rate, epoch, samples, seconds)

    def restart_clock(self) -> None:
        """Forget the time since the last figures, e.g. after a validation."""
        self._last = time.monotonic()
