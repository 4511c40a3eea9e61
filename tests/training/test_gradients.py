from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.training.gradients import clip, is_beyond_repair


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_clipping_by_norm_scales_all_gradients_together():
    parameters = [with_gradient(3.0), with_gradient(4.0)]

    norm = clip(parameters, limit=1.0, method="norm")

    assert norm.item() == pytest.approx(5.0)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_clipping_by_value_clamps_each_element():
    parameter = with_gradient(-3.0, 0.005, 0.02)

    clip([parameter], limit=0.01, method="value")

    assert parameter.grad.tolist() == pytest.approx([-0.01, 0.005, 0.01])


def test_a_limit_of_zero_only_measures():
    parameter = with_gradient(30.0)

    assert clip([parameter], limit=0.0, method="norm").item() == 30.0
    assert parameter.grad.item() == 30.0


def test_a_nan_anywhere_shows_in_the_norm():
    assert not torch.isfinite(clip([with_gradient(1.0), with_gradient(float("nan"))], limit=1.0, method="value"))


def test_an_infinity_is_seen_although_clipping_by_value_would_hide_it():
    parameter = with_gradient(1.0, float("inf"))

    assert not torch.isfinite(clip([parameter], limit=1.0, method="value"))
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "is_lost"),
    [
        (0.1, 3.0, None, False),
        (float("nan"), 3.0, None, True),
        (float("nan"), 3.0, 65536.0, True),
        (0.1, float("inf"), None, True),
        (0.1, float("inf"), 65536.0, False),
        (0.1, float("nan"), 0.5, True),
    ],
)
def test_only_an_overflow_that_a_smaller_scale_mends_is_passed_over(loss, norm, scale, is_lost):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)

    assert is_beyond_repair(loss, norm, scaler) == is_lost
