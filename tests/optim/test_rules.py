"""Which optimizers train bf16 weights: those that lose no small updates by it, and no others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.errors import ConfigError
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.optim.rules import check_release, trains_in
from simpletuner.options.memory import Memory
from simpletuner.options.optim import Optim

STEPS, RATE = 2000, 1e-5
KEEPING = [pytest.param(row.name, marks=pytest.mark.slow if row.name.startswith("ao-") else ()) for row in OPTIMIZERS if row.bf16_by]
LOSING = ["torch-adamw", "optimi-adan", "optimi-ranger", "torch-sgd", "lion"]


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """torchao compiles its step, which takes longer than all of these tests and changes no result here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def moved(name: str, dtype: torch.dtype, **options: Any) -> float:
    """How far weights from 1/8 to 1 go, on average, in steps of about 1e-5, all in one direction."""
    torch.manual_seed(0)
    start = torch.logspace(-3, 0, 64 * 64, base=2).view(64, 64).to(dtype)
    weights = nn.Parameter(start.clone())
    optimizer = build_optimizer(Optim(optimizer=name, learning_rate=RATE, **options), {"weights": weights})
    gradient = torch.ones_like(weights)
    for _ in range(STEPS):
        weights.grad = gradient.clone()
        optimizer.step()
    return (start.double() - weights.detach().double()).mean().item()


@pytest.mark.parametrize("name", KEEPING)
def test_bf16_weights_go_as_far_in_small_steps_as_float32_ones(name):
    row = next(row for row in OPTIMIZERS if row.name == name)
    if not row.is_installed:
        pytest.skip(f"{row.package} is not installed")

    exact = moved(name, torch.float32)

    assert exact > 0.7 * STEPS * RATE
    assert moved(name, torch.bfloat16) == pytest.approx(exact, rel=0.06)  # the state that optimi rounds to nearest is up to 5.6 % off


@pytest.mark.parametrize("name", LOSING)
def test_of_the_others_bf16_weights_do_not_move_at_all(name):
    row = next(row for row in OPTIMIZERS if row.name == name)
    if not row.is_installed:
        pytest.skip(f"{row.package} is not installed")

    assert row.bf16_by is None
    assert moved(name, torch.bfloat16) == 0


@pytest.mark.parametrize(
    ("optimizer", "memory", "expected"),
    [
        ("adamw_bf16", {"mixed_precision": "bf16"}, "bf16"),
        ("optimi-lion", {"mixed_precision": "bf16"}, "bf16"),
        ("torch-adamw", {"mixed_precision": "bf16"}, "fp32"),
        ("adamw_bf16", {"mixed_precision": "no"}, "fp32"),
        ("adamw_bf16", {"mixed_precision": "fp16"}, "fp32"),
        ("adamw_bf16", {"mixed_precision": "bf16", "base_model_default_dtype": "fp32"}, "fp32"),
        ("ao-adamw8bit", {"mixed_precision": "bf16", "base_model_default_dtype": "bf16"}, "bf16"),
    ],
)
def test_all_weights_are_trained_in_bf16_where_that_is_as_good(optimizer, memory, expected):
    assert trains_in(Optim(optimizer=optimizer), Memory(**memory)) == expected


def test_bf16_weights_under_an_optimizer_that_loses_updates_are_refused_with_those_that_do_not():
    with pytest.raises(ConfigError, match="below 1/256") as failed:
        trains_in(Optim(optimizer="torch-adamw"), Memory(base_model_default_dtype="bf16"))

    assert "adamw_bf16, optimi-adamw" in str(failed.value.hint)


@pytest.mark.parametrize(
    ("optimizer", "given"),
    [("optimi-adamw", "kahan_sum=false"), ("ao-adamw8bit", {"bf16_stochastic_round": False}), ("ao-adamw8bit", "bf16_stochastic_round=none")],
)
def test_an_optimizer_that_is_told_to_lose_updates_trains_no_bf16_weights(optimizer, given):
    options = Optim(optimizer=optimizer, optimizer_config=given)

    assert trains_in(options, Memory()) == "fp32"
    assert trains_in(options, Memory(base_model_default_dtype="fp32")) == "fp32"
    with pytest.raises(ConfigError, match=r"optimizer_config (kahan_sum|bf16_stochastic_round)=(False|None)"):
        trains_in(options, Memory(base_model_default_dtype="bf16"))


@pytest.mark.parametrize("given", ["kahan_sum=true", "kahan_sum=none", "weight_decay=0", None])
def test_settings_that_take_nothing_from_it_leave_weights_in_bf16(given):
    assert trains_in(Optim(optimizer="optimi-adamw", optimizer_config=given), Memory()) == "bf16"


def test_every_switch_is_an_argument_and_without_it_updates_are_lost():
    for row in (row for row in OPTIMIZERS if row.bf16_switch and row.is_installed):
        optimizer = build_optimizer(Optim(optimizer=row.name), {"weights": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))})
        assert row.bf16_switch in inspect.signature(type(optimizer)).parameters, row.name
    assert moved("optimi-adamw", torch.bfloat16, optimizer_config="kahan_sum=false") == 0


def test_that_bitsandbytes_waits_for_the_gpu_after_each_tensor_is_said():
    assert check_release(Optim(optimizer="adamw_bf16", optimizer_release_gradients=True)) == []
    if not next(row for row in OPTIMIZERS if row.name == "bnb-adamw8bit-paged").is_installed:
        pytest.skip("bitsandbytes is not installed")
    assert check_release(Optim(optimizer="bnb-adamw8bit-paged")) == []
    assert "waits for a GPU" in check_release(Optim(optimizer="bnb-adamw8bit-paged", optimizer_release_gradients=True))[0]


@pytest.mark.parametrize("name", ["prodigy", "prodigy_schedulefree"])
def test_one_rate_for_all_tensors_cannot_be_found_tensor_by_tensor(name):
    if not next(row for row in OPTIMIZERS if row.name == name).is_installed:
        pytest.skip("not installed")

    check_release(Optim(optimizer=name))
    with pytest.raises(ConfigError, match="all gradients together"):
        check_release(Optim(optimizer=name, optimizer_release_gradients=True))
