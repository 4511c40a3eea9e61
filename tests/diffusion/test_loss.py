from __future__ import annotations

import math

import pytest
import torch

from simpletuner.diffusion.loss import LOSSES, loss, loss_function
from simpletuner.errors import ConfigError

SHAPE = (3, 2, 4, 5)
REFERENCES = {
    "l2": lambda d, c: d**2,
    "huber": lambda d, c: 2 * c * (math.sqrt(d**2 + c**2) - c),
    "smooth_l1": lambda d, c: 2 * (math.sqrt(d**2 + c**2) - c),
}


def pair(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return (torch.randn(SHAPE, generator=source) * scale).to(dtype), (torch.randn(SHAPE, generator=source) * scale).to(dtype)


def reference(name: str, prediction: torch.Tensor, target: torch.Tensor, c: float) -> list[float]:
    differences = (prediction.double() - target.double()).flatten(1).tolist()
    return [sum(REFERENCES[name](d, c) for d in row) / len(row) for row in differences]


@pytest.mark.parametrize("c", [0.1, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_its_formula_in_float64(name, scale, c):
    prediction, target = pair(scale)

    values = loss(name, prediction, target, c)

    assert values.shape == (3,) and values.dtype == torch.float32
    assert values.tolist() == pytest.approx(reference(name, prediction, target, c), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_compared_in_float32(name):
    prediction, target = pair(dtype=torch.bfloat16)

    values = loss(name, prediction, target)

    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(reference(name, prediction, target, 0.1), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_equals_the_slope_in_float64(name):
    prediction, target = pair()
    prediction.requires_grad_(True)

    loss(name, prediction, target).mean().backward()

    exact = prediction.detach().double().requires_grad_(True)
    d, c = exact - target.double(), 0.1
    formula = {"l2": d**2, "huber": 2 * c * ((d**2 + c**2).sqrt() - c), "smooth_l1": 2 * ((d**2 + c**2).sqrt() - c)}[name]
    formula.mean().backward()
    assert torch.allclose(prediction.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_has_no_slope(name):
    prediction, _ = pair()
    prediction.requires_grad_(True)

    value = loss(name, prediction, prediction.detach().clone()).sum()
    value.backward()

    assert value.item() == 0 and not prediction.grad.any()


def test_the_loss_of_a_run_is_that_row_with_its_c():
    prediction, target = pair()

    assert torch.equal(loss_function("huber", 0.4)(prediction, target), loss("huber", prediction, target, 0.4))


def test_a_wrong_name_is_answered_with_the_nearest_right_one():
    with pytest.raises(ConfigError, match="hubert") as caught:
        loss_function("hubert", 0.1)

    assert "did you mean 'huber'?" in caught.value.hint
