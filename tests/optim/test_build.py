"""From options to an optimizer and a schedule; every installed optimizer goes downhill and resumes exactly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from simpletuner.errors import ConfigError
from simpletuner.optim.build import build_optimizer, build_schedule, parse_arguments, restore, set_rate
from simpletuner.optim.catalogue import OPTIMIZERS, find
from simpletuner.optim.notes import notes
from simpletuner.options.optim import Optim

RATES = {"torch-adadelta": 1.0, "torch-sgd": 0.05, "optimi-sgd": 0.05, "torch-asgd": 0.05, "torch-adagrad": 0.1}
INSTALLED = [row.name for row in OPTIMIZERS if row.is_installed]


@pytest.fixture(autouse=True)
def no_compiler():
    """torchao compiles its step, which takes longer than all of these tests and changes no result here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(64, 64, generator=generator)),
        "vector": nn.Parameter(torch.randn(16, generator=generator)),
    }


def descend(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> list[float]:
    """Steps on a quadratic bowl, with noise in the gradient that depends on the step alone."""
    losses = []
    for step in steps:
        loss = sum((parameter.float() ** 2).mean() for parameter in parameters.values())
        loss.backward()
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad.add_(1e-4 * noise.to(parameter.dtype))
        set_rate(optimizer, 1 / (1 + step / 20))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(name: str, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(Optim(optimizer=name, learning_rate=RATES.get(name, 0.02)), parameters)


@pytest.mark.filterwarnings("ignore:.*aged")  # bitsandbytes says on the CPU that it pages nothing there
@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_optimizer_goes_downhill(name):
    parameters = make_parameters()

    losses = descend(build(name, parameters), parameters, range(20))

    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.filterwarnings("ignore:.*aged")
@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_optimizer_continues_from_a_file_bit_for_bit(name):
    straight = make_parameters()
    optimizer = build(name, straight)
    descend(optimizer, straight, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = {key: nn.Parameter(value.detach().clone()) for key, value in straight.items()}

    descend(optimizer, straight, range(4, 8))
    again = build(name, resumed)
    file.seek(0)
    restore(again, torch.load(file, weights_only=True))
    descend(again, resumed, range(4, 8))

    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_settings_changed_between_two_runs_win_over_the_saved_ones():
    parameters = make_parameters()
    old = build_optimizer(Optim(learning_rate=1e-3), parameters)
    descend(old, parameters, range(2))
    new = build_optimizer(Optim(learning_rate=5e-4, optimizer_config="weight_decay=0.2"), parameters)

    restore(new, old.state_dict())

    assert new.param_groups[0]["initial_lr"] == 5e-4
    assert new.param_groups[0]["weight_decay"] == 0.2
    assert new.state[parameters["matrix"]]["step"] == 2


def test_a_state_of_other_parameters_is_refused():
    parameters = make_parameters()
    old = build_optimizer(Optim(), {"matrix": parameters["matrix"]})

    with pytest.raises(ConfigError, match="does not fit"):
        restore(build_optimizer(Optim(), parameters), old.state_dict())


def test_all_parameters_are_one_group_with_the_rate_at_its_peak():
    optimizer = build_optimizer(Optim(learning_rate=3e-4), make_parameters())

    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["initial_lr"] == 3e-4
    assert set_rate(optimizer, 0.5) == optimizer.param_groups[0]["lr"] == 1.5e-4


def test_adamw_is_fused_unless_the_user_says_otherwise():
    assert build_optimizer(Optim(), make_parameters()).param_groups[0]["fused"] is True
    assert build_optimizer(Optim(optimizer_config="fused=false"), make_parameters()).param_groups[0]["fused"] is False


def test_arguments_come_from_text_or_from_an_object():
    expected = {"betas": (0.9, 0.95), "weight_decay": 0.1, "amsgrad": True}

    assert parse_arguments("betas=(0.9,0.95), weight_decay=0.1,amsgrad=True") == expected
    assert parse_arguments("beta1=0.9,beta2=0.95,weight_decay=1e-1,amsgrad=true") == expected
    assert parse_arguments({"betas": [0.9, 0.95], "weight_decay": "0.1", "amsgrad": "true"}) == expected
    assert parse_arguments(None) == parse_arguments("") == {}


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"optimizer": "torch-adamv"}, "'torch-adamv'", "torch-adamw"),
        ({"optimizer_config": "weight_decai=0.1"}, "'weight_decai'", "did you mean 'weight_decay'"),
        ({"optimizer_config": "lr=0.1"}, "lr", "learning_rate"),
        ({"optimizer_config": "amsgrad"}, "no value", "key=value"),
        ({"optimizer_config": "beta1=0.9"}, "beta1", "both"),
        ({"optimizer_config": "betas=(2,3)"}, "refuses", "optimizer_config"),
        ({"optimizer": "optimi-lion", "optimizer_config": "gradient_release=true"}, "gradient_release", "Known arguments"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused(options, said, hint):
    with pytest.raises(ConfigError) as error:
        build_optimizer(Optim(**options), make_parameters())

    assert said in error.value.message
    assert hint in error.value.hint


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match="prodigyopt") as error:
        find("prodigy")

    assert "simpletuner[optimizers]" in error.value.hint


def test_names_are_unique_and_every_row_says_what_it_is():
    assert len({row.name for row in OPTIMIZERS}) == len(OPTIMIZERS)
    assert all(row.summary.endswith(".") for row in OPTIMIZERS)


def test_a_schedule_is_relative_to_the_learning_rate():
    options = Optim(learning_rate=1e-3, lr_scheduler="linear", lr_end=1e-4, lr_warmup_steps=9)

    schedule = build_schedule(options, total_steps=109)

    assert [schedule(0), schedule(9), schedule(59), schedule(109)] == pytest.approx([0.1, 1.0, 0.55, 0.1])


def test_settings_without_effect_are_said():
    assert notes(Optim(lr_power=2)) == ("lr_power 2 has no effect with lr_scheduler constant (it has with polynomial)",)
    assert notes(Optim(optimizer="optimi-lion", learning_rate=4e-5, lr_warmup_steps=100)) == ()
    assert notes(Optim(lr_scheduler="cosine", lr_warmup_steps=10, lr_end=1e-6)) == ()
    assert "finds its own" in notes(Optim(optimizer="prodigy"))[0]


def test_the_optimizer_takes_no_notice_of_a_state_it_was_not_built_with():
    """A copy of the state is enough: nothing is kept outside it."""
    parameters = make_parameters()
    optimizer = build("adamw_bf16", parameters)
    descend(optimizer, parameters, range(3))

    state = copy.deepcopy(optimizer.state_dict())

    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
