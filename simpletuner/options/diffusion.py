"""Options of the objective: at which noise levels, and by which loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator

from simpletuner.options.option import Problem, Section, option


class Diffusion(Section):
    """At which noise levels the model learns, and how its error is measured."""

    flow_schedule_shift: float | None = option(None, ge=0)
    """Moves the noise levels: above 1 towards composition, below 1 towards detail; 1, or 0, leaves them. The family's own if not given."""

    flow_schedule_auto_shift: bool = option(False)
    """Let the shift grow with the image's size. Wins over `flow_schedule_shift`."""

    flow_sigmoid_scale: float = option(1.0, gt=0, advanced=True)
    """Spread of the logit-normal distribution that noise levels are drawn from; a larger one reaches the ends more often."""

    flow_use_uniform_schedule: bool = option(False, advanced=True)
    """Draw all noise levels equally often, in place of the logit-normal distribution."""

    flow_use_beta_schedule: bool = option(False, advanced=True)
    """Draw noise levels from a beta distribution, in place of the logit-normal one."""

    flow_beta_schedule_alpha: float = option(2.0, gt=0, advanced=True)
    """Alpha of the beta distribution: a larger one draws more noise."""

    flow_beta_schedule_beta: float = option(2.0, gt=0, advanced=True)
    """Beta of the beta distribution: a larger one draws less noise."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = option("l2", advanced=True)
    """How an error counts: by its square (l2), or less for large ones (huber, smooth_l1)."""

    huber_c: float = option(0.1, gt=0, advanced=True)
    """Error from which `huber` and `smooth_l1` count less than by the square."""

    @field_validator("flow_schedule_shift")
    @classmethod
    def _zero_is_no_shift(cls, value: float | None) -> float | None:
        return 1.0 if value == 0 else value

    def problems(self) -> Iterator[Problem]:
        if self.flow_use_uniform_schedule and self.flow_use_beta_schedule:
            keys = ("flow_use_uniform_schedule", "flow_use_beta_schedule")
            yield Problem(keys, "flow_use_uniform_schedule and flow_use_beta_schedule exclude each other: noise levels have one distribution")
