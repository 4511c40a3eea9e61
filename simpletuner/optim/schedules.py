"""One row a schedule: the optimizer step to the factor on the learning rate. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """How a schedule runs, apart from its form; rates as parts of the peak."""

    total_steps: int
    """Optimizer steps of the whole run, warm-up included."""
    warmup_steps: int = 0
    end: float = 0.0
    """Where the fall ends, as a part of the peak."""
    cycles: int = 1
    power: float = 1.0


Fall = Callable[[float, Shape], float]
"""The way from 1 towards 0 as progress goes from 0 to 1; what it leaves is stretched to end at `Shape.end`."""


def stay(progress: float, shape: Shape) -> float:
    return 1.0


def linear(progress: float, shape: Shape) -> float:
    return 1 - progress


def polynomial(progress: float, shape: Shape) -> float:
    return (1 - progress) ** shape.power


def cosine(progress: float, shape: Shape) -> float:
    """Half a wave: flat at the peak, steep in the middle, flat at the end."""
    return (1 + math.cos(math.pi * progress)) / 2


def cosine_with_restarts(progress: float, shape: Shape) -> float:
    """Half a wave in each cycle, then back to the peak at once; the last cycle ends at the end."""
    return cosine(1.0 if progress >= 1 else progress * shape.cycles % 1.0, shape)


def sine(progress: float, shape: Shape) -> float:
    """Whole waves: from the peak down to the end and back up, smoothly, in each cycle."""
    return (1 + math.sin(math.pi / 2 + 2 * math.pi * shape.cycles * progress)) / 2


@dataclass(frozen=True, slots=True)
class Row:
    """A schedule that a user may name."""

    name: str
    fall: Fall
    summary: str
    heeds: frozenset[str] = frozenset()
    """The options that shape it, besides lr_warmup_steps, which every schedule begins with; the others have no effect."""

    @property
    def falls(self) -> bool:
        """Whether the rate is another after the warm-up than at the end."""
        return self.fall is not stay


END, CYCLES, POWER = "lr_end", "lr_num_cycles", "lr_power"
SCHEDULES = [
    Row("constant", stay, "The same rate to the last step."),
    Row("constant_with_warmup", stay, "The same as constant, by the name that it has elsewhere where there is a warm-up."),
    Row("linear", linear, "A straight fall to lr_end.", frozenset({END})),
    Row("cosine", cosine, "Half a cosine wave down to lr_end.", frozenset({END})),
    Row("cosine_with_restarts", cosine_with_restarts, "lr_num_cycles such falls, each from the peak.", frozenset({END, CYCLES})),
    Row("polynomial", polynomial, "A fall to lr_end by the power lr_power.", frozenset({END, POWER})),
    Row("sine", sine, "lr_num_cycles waves between the peak and lr_end.", frozenset({END, CYCLES})),
]


def factor(row: Row, step: int, shape: Shape) -> float:
    """The learning rate at an optimizer step (the first is 0) as a part of its peak.

    The warm-up rises in equal parts and never trains at rate 0: its first step has 1 / (warmup_steps + 1), and the
    step after it the peak. The end is reached as the run ends, after its last step.
    """
    if step < shape.warmup_steps:
        return (step + 1) / (shape.warmup_steps + 1)
    progress = min(1.0, (step - shape.warmup_steps) / max(1, shape.total_steps - shape.warmup_steps))
    return 1 - (1 - shape.end) * (1 - row.fall(progress, shape))
