from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from simpletuner.diffusion.denoising import Denoising
from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.loss import LOSSES, SCHEDULES, loss_function
from simpletuner.diffusion.times import Uniform
from simpletuner.errors import ConfigError

SHAPE = (3, 2, 4, 5)
TIMES = torch.tensor([0.003, 0.5, 0.999])
REFERENCES = {
    "l2": lambda d, c: d**2,
    "huber": lambda d, c: 2 * c * (math.sqrt(d**2 + c**2) - c),
    "smooth_l1": lambda d, c: 2 * (math.sqrt(d**2 + c**2) - c),
}
ALPHAS = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
PROCESSES = {"flow": FlowMatching(Uniform(), 1.0), "denoising": Denoising(tuple(ALPHAS.tolist()), "epsilon")}
SIGMAS = {
    "flow": lambda time: time / (1 - time),
    "denoising": lambda time: math.sqrt((1 - float(ALPHAS.double()[round(time * 1000)])) / float(ALPHAS.double()[round(time * 1000)])),
}
CURVES = {
    "constant": lambda c, time, sigma: c,
    "exponential": lambda c, time, sigma: c**time,
    "snr": lambda c, time, sigma: (1 - c) / (1 + sigma) ** 2 + c,
}


def pair(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return (torch.randn(SHAPE, generator=source) * scale).to(dtype), (torch.randn(SHAPE, generator=source) * scale).to(dtype)


def reference(name: str, prediction: torch.Tensor, target: torch.Tensor, curve: list[float]) -> list[float]:
    differences = (prediction.double() - target.double()).flatten(1).tolist()
    return [sum(REFERENCES[name](d, c) for d in row) / len(row) for row, c in zip(differences, curve)]


@pytest.mark.parametrize("c", [0.1, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_its_formula_in_float64(name, scale, c):
    prediction, target = pair(scale)

    values = loss_function(name, c)(prediction, target, TIMES)

    assert values.shape == (3,) and values.dtype == torch.float32
    assert values.tolist() == pytest.approx(reference(name, prediction, target, [c] * 3), rel=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
def test_c_follows_its_schedule_at_each_samples_own_time(name, schedule, process):
    prediction, target = pair()

    values = loss_function(name, 0.1, schedule, PROCESSES[process].sigma)(prediction, target, TIMES)

    curve = [CURVES[schedule](0.1, time, SIGMAS[process](time)) for time in TIMES.double().tolist()]
    assert values.tolist() == pytest.approx(reference(name, prediction, target, curve), rel=1e-6)


def test_the_schedules_fall_from_1_at_the_data_to_c_at_pure_noise():
    ends = torch.tensor([0.0, 1.0])

    for schedule in ("exponential", "snr"):
        found = loss_function("huber", 0.1, schedule, PROCESSES["flow"].sigma)._c(ends)
        assert found.tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_compared_in_float32(name):
    prediction, target = pair(dtype=torch.bfloat16)

    values = loss_function(name, 0.1)(prediction, target, TIMES)

    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(reference(name, prediction, target, [0.1] * 3), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_takes_elements_out_and_the_mean_stays_over_all(name):
    prediction, target = pair()
    mask = (torch.arange(SHAPE[-1]) < 2).float().expand(SHAPE[0], 1, *SHAPE[2:])
    whole = loss_function(name, 0.1)

    masked = whole(prediction, target, TIMES, mask)

    left = whole(prediction[..., :2], target[..., :2], TIMES)
    assert torch.allclose(masked, left * 2 / SHAPE[-1], rtol=1e-6)
    assert torch.equal(whole(prediction, target, TIMES, torch.ones(SHAPE[0], 1, *SHAPE[2:])), whole(prediction, target, TIMES))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_equals_the_slope_in_float64(name):
    prediction, target = pair()
    prediction.requires_grad_(True)

    loss_function(name, 0.1)(prediction, target, TIMES).mean().backward()

    exact = prediction.detach().double().requires_grad_(True)
    d, c = exact - target.double(), 0.1
    formula = {"l2": d**2, "huber": 2 * c * ((d**2 + c**2).sqrt() - c), "smooth_l1": 2 * ((d**2 + c**2).sqrt() - c)}[name]
    formula.mean().backward()
    assert torch.allclose(prediction.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_has_no_slope(name):
    prediction, _ = pair()
    prediction.requires_grad_(True)

    value = loss_function(name, 0.1)(prediction, prediction.detach().clone(), TIMES).sum()
    value.backward()

    assert value.item() == 0 and not prediction.grad.any()


@pytest.mark.parametrize(("wrong", "near"), [(("hubert", "constant"), "huber"), (("huber", "exponent"), "exponential")])
def test_a_wrong_name_is_answered_with_the_nearest_right_one(wrong, near):
    name, schedule = wrong
    with pytest.raises(ConfigError) as caught:
        loss_function(name, 0.1, schedule)

    assert f"did you mean '{near}'?" in caught.value.hint
