from __future__ import annotations

import math

import pytest
import torch

from simpletuner.diffusion.times import FAST, Beta, Listed, LogitNormal, Uniform, resolution_shift, shift_time

COUNT = 200_000
EVERY = [LogitNormal(), LogitNormal(2.5), Uniform(), Beta(2.0, 2.0), Beta(0.5, 3.0), Listed((0.25, 0.5))]


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def beta_cdf(x: float, alpha: float, beta: float, steps: int = 20_000) -> float:
    """The incomplete beta function by the midpoint rule over u = x^alpha, which takes out the pole at 0 of alpha < 1."""
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    top = x**alpha
    inner = sum((1 - ((i + 0.5) / steps * top) ** (1 / alpha)) ** (beta - 1) for i in range(steps))
    return inner * top / steps / alpha / math.exp(log_norm)


@pytest.mark.parametrize("times", EVERY, ids=str)
def test_times_are_float32_on_the_cpu_and_within_0_and_1(times):
    drawn = times.sample(1000, generator())

    assert drawn.shape == (1000,) and drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert drawn.min() >= 0 and drawn.max() <= 1


@pytest.mark.parametrize("times", EVERY, ids=str)
def test_the_generator_is_the_only_source_of_randomness(times):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = times.sample(50, generator())
    torch.random.set_rng_state(torch.Generator().manual_seed(99).get_state())
    second = times.sample(50, generator())
    other = times.sample(50, generator(8))

    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.random.set_rng_state(before)
    times.sample(50, generator())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("times", "cdf"),
    [
        (LogitNormal(), lambda x: normal_cdf(math.log(x / (1 - x)))),
        (LogitNormal(2.5), lambda x: normal_cdf(math.log(x / (1 - x)) / 2.5)),
        (Uniform(), lambda x: x),
        (Beta(2.0, 2.0), lambda x: 3 * x**2 - 2 * x**3),
        (Beta(0.5, 3.0), lambda x: beta_cdf(x, 0.5, 3.0)),
        (Beta(7.0, 1.5), lambda x: beta_cdf(x, 7.0, 1.5)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_each_distribution_has_its_cumulative_function(times, cdf):
    drawn = times.sample(COUNT, generator()).double()

    for x in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        expected = cdf(x)
        spread = math.sqrt(expected * (1 - expected) / COUNT)
        assert abs((drawn <= x).double().mean().item() - expected) < 4 * spread + 1e-6, x


def test_listed_times_come_as_often_as_they_are_listed():
    drawn = FAST.sample(COUNT, generator())

    shares = {value: float((drawn == value).double().mean()) for value in (1.0, 0.75, 0.5, 0.25)}
    assert shares == pytest.approx({1.0: 0.7, 0.75: 0.1, 0.5: 0.1, 0.25: 0.1}, abs=0.005)


@pytest.mark.parametrize(("time", "shifted"), [(0.0, 0.0), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 0.964286), (1.0, 1.0)])
def test_a_static_shift_of_3_moves_times_as_measured_elsewhere(time, shifted):
    assert shift_time(torch.tensor([time]), 3.0).item() == pytest.approx(shifted, abs=1e-6)


def test_a_shift_of_1_changes_nothing():
    times = Uniform().sample(1000, generator())

    assert torch.equal(shift_time(times, 1.0), times)


@pytest.mark.parametrize(("tokens", "shifted"), [(1024, 0.652489), (4096, 0.759511), (4032, 0.757527), (16384, 0.961948)])
def test_the_resolution_shift_moves_the_middle_as_measured_elsewhere(tokens, shifted):
    assert shift_time(torch.tensor([0.5]), resolution_shift(tokens)).item() == pytest.approx(shifted, abs=1e-6)
