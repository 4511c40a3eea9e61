"""Smoothed weights: an exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from simpletuner.options.training import Training
from simpletuner.training.gradients import PIECE, pieces


class Ema:
    """A float32 average of the trainable parameters, by their names."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, interval: int, warmup_steps: int, device: torch.device | None = None
    ) -> None:
        """
        Args:
            parameters: what is averaged; the average starts as a copy.
            decay: upper bound of the weight that the past keeps at each update.
            interval: optimizer steps between updates.
            warmup_steps: until then the average is a plain copy.
            device: where it is held; beside the parameters if not given.
        """
        self._parameters = dict(parameters)
        self._decay, self._interval, self._warmup_steps = decay, interval, warmup_steps
        self._average = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True) for name, parameter in self._parameters.items()
        }
        # The same tensors as lists, made once: hundreds of adapters have thousands of them.
        trained, averages = list[Tensor](self._parameters.values()), list(self._average.values())
        self._needs_copies = any(one.dtype != mean.dtype or one.device != mean.device for one, mean in zip(trained, averages))
        self._pieces = list(zip(pieces(trained, PIECE), pieces(averages, PIECE)))

    def decay_at(self, step: int) -> float:
        """The past's weight at optimizer step `step` (the first is 1): min((1+k)/(10+k), decay) with k = step - 1, and 0 at k = 0."""
        k = step - 1
        if step <= max(self._warmup_steps, 1):
            return 0.0
        return self._decay if self._warmup_steps else min((1 + k) / (10 + k), self._decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step`. Waits for nothing, unless the average is on another device."""
        if step % self._interval:
            return
        weight = 1.0 - self.decay_at(step)
        for trained, averages in self._pieces:
            # In float32, where what a step changes of 16-bit weights and what the past loses of its weight are not rounded away.
            new = [one.to(mean.device, mean.dtype) for one, mean in zip(trained, averages)] if self._needs_copies else trained
            torch._foreach_lerp_(averages, new, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the parameters while the body runs, and the trained values back after it, bit for bit."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(trained)

    def restart(self) -> None:
        """Make the average a copy of the parameters as they are now."""
        for name, parameter in self._parameters.items():
            self._average[name].copy_(parameter.detach())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert state.keys() == self._average.keys(), "the average belongs to another adapter"
        for name, value in state.items():
            self._average[name].copy_(value)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def build_ema(options: Training, parameters: Mapping[str, nn.Parameter]) -> Ema:
    """Make the average that the options describe."""
    device = torch.device("cpu") if options.ema_device == "cpu" else None
    return Ema(parameters, options.ema_decay, options.ema_update_interval, options.ema_warmup_steps, device)
