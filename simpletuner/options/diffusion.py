"""Options of the objective: at which noise levels, and by which loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import field_validator

from simpletuner.options.option import Problem, Section, option

FULL_SCALE = 1000.0
"""Steps between data and noise, where noise levels are given as steps."""


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

    flow_custom_timesteps: list[float] | None = option(None, advanced=True)
    """Draw these noise levels alone, each as often as it is listed, not shifted: shares of noise from 0 to 1; steps of 1000 if any is above 1."""

    flux_fast_schedule: bool = option(False, advanced=True)
    """Draw the few noise levels of a model that makes pictures in four steps: full noise in seven of ten, or 0.75, 0.5 or 0.25 of it."""

    distilled_guidance: float = option(1.0, ge=0, was=["flux_guidance_value"], advanced=True)
    """Guidance that a model distilled from it, such as Flux, is told while it learns; 1 keeps the distillation as it is."""

    distilled_guidance_mode: Literal["constant", "random-range"] = option("constant", was=["flux_guidance_mode"], advanced=True)
    """Tell such a model always `distilled_guidance`, or for each picture a number between `distilled_guidance_min` and `distilled_guidance_max`."""

    distilled_guidance_min: float = option(0.0, ge=0, was=["flux_guidance_min"], advanced=True)
    """Least guidance of `random-range`."""

    distilled_guidance_max: float = option(4.0, ge=0, was=["flux_guidance_max"], advanced=True)
    """Most guidance of `random-range`."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(None, advanced=True)
    """What a U-Net model answers: the noise, the velocity or the data. As the model's own scheduler says, if not given."""

    rescale_betas_zero_snr: bool | None = option(None, advanced=True)
    """Let the noise schedule end in pure noise, in training and in pictures; with `prediction_type` v_prediction. As the model's own scheduler
    says, if not given."""

    snr_gamma: float | None = option(None, gt=0, advanced=True)
    """Weigh noise levels by their signal-to-noise ratio, none more than this (min-SNR); 5 is usual."""

    snr_weight: float = option(1.0, gt=0, advanced=True)
    """Multiplies the weights of `snr_gamma`."""

    inference_scheduler_timestep_spacing: Literal["leading", "linspace", "trailing"] | None = option(None, advanced=True)
    """Which steps a U-Net model is asked at when pictures are made; as the model's own scheduler says, if not given."""

    diff2flow_enabled: bool = option(False, advanced=True)
    """Allow `diff2flow_loss`."""

    diff2flow_loss: bool = option(False, advanced=True)
    """Measure the error of a U-Net model on the velocity of flow matching that its answer amounts to; with `diff2flow_enabled`."""

    refiner_training: bool = option(False, advanced=True)
    """Train the least noisy steps alone, as a refiner is asked at them."""

    refiner_training_strength: float = option(0.2, gt=0, lt=1, advanced=True)
    """Share of the steps that `refiner_training` trains."""

    refiner_training_invert_schedule: bool = option(False, advanced=True)
    """Train the other steps instead, for a base that a refiner follows."""

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

    huber_c: float = option(0.1, gt=0, le=1, advanced=True)
    """Error from which `huber` and `smooth_l1` count less than by the square."""

    huber_schedule: Literal["snr", "exponential", "constant"] = option("snr", advanced=True)
    """That error at each noise level: `huber_c` everywhere (constant), or from 1 at the picture to `huber_c` at the noise."""

    scheduled_sampling_max_step_offset: int = option(0, ge=0, le=999, advanced=True)
    """Let the model itself make some noisy pictures, from up to so many steps of 1000 nearer to noise; each step is one more call. 0 is off."""

    scheduled_sampling_probability: float = option(0.0, ge=0, le=1, advanced=True)
    """Share of the pictures that are made so, where there is no ramp."""

    scheduled_sampling_ramp_steps: int = option(0, ge=0, advanced=True)
    """Steps over which the share goes from `scheduled_sampling_prob_start` to `scheduled_sampling_prob_end`; 0 is no ramp."""

    scheduled_sampling_prob_start: float = option(0.0, ge=0, le=1, advanced=True)
    """Share at the ramp's start."""

    scheduled_sampling_prob_end: float = option(0.5, ge=0, le=1, advanced=True)
    """Share at the ramp's end, and after it."""

    scheduled_sampling_start_step: int = option(0, ge=0, advanced=True)
    """Step before which no picture is made so, and from which the ramp runs."""

    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = option("linear", advanced=True)
    """How the ramp rises."""

    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = option("uniform", advanced=True)
    """How far pictures come: all ways alike, short ones more often (biased_early), or long ones (biased_late)."""

    scheduled_sampling_sampler: Literal["unipc", "euler", "dpm"] = option("unipc", advanced=True)
    """The sampler that makes them. UniPC's predictor of second order is DPM's formula; its corrector is left out."""

    scheduled_sampling_order: int = option(2, ge=1, le=2, advanced=True)
    """Order of `unipc` and `dpm`; the first is `euler`."""

    scheduled_sampling_reflexflow: bool | None = option(None, advanced=True)
    """Learn from the drift of these pictures by the terms of ReflexFlow, in flow matching; on where `scheduled_sampling_max_step_offset` is set."""

    scheduled_sampling_reflexflow_alpha: float = option(1.0, ge=0, advanced=True)
    """How much more a place counts the more it drifted."""

    scheduled_sampling_reflexflow_beta1: float = option(10.0, ge=0, advanced=True)
    """Weight of the term that turns the prediction towards the picture."""

    scheduled_sampling_reflexflow_beta2: float = option(1.0, ge=0, advanced=True)
    """Weight of the usual term, reweighed by the drift."""

    @field_validator("flow_schedule_shift")
    @classmethod
    def _zero_is_no_shift(cls, value: float | None) -> float | None:
        return 1.0 if value == 0 else value

    @field_validator("flow_custom_timesteps")
    @classmethod
    def _as_shares(cls, value: list[float] | None) -> list[float] | None:
        if value is None:
            return None
        if not value or not all(0 <= level <= FULL_SCALE for level in value):
            raise ValueError("noise levels from 0 to 1, or from 0 to 1000")
        return [level / FULL_SCALE for level in value] if max(value) > 1 else value

    @property
    def samples_itself(self) -> bool:
        """Whether the model makes some of the noisy pictures that it learns from."""
        likely = max(self.scheduled_sampling_prob_start, self.scheduled_sampling_prob_end) if self.scheduled_sampling_ramp_steps else 0.0
        return self.scheduled_sampling_max_step_offset > 0 and (likely or self.scheduled_sampling_probability) > 0

    def problems(self) -> Iterator[Problem]:
        ways = ("flow_use_uniform_schedule", "flow_use_beta_schedule", "flow_custom_timesteps", "flux_fast_schedule")
        keys = tuple(key for key in ways if getattr(self, key))
        if len(keys) > 1:
            yield Problem(keys, f"{' and '.join(keys)} exclude each other: noise levels have one distribution")
        if self.distilled_guidance_mode == "random-range" and self.distilled_guidance_min > self.distilled_guidance_max:
            keys = ("distilled_guidance_min", "distilled_guidance_max")
            yield Problem(keys, "distilled_guidance_min must not be above distilled_guidance_max")
        if self.input_perturbation and self.diff2flow_enabled and self.diff2flow_loss:
            keys = ("input_perturbation", "diff2flow_loss")
            text = "the velocity is computed from the noisier input, so that the target would tell of most of the noise that was added"
            yield Problem(keys, f"input_perturbation and diff2flow_loss exclude each other: {text}")
        if self.refiner_training and self.timestep_bias_strategy != "none":
            keys = ("refiner_training", "timestep_bias_strategy")
            yield Problem(keys, "refiner_training and timestep_bias_strategy exclude each other: both say which steps are trained")
        if self.inference_scheduler_timestep_spacing in ("leading", "linspace") and self.rescale_betas_zero_snr:
            keys = ("inference_scheduler_timestep_spacing", "rescale_betas_zero_snr")
            yield Problem(
                keys, "inference_scheduler_timestep_spacing must be trailing with rescale_betas_zero_snr: the others never ask for pure noise"
            )
        if self.timestep_bias_strategy == "range" and self.timestep_bias_begin >= self.timestep_bias_end:
            keys = ("timestep_bias_begin", "timestep_bias_end")
            yield Problem(keys, "timestep_bias_begin must be below timestep_bias_end")
