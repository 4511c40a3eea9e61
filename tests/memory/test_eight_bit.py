"""Layers that multiply in 8 bits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simpletuner.memory.quantisers.eight_bit import EightBit, EightBitLinear, rotation, to_eight_bits, turned

KINDS = ["int8", "int8 rotated", "float8_e4m3fn"]
LIMITS = {"int8": 0.015, "int8 rotated": 0.015, "float8_e4m3fn": 0.05}
"""How far answers and gradients of one layer may be off, relative to theirs in float64."""


def make_layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(192, 128).to(dtype).requires_grad_(False)


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


def answer_and_gradient(layer: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    answer = layer(x)
    return answer.detach(), torch.autograd.grad(answer, x, direction)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_are_near_those_of_the_plain_layer(kind, tokens, dtype):
    layer, x, direction = make_layer(dtype), torch.randn(2, tokens, 192, dtype=dtype), torch.randn(2, tokens, 128, dtype=dtype)
    true = answer_and_gradient(make_layer(dtype).double(), x.double(), direction.double())

    found = answer_and_gradient(EightBit(kind).quantise(layer), x, direction)

    for mine, other in zip(found, true):
        assert mine.dtype == dtype and relative_error(mine, other) < LIMITS[kind]


OUTLIERS = {"int8": (0.08, 0.09), "int8 rotated": (0.018, 0.09), "float8_e4m3fn": (0.04, 0.04)}
"""The same where four inputs, and four of the gradients that come back, are 30 times as large as the others. Gradients are not turned."""


@pytest.mark.parametrize("has_outliers", [False, True], ids=["plain inputs", "outliers"])
@pytest.mark.parametrize("inputs, outputs", [(576, 2304), (2304, 576), (640, 640), (1536, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_against_bf16_is_bounded_for_the_shapes_of_models(kind, inputs, outputs, has_outliers):
    """Forward and in the gradient to the input, against the plain bf16 layer of the same weights."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    layer.weight.normal_(0, inputs**-0.5, generator=generator)
    layer.bias.zero_()
    x, direction = (torch.randn(96, size, generator=generator).bfloat16() for size in (inputs, outputs))
    if has_outliers:
        x[:, :: inputs // 4] *= 30
        direction[:, :: outputs // 4] *= 30
    true = answer_and_gradient(layer, x, direction)

    found = answer_and_gradient(EightBit(kind).quantise(layer), x, direction)

    limits = OUTLIERS[kind] if has_outliers else (LIMITS[kind], LIMITS[kind])
    assert all(relative_error(mine, other) < limit for mine, other, limit in zip(found, true, limits))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_does_not_multiply_in_8_bits_answers_by_its_plain_weight(kind):
    layer, x, direction = make_layer(), torch.randn(40, 192).bfloat16(), torch.randn(40, 128).bfloat16()
    quantised = EightBit(kind).quantise(layer)
    assert isinstance(quantised, EightBitLinear)
    layer.weight.copy_(quantised.plain_weight())
    quantised.multiplies_in_8_bits = False

    found, true = (answer_and_gradient(one, x, direction) for one in (quantised, layer))

    for mine, other in zip(found, true):
        assert relative_error(mine, other) < 0.006  # the bias is added to what is rounded already; turning rounds once more


def test_both_products_are_the_exact_product_of_the_rounded_rows():
    """In float32 nothing is rounded but rows, so the integer products are those of the numbers that were rounded to."""
    layer, x, direction = make_layer(torch.float32), torch.randn(32, 192), torch.randn(32, 128)
    quantised = EightBit("int8").quantise(layer)
    assert isinstance(quantised, EightBitLinear)

    answer, gradient = answer_and_gradient(quantised, x, direction)

    def rounded(rows: Tensor) -> Tensor:
        numbers, steps = to_eight_bits(rows, torch.int8)
        return numbers.double() * steps.double()

    weight = quantised.weight.double()
    torch.testing.assert_close(answer.double(), rounded(x) @ (weight * quantised.scale[:, None].double()).T + layer.bias.double())
    torch.testing.assert_close(gradient.double(), rounded(direction * quantised.scale) @ weight, rtol=1e-5, atol=1e-6)


def test_a_few_large_inputs_cost_accuracy_unless_inputs_are_turned():
    layer, x = make_layer(), torch.randn(64, 192, dtype=torch.bfloat16)
    x[:, 17] *= 60
    true = make_layer().double()(x.double())

    plain, rotated = (relative_error(EightBit(kind).quantise(make_layer())(x), true) for kind in ("int8", "int8 rotated"))

    assert relative_error(layer(x), true) < rotated < 0.015 < 3 * rotated < plain


@pytest.mark.parametrize("inputs, group", [(64, 64), (192, 64), (48, 16), (20, 4), (6, 1)])
def test_turning_twice_gives_the_inputs_back(inputs, group):
    turn, x = rotation(inputs), torch.randn(5, inputs)

    assert len(turn) == group
    torch.testing.assert_close(turned(turned(x, turn), turn), x)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_weight_is_kept_for_the_way_back(kind):
    quantised = EightBit(kind).quantise(make_layer())
    saved: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        quantised(torch.randn(40, 192, dtype=torch.bfloat16, requires_grad=True))

    own = {tensor.data_ptr() for tensor in (*quantised.parameters(), *quantised.buffers())}
    assert {tensor.data_ptr() for tensor in saved} <= own


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_on_it_as_on_bf16(kind):
    """The loss of 20 steps of a LoRA on three layers, against the same on the plain ones."""

    def learn(make: Callable[[nn.Linear], nn.Module]) -> Tensor:
        torch.manual_seed(0)
        layers = [make(nn.Linear(64, 64).bfloat16().requires_grad_(False)) for _ in range(3)]
        factors = [(nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.zeros(64, 4))) for _ in layers]
        optimizer = torch.optim.AdamW([factor for pair in factors for factor in pair], lr=1e-2)
        x = torch.randn(256, 64).bfloat16()
        target = x.float() @ torch.randn(64, 4) @ torch.randn(4, 64) / 8
        losses = []
        for _ in range(20):
            hidden = x
            for layer, (down, up) in zip(layers, factors):
                hidden = nn.functional.gelu(layer(hidden) + (hidden @ down.T.bfloat16()) @ up.T.bfloat16())
            loss = (hidden.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    plain, found = learn(lambda layer: layer), learn(EightBit(kind).quantise)

    assert plain[-1] < 0.9 * plain[0]
    assert bool(((found - plain).abs() < 0.02 * plain).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_bits(kind):
    quantised, x, direction = EightBit(kind).quantise(make_layer()), torch.randn(40, 192).bfloat16(), torch.randn(40, 128).bfloat16()

    first, second = (answer_and_gradient(quantised, x, direction) for _ in range(2))

    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_no_number_stays_none_and_leaves_the_others_alone(kind):
    quantised, x = EightBit(kind).quantise(make_layer()), torch.randn(40, 192, dtype=torch.bfloat16)
    clean = quantised(x)
    x[3, 5], x[4, 5] = float("nan"), float("inf")
    x[5] = 0

    answer = quantised(x)

    assert not answer[3:5].isfinite().any()
    assert torch.equal(answer[6:], clean[6:]) and torch.equal(answer[5], quantised.bias)


def test_rounding_never_leaves_the_8_bits():
    """Steps that bf16 rounds down take the largest number of a row a little further than they were meant to."""
    rows = torch.linspace(1, 2, 4001, dtype=torch.float64)[:, None].to(torch.bfloat16)

    for kind, largest in ((torch.int8, 127), (torch.float8_e4m3fn, 448)):
        numbers, _ = to_eight_bits(torch.cat([rows, -rows], 1), kind)
        assert bool((numbers[:, 0].float() > 0).all()) and numbers.float().abs().max() <= largest
        assert torch.equal(numbers[:, 0].float(), -numbers[:, 1].float())
