"""Attention computed by other means than the model's own.

Letters: B batch, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from simpletuner.models.attention import Compute, Switch, dispatched, try_out, with_exact_gradients


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 20, 16, generator=generator, requires_grad=True) for _ in range(3)]  # (B, H, T, D)


MASK = torch.arange(20).expand(2, 1, 1, 20) < torch.tensor([20, 7]).view(2, 1, 1, 1)
CALLS = {"plain": {}, "masked": {"attn_mask": MASK}, "scaled": {"scale": 0.3}, "causal": {"is_causal": True}}


def passes(compute: Compute, **call: object) -> list[Tensor]:
    """The answer and the gradients."""
    given = inputs()
    answer = compute(*given, **call)
    answer.square().sum().backward()
    return [answer.detach(), *(tensor.grad for tensor in given if tensor.grad is not None)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_backend_is_called_as_pytorch_is(call):
    for found, wanted in zip(passes(dispatched("_native_math"), **call), passes(F.scaled_dot_product_attention, **call)):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("call", [CALLS["plain"], CALLS["masked"]], ids=["plain", "masked"])
def test_flex_answers_the_same(call):
    given = [tensor.detach() for tensor in inputs()]  # on the CPU it has no gradients

    assert torch.allclose(dispatched("flex")(*given, **call), F.scaled_dot_product_attention(*given, **call), atol=1e-5)


def coarse(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: object) -> Tensor:
    """Attention in few bits and without gradients, as 8-bit kernels give it."""
    with torch.no_grad():
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **named).mul(16).round().div(16)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_kernel_without_gradients_gets_those_of_exact_attention(call):
    upstream = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(1))

    def passes(compute: Compute) -> tuple[Tensor, list[Tensor]]:
        given = inputs()
        answer = compute(*given, **call)
        return answer.detach(), list(torch.autograd.grad(answer, given, upstream))

    answer, gradients = passes(with_exact_gradients(coarse))
    exact, wanted = passes(F.scaled_dot_product_attention)

    assert torch.equal(answer, coarse(*inputs(), **call))
    assert not torch.equal(answer, exact)
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted))


def test_a_kernel_that_cuts_the_graph_is_not_trained_with():
    with pytest.raises(RuntimeError):
        try_out(coarse, torch.device("cpu"), torch.float32, trains=True)

    try_out(coarse, torch.device("cpu"), torch.float32, trains=False)


def test_trying_one_out_draws_no_numbers_that_somebody_else_would_get():
    before = torch.get_rng_state()

    try_out(F.scaled_dot_product_attention, torch.device("cpu"), torch.float32, trains=True)

    assert torch.equal(torch.get_rng_state(), before)


def test_the_library_s_own_choice_stays_as_it_was():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()

    dispatched("_native_math")

    assert _AttentionBackendRegistry.get_active_backend() == before


def test_an_unknown_backend_is_an_error():
    with pytest.raises((RuntimeError, ValueError)):
        dispatched("xformers_of_tomorrow")


def test_what_is_switched_applies_inside_attention_alone():
    layer = torch.nn.Module()
    layer.processor, layer.forward = None, lambda: F.scaled_dot_product_attention(*inputs())
    switch = Switch()
    switch.attach(layer)

    with switch.set_to(coarse):
        inside, outside = layer.forward(), F.scaled_dot_product_attention(*inputs())

    assert torch.equal(inside, coarse(*inputs()))
    assert torch.equal(outside, F.scaled_dot_product_attention(*inputs()))
    assert torch.equal(layer.forward(), outside)
