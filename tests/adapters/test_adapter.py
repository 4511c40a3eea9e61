"""The contract, over every kind there is."""

from __future__ import annotations

import pytest
import torch

from simpletuner.adapters.adapter import Adapter, kind_of
from simpletuner.options.adapters import Adapters
from simpletuner.plugins import load, names

FOLDER = "simpletuner.adapters.kinds"
OPTIONS = {
    "full": {"model_type": "full"},
    "lycoris": {"lycoris": {"algo": "lokr", "factor": 4, "dropout": 0.5}},
    "standard": {"lora_dropout": 0.5},
    "with_text": {"lora_dropout": 0.5, "train_text_encoder": True},
}


def test_options_name_the_kind():
    assert kind_of(Adapters(model_type="full", lora_type="lycoris")) == "full"
    assert kind_of(Adapters(lora_type="lycoris")) == "lycoris"
    assert kind_of(Adapters()) == "standard"
    assert kind_of(Adapters(train_text_encoder=True)) == "with_text"


def test_every_kind_has_a_case_here():
    assert names(FOLDER) == sorted(OPTIONS)
    assert all(issubclass(load(FOLDER, name, Adapter), Adapter) for name in OPTIONS)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_seed_alone_decides_how_it_starts(kind, make_denoiser, make_adapter):
    starts = []
    for _ in range(2):
        denoiser, adapter = make_denoiser(), make_adapter(**OPTIONS[kind])
        torch.manual_seed(9)
        adapter.attach(denoiser)
        starts.append(adapter.tensors())

    assert list(starts[0]) == list(starts[1])
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_parameter_learns_and_nothing_else_does(kind, make_denoiser, make_adapter, run, perturb):
    denoiser, adapter = make_denoiser(), make_adapter(**OPTIONS[kind])
    adapter.attach(denoiser)
    adapter.train(False)
    perturb(adapter)

    run(denoiser).square().mean().backward()

    ours = {id(parameter) for parameter in adapter.parameters().values()}
    unused = [name for name, parameter in adapter.parameters().items() if parameter.grad is None]
    assert not [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad and id(parameter) not in ours]
    assert not unused


@pytest.mark.parametrize("kind", ["lycoris", "standard"])
def test_dropout_is_on_in_training_alone_and_follows_the_seed(kind, make_denoiser, make_adapter, run, perturb):
    denoiser, adapter = make_denoiser(), make_adapter(**OPTIONS[kind])
    adapter.attach(denoiser)
    perturb(adapter)

    def answer(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return run(denoiser)

    adapter.train(True)
    assert answer(1).equal(answer(1)) and not answer(1).equal(answer(2))
    adapter.train(False)
    assert answer(1).equal(answer(2))


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradients_under_checkpointing_are_the_same_bits(kind, make_denoiser, make_adapter, run, perturb):
    seen = []
    for checkpointing in (False, True):
        denoiser, adapter = make_denoiser(), make_adapter(**OPTIONS[kind])
        adapter.attach(denoiser)
        perturb(adapter)
        denoiser.train()
        adapter.train(True)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        torch.manual_seed(4)
        run(denoiser).square().mean().backward()
        seen.append({name: parameter.grad for name, parameter in adapter.parameters().items()})

    assert all(torch.equal(grad, seen[1][name]) for name, grad in seen[0].items())
