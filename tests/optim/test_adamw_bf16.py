"""AdamW for bf16 weights."""

from __future__ import annotations

import torch
from torch import nn

from simpletuner.optim import adamw_bf16
from simpletuner.optim.adamw_bf16 import AdamWBF16, chances, round_stochastically_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded_three_times(value: torch.Tensor) -> list[torch.Tensor]:
    return [round_stochastically_(value.clone(), chance) for chance in chances(value.numel(), generator())]


def test_float32_parameters_are_trained_exactly_as_by_adamw():
    start = torch.randn(50, generator=generator())
    ours, theirs = nn.Parameter(start.clone().double().float()), nn.Parameter(start.clone())
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = AdamWBF16([ours], **settings), torch.optim.AdamW([theirs], **settings)

    for step in range(30):
        grad = torch.randn(50, generator=generator(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rounding_keeps_the_mean_and_goes_to_a_neighbour():
    value = torch.full((200_000,), 1.0 + 1 / 1024)  # an eighth of the way from 1 to the next number in bf16

    for rounded in rounded_three_times(value):
        assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
        assert abs((rounded > 1).float().mean().item() - 1 / 8) < 0.005


def test_the_three_draws_of_a_step_have_nothing_to_do_with_each_other():
    draws = torch.stack([chance.double() for chance in chances(100_000, generator())])

    assert draws.min() == 0 and draws.max() == (1 << 16) - 1
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.015


def test_numbers_that_bf16_has_stay_and_so_do_signs_and_infinities():
    value = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 1e-30]).bfloat16().float()

    for rounded in rounded_three_times(value):
        assert rounded.view(torch.int32).equal(value.view(torch.int32))
    assert all(rounded.max() <= -1 for rounded in rounded_three_times(-torch.rand(1000) - 1))


def test_updates_below_the_spacing_of_bf16_are_kept_on_average():
    weights = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = AdamWBF16([weights], lr=1e-4, weight_decay=0.0)

    for _ in range(50):
        weights.grad = torch.ones_like(weights)
        optimizer.step()

    assert abs(weights.float().mean().item() - (1 - 50 * 1e-4)) < 2e-4
    assert optimizer.state[weights]["exp_avg_sq"].dtype == torch.bfloat16


def test_the_chance_follows_from_the_step_and_the_place():
    def run(seed: int = 0) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1 << 30, ()).item()))  # the global generator has no say
        weights = [nn.Parameter(torch.ones(100, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamWBF16(weights, lr=1e-3, seed=seed)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return torch.stack([weight.detach() for weight in weights])

    assert run().equal(run())
    assert not run().equal(run(seed=1))
    assert not run()[0].equal(run()[1])


def test_how_many_are_updated_at_once_is_nothing_to_float32(monkeypatch):
    def run() -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.linspace(-1, 1, size).reshape(shape)) for size, shape in ((7, (7,)), (12, (3, 4)), (30, (5, 6)), (2, (2,)))]
        optimizer = AdamWBF16(weights, lr=0.01)
        for step in range(3):
            for weight in weights[step == 1 :]:  # one has no gradient in the second step
                weight.grad = weight.detach() * (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        return [weight.detach() for weight in weights]

    together = run()
    monkeypatch.setattr(adamw_bf16, "MOST_ON_CPU", 15)

    for whole, parted in zip(together, run(), strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-6, atol=1e-7)


def test_a_kernel_in_another_memory_layout_is_trained_alike():
    def run(layout: torch.memory_format) -> torch.Tensor:
        weight = nn.Parameter(torch.arange(96.0).reshape(2, 4, 3, 4).contiguous(memory_format=layout))
        optimizer = AdamWBF16([weight, nn.Parameter(torch.ones(2))], lr=0.01)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach().clone()
        optimizer.step()
        return weight.detach()

    assert run(torch.channels_last).equal(run(torch.contiguous_format))
