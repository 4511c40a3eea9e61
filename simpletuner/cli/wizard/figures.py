"""Rough figures that proposals rest on: memory in bytes, and numbers made readable."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.cli.wizard.proposals import Situation

RAM_ROOM, USUAL_RAM_BYTES = 0.75, 16e9
"""Share of main memory that weights may take, since other programs use it too; and its size where the system does not tell."""
WORK_BYTES = 2.5e9
"""That a step takes beside the weights, for one picture of 1024 px: activations under checkpointing, temporaries, CUDA itself."""


def held_bytes(s: Situation) -> float:
    """Roughly what the weights of the base take in the precision that was chosen."""
    precision = str(s.value("base_model_precision") or "no_change")
    whole = 32 if s.value("mixed_precision") == "no" else 16
    return s.model.weight_bytes * (whole if precision == "no_change" else 8 if "8" in precision else 4) / 16


def ram_room(s: Situation) -> float:
    """What weights may take of main memory, where there is no card."""
    return (s.machine.ram_bytes or USUAL_RAM_BYTES) * RAM_ROOM


def work_bytes(s: Situation) -> float:
    """Roughly what a step takes for one picture, beside the weights."""
    return max(0.6e9, WORK_BYTES * min(1.5, math.sqrt(s.model.billions / 6)) * (s.value("resolution") or 1024) ** 2 / 1024**2)


def rounded(number: float) -> int:
    """To two digits, the second of them 0 or 5: 1789 is 1800, 63 is 65."""
    if number < 10:
        return max(1, round(number))
    unit = 5 * 10 ** (math.floor(math.log10(number)) - 1)
    return round(number / unit) * unit


def readable(number: float) -> int:
    """To the nearest number that one counts in: 1, 2, 5, 10, 20, 25, 50, 100 and so on; 0 under a half."""
    unit = 10 ** max(0, math.floor(math.log10(number))) if number >= 1 else 1
    return min((0, *(int(step * unit) for step in (1, 2, 2.5, 5, 10))), key=lambda near: abs(near - number))
