"""Learning-rate schedules do what their names say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, PolynomialLR

from simpletuner.optim.schedules import SCHEDULES, Shape, factor

ROWS = {row.name: row for row in SCHEDULES}
SHAPE = Shape(total_steps=1000, warmup_steps=100, end=0.01)


def at(name: str, step: int, shape: Shape = SHAPE) -> float:
    return factor(ROWS[name], step, shape)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_constant_is_constant(name):
    assert {at(name, step, Shape(total_steps=1000, end=0.5, cycles=3)) for step in range(1000)} == {1.0}
    assert {at(name, step) for step in range(100, 1000)} == {1.0}


@pytest.mark.parametrize("name", list(ROWS))
def test_the_warm_up_rises_in_equal_parts_from_more_than_0_to_the_peak(name):
    rise = [at(name, step) for step in range(101)]

    assert rise[0] == pytest.approx(1 / 101)
    assert rise[100] == 1.0
    assert all(later - earlier == pytest.approx(1 / 101) for earlier, later in itertools.pairwise(rise))


@pytest.mark.parametrize("name", list(ROWS))
def test_without_warm_up_the_first_step_has_the_peak(name):
    assert at(name, 0, Shape(total_steps=10)) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_falls_end_at_lr_end_and_stay_there(name):
    shape = Shape(total_steps=1000, warmup_steps=100, end=0.01, cycles=3, power=0.8)

    assert at(name, 1000, shape) == pytest.approx(0.01)
    assert at(name, 5000, shape) == pytest.approx(0.01)
    assert at(name, 999, shape) < 0.02


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("linear", lambda optimizer: LinearLR(optimizer, 1.0, 0.01, 900)),
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, 900, 0.01)),
        ("polynomial", lambda optimizer: PolynomialLR(optimizer, 900, 0.8)),
        ("cosine_with_restarts", lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 300, eta_min=0.01)),
    ],
    ids=["linear", "cosine", "polynomial", "cosine_with_restarts"],
)
def test_after_the_warm_up_the_rates_are_those_of_torch(name, reference):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = reference(optimizer)
    shape = Shape(total_steps=1000, warmup_steps=100, end=0.0 if name == "polynomial" else 0.01, cycles=3, power=0.8)

    for step in range(100, 1000):
        assert at(name, step, shape) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_linear_is_straight_and_polynomial_is_its_power():
    for step in (100, 325, 550, 999):
        left = (1000 - step) / 900
        assert at("linear", step) == pytest.approx(0.01 + 0.99 * left)
        assert at("polynomial", step, Shape(1000, 100, 0.01, power=0.8)) == pytest.approx(0.01 + 0.99 * left**0.8)


def test_cosine_is_half_a_wave():
    for step in (100, 325, 550, 999):
        assert at("cosine", step) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * (step - 100) / 900)) / 2)
    values = [at("cosine", step) for step in range(100, 1001)]
    assert values == sorted(values, reverse=True)


def test_restarts_go_back_to_the_peak_once_a_cycle():
    shape = Shape(total_steps=900, cycles=3)
    values = [at("cosine_with_restarts", step, shape) for step in range(900)]

    assert [step for step in range(1, 900) if values[step] > values[step - 1]] == [300, 600]
    assert values[300] == values[600] == 1.0
    assert values[299] < 0.001


def test_sine_waves_between_the_peak_and_the_end_without_a_jump():
    shape = Shape(total_steps=800, end=0.1, cycles=2)
    values = [at("sine", step, shape) for step in range(801)]

    assert [values[step] for step in (0, 200, 400, 600, 800)] == pytest.approx([1, 0.1, 1, 0.1, 1])
    assert max(abs(later - earlier) for earlier, later in itertools.pairwise(values)) < 0.01


@given(
    name=st.sampled_from(list(ROWS)),
    step=st.integers(0, 3000),
    total=st.integers(1, 2000),
    warmup=st.integers(0, 2500),
    end=st.floats(0, 1),
    cycles=st.integers(1, 7),
    power=st.floats(0.1, 5),
)
def test_a_factor_lies_between_0_and_1(name, step, total, warmup, end, cycles, power):
    assert 0 <= factor(ROWS[name], step, Shape(total, warmup, end, cycles, power)) <= 1
