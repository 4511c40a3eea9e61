"""When a dataset takes part in a run: from one epoch or step to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The epochs and optimizer steps in which a dataset takes part, as users count them; both must hold."""

    start_epoch: int = 1
    """The first; epochs count from 1."""
    end_epoch: int | None = None
    """The last."""
    start_step: int = 0
    """Steps that pass before it takes part."""
    end_step: int | None = None
    """The last step; steps count from 1."""

    @property
    def epochs(self) -> tuple[float, float]:
        """The first epoch, counted from 0, and the first one behind the last."""
        return self.start_epoch - 1, math.inf if self.end_epoch is None else self.end_epoch

    @property
    def steps(self) -> tuple[float, float]:
        """Steps that are done when it begins, and when it ends."""
        return self.start_step, math.inf if self.end_step is None else self.end_step

    def problems(self) -> Iterator[str]:
        """Say what makes it empty."""
        if self.end_epoch is not None and self.end_epoch < self.start_epoch:
            yield f"end_epoch {self.end_epoch} is before start_epoch {self.start_epoch}"
        if self.end_step is not None and self.end_step <= self.start_step:
            yield f"end_step {self.end_step} is not after start_step {self.start_step}"

    def __str__(self) -> str:
        parts = []
        if self.start_epoch > 1 or self.end_epoch is not None:
            parts.append(f"epochs {self.start_epoch} to {self.end_epoch or 'the end'}")
        if self.start_step > 0 or self.end_step is not None:
            parts.append(f"steps {self.start_step + 1} to {self.end_step or 'the end'}")
        return ", ".join(parts)


ALWAYS = Window()
