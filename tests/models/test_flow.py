"""The options of flow matching become the process that they ask for."""

from __future__ import annotations

import pytest

from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.times import FAST, Beta, Listed, LogitNormal, Uniform
from simpletuner.models.flow import flow_matching
from simpletuner.options.diffusion import Diffusion


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, FlowMatching(LogitNormal(1.0), 3.0)),
        ({"flow_sigmoid_scale": 2}, FlowMatching(LogitNormal(2.0), 3.0)),
        ({"flow_schedule_shift": 1.5}, FlowMatching(LogitNormal(), 1.5)),
        ({"flow_schedule_shift": 0}, FlowMatching(LogitNormal(), 1.0)),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 1.5}, FlowMatching(LogitNormal(), None)),
        ({"flow_use_uniform_schedule": True}, FlowMatching(Uniform(), 3.0)),
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4}, FlowMatching(Beta(4.0, 2.0), 3.0)),
        ({"flux_fast_schedule": True, "flow_schedule_auto_shift": True}, FlowMatching(FAST, 1.0)),
        ({"flow_custom_timesteps": [500, 900], "flow_schedule_auto_shift": True}, FlowMatching(Listed((0.5, 0.9)), 1.0)),
    ],
)
def test_noise_levels_are_drawn_and_shifted_as_the_options_say(values, expected):
    assert flow_matching(Diffusion(**values), 3.0) == expected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, (1.0, None)),
        ({"distilled_guidance": 3.5}, (3.5, None)),
        ({"distilled_guidance_mode": "random-range", "distilled_guidance_max": 5}, (0.0, 5.0)),
    ],
)
def test_a_distilled_model_is_told_guidance_and_others_none(values, told):
    options = Diffusion(**values)

    process = flow_matching(options, 3.0, options.distilled_guidance)

    assert (process.guidance, process.most_guidance) == told
    assert flow_matching(options, 3.0) == FlowMatching(LogitNormal(), 3.0)
