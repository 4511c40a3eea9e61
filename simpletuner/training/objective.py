"""Read off the options what the maths of a run is: its loss, and which samples the model brings to their time itself."""

from __future__ import annotations

from typing import Literal

from simpletuner.diffusion.loss import Loss, loss_function
from simpletuner.diffusion.process import Process
from simpletuner.diffusion.rollout import Chance, Reflex, ScheduledSampling
from simpletuner.options.diffusion import Diffusion


def loss_of(options: Diffusion, process: Process) -> Loss:
    return loss_function(options.loss_type, options.huber_c, options.huber_schedule, process.sigma)


def scheduled_sampling_of(options: Diffusion, objective: Literal["flow", "denoising"]) -> ScheduledSampling | None:
    """The rollouts of a run, or none; the terms of ReflexFlow are for flow matching alone."""
    if not options.samples_itself:
        return None
    reflex = Reflex(
        options.scheduled_sampling_reflexflow_alpha, options.scheduled_sampling_reflexflow_beta1, options.scheduled_sampling_reflexflow_beta2
    )
    return ScheduledSampling(
        most_steps=options.scheduled_sampling_max_step_offset,
        strategy=options.scheduled_sampling_strategy,
        chance=Chance(
            options.scheduled_sampling_probability,
            options.scheduled_sampling_prob_start,
            options.scheduled_sampling_prob_end,
            options.scheduled_sampling_ramp_steps,
            options.scheduled_sampling_start_step,
            options.scheduled_sampling_ramp_shape,
        ),
        order=1 if options.scheduled_sampling_sampler == "euler" else options.scheduled_sampling_order,
        reflex=reflex if objective == "flow" and options.scheduled_sampling_reflexflow is not False else None,
    )
