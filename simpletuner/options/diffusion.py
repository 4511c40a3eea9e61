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

    distilled_guidance: float = option(1.0, ge=0, was=["flux_guidance_value"], advanced=True)
    """Guidance that a model distilled from it, such as Flux, is told while it learns; 1 keeps the distillation as it is."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(None, advanced=True)
    """What a U-Net model answers: the noise, the velocity or the data. As the model's own scheduler says, if not given."""

    rescale_betas_zero_snr: bool = option(False, advanced=True)
    """Let the noise schedule end in pure noise, in training and in pictures; with `prediction_type` v_prediction."""

    snr_gamma: float | None = option(None, gt=0, advanced=True)
    """Weigh noise levels by their signal-to-noise ratio, none more than this (min-SNR); 5 is usual."""

    offset_noise: bool = option(False, advanced=True)
    """Give noise another mean in each channel, so that pictures may become dark or bright as a whole."""

    noise_offset: float = option(0.1, ge=0, advanced=True)
    """How far `offset_noise` moves the mean."""

    noise_offset_probability: float = option(0.25, ge=0, le=1, advanced=True)
    """Share of the batches that get `offset_noise`."""

    input_perturbation: float = option(0.0, ge=0, advanced=True)
    """Mix in so much more noise than the target tells of."""

    input_perturbation_steps: int = option(0, ge=0, advanced=True)
    """Steps over which `input_perturbation` fades out; 0 keeps it."""

    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option("none", advanced=True)
    """Train some steps more often: the less noisy ones (earlier), the noisier ones (later), or a range."""

    timestep_bias_multiplier: float = option(1.0, gt=0, advanced=True)
    """How much more often these are trained; below 1 less often."""

    timestep_bias_portion: float = option(0.25, gt=0, le=1, advanced=True)
    """Share of the steps that `earlier` and `later` mean."""

    timestep_bias_begin: int = option(0, ge=0, advanced=True)
    """First step of the `range`."""

    timestep_bias_end: int = option(1000, ge=1, advanced=True)
    """Step before which the `range` ends."""

    disable_segmented_timestep_sampling: bool = option(False, advanced=True)
    """Draw the noise levels of a batch independently, instead of one from each part of the schedule."""

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
        if self.timestep_bias_strategy == "range" and self.timestep_bias_begin >= self.timestep_bias_end:
            keys = ("timestep_bias_begin", "timestep_bias_end")
            yield Problem(keys, "timestep_bias_begin must be below timestep_bias_end")
