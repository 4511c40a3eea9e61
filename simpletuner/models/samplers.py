"""Samplers that a user may choose in place of the one that a model came with."""

from __future__ import annotations

from typing import Any

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
"""Names, as `validation_noise_scheduler` has them, to the classes in diffusers."""


def use_sampler(pipeline: Any, name: str) -> None:
    """Have a pipeline sample in another way, by the schedule of noise that it has."""
    import diffusers

    pipeline.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(pipeline.scheduler.config)
