"""From options to an optimizer and a schedule; tests of every optimizer are in test_rows.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from simpletuner.errors import ConfigError
from simpletuner.optim.arguments import parse_arguments
from simpletuner.optim.build import build_optimizer, build_schedule, check_devices, restore, set_rate
from simpletuner.optim.catalogue import OPTIMIZERS, find
from simpletuner.optim.notes import notes
from simpletuner.options.optim import Optim


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


def test_settings_changed_between_two_runs_win_over_the_saved_ones():
    parameters = make_parameters()
    old = build_optimizer(Optim(learning_rate=1e-3), parameters)
    descend(old, parameters, range(2))
    new = build_optimizer(Optim(learning_rate=5e-4, optimizer_config="weight_decay=0.2"), parameters)

    restore(new, old.state_dict())

    assert new.param_groups[0]["initial_lr"] == 5e-4
    assert new.param_groups[0]["weight_decay"] == 0.2
    assert new.state[parameters["matrix"]]["step"] == 2


def test_float32_state_of_bf16_weights_stays_float32():
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    old, new = (torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for _ in range(2))
    old.state[parameter]["momentum_buffer"] = torch.full((4, 4), 1 / 3)

    restore(new, copy.deepcopy(old.state_dict()))

    assert new.state[parameter]["momentum_buffer"].equal(torch.full((4, 4), 1 / 3))


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


def test_text_encoders_are_a_group_of_their_own_with_their_own_rate_on_the_same_schedule():
    parameters = make_parameters()
    text = {"vector": parameters["vector"]}

    optimizer = build_optimizer(Optim(learning_rate=3e-4, text_encoder_lr=1e-5), parameters, text)
    set_rate(optimizer, 0.5)

    main, own = optimizer.param_groups
    assert [id(value) for value in main["params"]] == [id(parameters["matrix"])] and [id(value) for value in own["params"]] == [id(text["vector"])]
    assert (main["initial_lr"], own["initial_lr"]) == (3e-4, 1e-5) and (main["lr"], own["lr"]) == (1.5e-4, 5e-6)
    assert [group["lr"] for group in build_optimizer(Optim(learning_rate=3e-4), parameters, text).param_groups] == [3e-4, 3e-4]


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
        ({"optimizer": "bnb-sgd", "optimizer_config": "momentum=0"}, "momentum", "optimizer_config"),
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


def test_a_gpu_that_is_too_old_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    row = find("ao-adamwfp8")

    check_devices(row, {torch.device("cpu")})
    with pytest.raises(ConfigError, match=r"8\.9, and cuda:0 has 8\.6"):
        check_devices(row, {torch.device("cuda", 0)})


def test_muon_takes_matrices_and_kernels_and_leaves_the_rest_to_adamw():
    pytest.importorskip("pytorch_optimizer")
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in {"bias": (4,), "matrix": (4, 6), "kernel": (4, 2, 3, 3)}.items()}
    text = {"text": nn.Parameter(torch.ones(3, 3))}

    optimizer = build_optimizer(Optim(optimizer="muon", learning_rate=1e-3, text_encoder_lr=1e-4), {**parameters, **text}, text)

    found = [(group["use_muon"], group["initial_lr"], [one.ndim for one in group["params"]]) for group in optimizer.param_groups]
    assert found == [(True, 1e-3, [2, 4]), (False, 1e-3, [1]), (True, 1e-4, [2])]


def test_settings_without_effect_are_said():
    assert notes(Optim(lr_power=2)) == ("lr_power 2 has no effect with lr_scheduler constant (it has with polynomial)",)
    assert notes(Optim(optimizer="optimi-lion", learning_rate=4e-5, lr_warmup_steps=100)) == ()
    assert notes(Optim(lr_scheduler="cosine", lr_warmup_steps=10, lr_end=1e-6)) == ()
    assert "finds its own" in notes(Optim(optimizer="prodigy"))[0]
    assert "constant rate" in notes(Optim(optimizer="adamw_schedulefree", lr_scheduler="cosine"))[0]
    assert notes(Optim(optimizer="adamw_schedulefree", lr_warmup_steps=10)) == ()


def test_the_optimizer_takes_no_notice_of_a_state_it_was_not_built_with():
    """A copy of the state is enough: nothing is kept outside it."""
    parameters = make_parameters()
    optimizer = build_optimizer(Optim(optimizer="adamw_bf16"), parameters)
    descend(optimizer, parameters, range(3))

    state = copy.deepcopy(optimizer.state_dict())

    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
