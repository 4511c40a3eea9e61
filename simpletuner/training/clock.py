"""Tell an adapter the time at each step of a sampler, for those that change with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from simpletuner.adapters.effect import Effect


class Clock:
    """Which step of a pipeline's sampler is being made."""

    def __init__(self, pipeline: Any, adapter: Effect) -> None:
        self._pipeline, self._adapter = pipeline, adapter
        self._index = 0

    def before_call(self, denoiser: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Read the time off the sampler: what families tell their denoisers of it differs, the sampler's own scale does not."""
        scheduler = self._pipeline.scheduler
        first = getattr(scheduler, "begin_index", None) or 0  # of a pipeline that goes on from a picture
        self._adapter.at_time(scheduler.timesteps[first + self._index].reshape(1) / scheduler.config.num_train_timesteps)

    def after_step(self, index: int) -> None:
        self._index = index + 1


@contextmanager
def clocked(pipeline: Any, denoiser: nn.Module, adapter: Effect) -> Iterator[Clock]:
    """Have the adapter told the time before each call of the denoiser while one picture is made.

    Whoever calls the pipeline says when a step is over.
    """
    clock = Clock(pipeline, adapter)
    hook = denoiser.register_forward_pre_hook(clock.before_call)
    try:
        yield clock
    finally:
        hook.remove()
