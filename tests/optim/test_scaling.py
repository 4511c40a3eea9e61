"""The rate for the pictures of a step."""

from __future__ import annotations

import pytest

from simpletuner.optim.build import build_schedule
from simpletuner.optim.scaling import scaled, scaling_notes
from simpletuner.options.optim import Optim
from simpletuner.options.training import Training


def test_a_step_takes_the_batches_of_all_processes():
    assert Training(train_batch_size=4, gradient_accumulation_steps=3, num_processes=2).images_per_step == 24


@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 1), ({"lr_scale": True}, 9), ({"lr_scale_sqrt": True}, 3), ({"lr_scale": True, "lr_scale_sqrt": True}, 3)],
)
def test_rates_are_multiplied_and_the_end_of_the_schedule_is_not(options, factor):
    given = Optim(learning_rate=1e-4, text_encoder_lr=2e-5, lr_scheduler="linear", lr_end=1e-5, **options)

    found = scaled(given, 9)

    assert found.learning_rate == pytest.approx(factor * 1e-4)
    assert found.text_encoder_lr == pytest.approx(factor * 2e-5)
    assert found.learning_rate * build_schedule(found, 10)(10) == pytest.approx(1e-5)
    assert scaled(found, 9) == found


def test_the_rate_that_comes_of_it_is_said():
    assert scaling_notes(Optim(), 9) == ()
    assert scaling_notes(Optim(lr_scale=True), 8) == ("lr_scale multiplies learning_rate 0.0001 by 8 pictures a step: 0.0008",)
    assert scaling_notes(Optim(lr_scale_sqrt=True), 9) == (
        "lr_scale_sqrt multiplies learning_rate 0.0001 by the square root of 9 pictures a step: 0.0003",
    )
