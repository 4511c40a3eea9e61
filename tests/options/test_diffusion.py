"""Options of the objective that do not go together, and those that are read in more than one form."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from simpletuner.options.diffusion import Diffusion


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True}, "exclude each other"),
        ({"flow_custom_timesteps": "500", "flux_fast_schedule": True}, "flow_custom_timesteps and flux_fast_schedule exclude"),
        ({"flow_custom_timesteps": [1200]}, "from 0 to 1000"),
        ({"flow_custom_timesteps": [-0.1]}, "from 0 to 1000"),
        ({"flow_custom_timesteps": "early, late"}, "number"),
        ({"distilled_guidance_mode": "random-range", "distilled_guidance_min": 5}, "must not be above"),
        ({"input_perturbation": 0.1, "diff2flow_enabled": True, "diff2flow_loss": True}, "the target would tell of most of the noise"),
        ({"refiner_training": True, "timestep_bias_strategy": "later"}, "exclude each other"),
        ({"inference_scheduler_timestep_spacing": "leading", "rescale_betas_zero_snr": True}, "must be trailing"),
        ({"scheduled_sampling_order": 3}, "less than or equal to 2"),
        ({"huber_c": 0}, "greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        Diffusion(**values)


def test_listed_noise_levels_are_shares_or_steps_of_a_thousand():
    assert Diffusion(flow_custom_timesteps="1000, 500,250").flow_custom_timesteps == [1.0, 0.5, 0.25]
    assert Diffusion(flow_custom_timesteps=[1, 0.5]).flow_custom_timesteps == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "is_on"),
    [
        ({}, False),
        ({"scheduled_sampling_max_step_offset": 5}, False),
        ({"scheduled_sampling_probability": 0.5}, False),
        ({"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_probability": 0.5}, True),
        ({"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_ramp_steps": 10}, True),
        ({"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_ramp_steps": 10, "scheduled_sampling_prob_end": 0}, False),
    ],
)
def test_a_model_samples_itself_where_steps_and_a_chance_are_given(values, is_on):
    assert Diffusion(**values).samples_itself is is_on
