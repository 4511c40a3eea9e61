"""Adapters that change with the time are told it before each call of the denoiser, in every family's own sampler."""

from __future__ import annotations

import pytest
import torch

from simpletuner.training.clock import clocked
from tests.training.families import TINY, family, pipeline_of, steps_of


class Noting:
    def __init__(self):
        self.times: list[float] = []

    def at_time(self, time):
        self.times.append(float(time))


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_time_is_that_of_training_at_each_step_of_a_picture(name):
    pipeline, adapter, told = pipeline_of(name), Noting(), []
    denoiser = getattr(pipeline, family(name).denoiser_folder)
    denoiser.register_forward_pre_hook(
        lambda module, arguments, named: told.append(float(torch.as_tensor(named.get("timestep", (*arguments, 0, 0)[1])).flatten()[0])),
        with_kwargs=True,
    )
    guidance = family(name).pipeline_call_arguments(3.0)
    arguments = {"width": 64, "height": 64, **steps_of(name, 3), **guidance, "output_type": "latent"}

    with clocked(pipeline, denoiser, adapter) as clock:
        pipeline(
            prompt="a cat",
            **arguments,
            **family(name).pipeline_text_arguments(),
            **family(name).pipeline_callback(lambda index, latents: clock.after_step(index)),
        )

    assert len(adapter.times) == len(told) >= 3 and adapter.times == sorted(adapter.times, reverse=True)
    assert [TINY[name].time(time) for time in told] == pytest.approx(adapter.times, rel=1e-3, abs=1e-6)
