from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.options.training import Training
from simpletuner.training.ema import Ema, build_ema


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), value))


@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (2, 0.1818), (100, 0.9174), (1000, 0.9911), (1792, 0.995), (5000, 0.995)])
def test_without_warm_up_the_past_gains_weight_with_the_steps(step, decay):
    ema = Ema({}, decay=0.995, interval=1, warmup_steps=0)

    assert ema.decay_at(step) == pytest.approx(decay, abs=6e-5)


def test_during_warm_up_the_average_is_a_copy_and_then_decays_at_the_full_rate():
    ema = Ema({}, decay=0.9, interval=1, warmup_steps=10)

    assert ema.decay_at(10) == 0.0
    assert ema.decay_at(11) == 0.9


def test_the_average_follows_the_formula_in_float64():
    weight = parameter(0.0)
    ema = Ema({"w": weight}, decay=0.9, interval=1, warmup_steps=0)
    reference = 0.0
    for step in range(1, 40):
        weight.data.fill_(float(step))
        ema.update(step)
        decay = ema.decay_at(step)
        reference = decay * reference + (1 - decay) * step

    assert ema.state_dict()["w"][0].item() == pytest.approx(reference, rel=1e-6)


def test_only_every_nth_step_counts():
    weight = parameter(1.0)
    ema = Ema({"w": weight}, decay=0.5, interval=3, warmup_steps=0)
    weight.data.fill_(5.0)
    ema.update(2)

    assert ema.state_dict()["w"][0].item() == 1.0


def test_an_average_on_the_cpu_of_bf16_weights_is_the_average_in_float32():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = build_ema(Training(ema_device="cpu", ema_decay=0.5, ema_warmup_steps=1), {"w": weight})
    weight.data.fill_(2.0)
    ema.update(2)
    weight.data.fill_(4.0)
    ema.update(3)

    average = ema.state_dict()["w"]

    assert average.dtype == torch.float32
    assert average.tolist() == [2.75] * 3


@pytest.mark.parametrize("piece", [2, 1 << 25])
def test_an_average_of_bf16_weights_loses_no_small_changes(monkeypatch, piece):
    monkeypatch.setattr("simpletuner.training.ema.PIECE", piece)
    weights = {name: nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for name in "ab"}
    ema = Ema(weights, decay=0.9999, interval=1, warmup_steps=1)
    for weight in weights.values():
        weight.data.fill_(1 + 1 / 128)  # the next number in bf16
    for step in range(2, 102):
        ema.update(step)

    for average in ema.state_dict().values():
        assert average.tolist() == pytest.approx([1 + (1 - 0.9999**100) / 128] * 3, abs=5e-6)  # of 8e-5


def test_what_is_updated_is_what_is_restored_and_saved():
    weight = parameter(1.0)
    ema = Ema({"w": weight}, decay=0.5, interval=1, warmup_steps=1)
    ema.load_state_dict({"w": torch.full((2,), 3.0)})
    ema.update(2)

    assert ema.state_dict()["w"].tolist() == [2.0, 2.0]


def test_swapping_in_gives_the_trained_weights_back_bit_for_bit():
    weight = nn.Parameter(torch.randn(1000).bfloat16())
    before = weight.detach().clone()
    ema = Ema({"w": weight}, decay=0.5, interval=1, warmup_steps=0)
    weight.data.add_(1)
    trained = weight.detach().clone()

    with ema.swapped_in():
        assert torch.equal(weight, before)

    assert torch.equal(weight, trained)
