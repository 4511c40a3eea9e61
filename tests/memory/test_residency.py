"""Dtypes of the frozen parts, and letting go."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from simpletuner.memory.residency import release, vae_dtype, weight_dtype
from simpletuner.options.memory import Memory
from tests.builders.quantised import quantise


@dataclass
class Encoders:
    tokenizer: str
    networks: list[nn.Module]


@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_is_the_dtype_of_the_base(name, dtype):
    assert weight_dtype(Memory(mixed_precision=name)) == dtype


def test_the_vae_is_float32_on_the_cpu_and_bf16_elsewhere_unless_told():
    assert vae_dtype(Memory(), torch.device("cpu")) == torch.float32
    assert vae_dtype(Memory(), torch.device("cuda")) == torch.bfloat16
    assert vae_dtype(Memory(vae_dtype="fp16"), torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: Encoders("words", [net]), lambda net: {"text_encoder": net}, lambda net: (None, net)])
def test_released_networks_hold_no_memory_though_they_are_still_referred_to(wrap):
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    tensors = [weakref.ref(value) for value in network.state_dict(keep_vars=True).values()]

    release(wrap(network))

    assert all(reference() is None for reference in tensors)
    with pytest.raises(AttributeError, match="weight"):
        network(torch.zeros(1, 8))


def test_quantised_networks_are_released_too():
    network = nn.Sequential(nn.Linear(16, 8))
    quantise(network, "int8-quanto")
    reference = weakref.ref(network[0].weight)

    release(network)

    assert reference() is None


def test_what_was_never_loaded_is_not_searched_for():
    assert not _searches(lambda: release(None))
    assert _searches(release)


def _searches(call):
    """Whether a call looks for garbage everywhere."""
    searched = []
    gc.callbacks.append(lambda phase, facts: searched.append(facts["generation"]))
    try:
        call()
    finally:
        gc.callbacks.pop()
    return 2 in searched
