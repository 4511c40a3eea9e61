"""The product with a changed weight from the factors of its change, against the weight that is built in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simpletuner.adapters.adapter import Targets
from simpletuner.adapters.added_product import QuickLora, add_product, answers_plainly, linear_and_product
from simpletuner.adapters.kinds.standard import Standard
from simpletuner.options.adapters import Adapters

sides = st.integers(1, 5)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def frozen(inputs: int, outputs: int, has_bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=has_bias).double().requires_grad_(False)


def assert_same(found: Tensor, wanted: Tensor, of: list[Tensor], direction: Tensor) -> None:
    """Answers and gradients alike."""
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    slopes = [torch.autograd.grad(answer, of, direction, retain_graph=True) for answer in (found, wanted)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 7), groups=st.none() | st.tuples(sides, sides), i=sides, o=sides, rank=st.integers(0, 3), has_bias=st.booleans())
def test_answer_and_every_gradient_are_those_of_the_changed_weight(tokens, groups, i, o, rank, has_bias):
    torch.manual_seed(0)
    mix, (outs, ins) = (None, (1, 1)) if groups is None else (draw(*groups), groups)
    down, up = (draw(rank, i), draw(o, rank)) if rank else (None, draw(o, i)) if o > i else (draw(o, i), None)
    if mix is None and None in (down, up):
        down, up = draw(2, i), draw(o, 2)
    inner = down if up is None else up if down is None else up @ down
    layer, x = frozen(ins * i, outs * o, has_bias), draw(2, tokens, ins * i)
    of = [value for value in (x, mix, down, up) if value is not None]
    direction = torch.randn(outs * o, tokens, 2, dtype=torch.float64).permute(2, 1, 0)  # as attention gives it

    wanted = nn.functional.linear(x, layer.weight + (inner if mix is None else torch.kron(mix, inner)), layer.bias)

    if mix is None:
        assert_same(linear_and_product(layer, x, down, up), wanted, of, direction)
    assert_same(add_product(layer(x), x, mix, down, up), wanted, of, direction)


def test_inputs_that_nobody_trains_get_no_gradient_and_factors_still_do():
    layer, x, down, up = frozen(6, 4), draw(3, 6).detach(), draw(2, 6), draw(4, 2)

    linear_and_product(layer, x, down, up).sum().backward()

    assert x.grad is None and down.grad is not None and up.grad is not None


def unplain_layers() -> dict[str, tuple[nn.Linear, torch.dtype]]:
    hooked, replaced, trained = frozen(6, 4), frozen(6, 4), frozen(6, 4).requires_grad_()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    quantised = type("Quantised", (nn.Linear,), {})(6, 4).double().requires_grad_(False)
    single = torch.float32
    return {"hook": (hooked, torch.float64), "forward": (replaced, torch.float64), "trained": (trained, torch.float64),
            "class": (quantised, torch.float64), "dtype": (frozen(6, 4), single)}  # fmt: skip


@pytest.mark.parametrize("what", ["hook", "forward", "trained", "class", "dtype"])
def test_a_layer_that_does_more_than_a_product_is_asked_for_its_answer(what):
    layer, dtype = unplain_layers()[what]

    assert answers_plainly(frozen(6, 4), torch.zeros(1, 6, dtype=torch.float64))
    assert not answers_plainly(layer, torch.zeros(1, 6, dtype=dtype))


def lora(strength: float = 1.0, **options: Any) -> tuple[nn.Module, Any, Standard]:
    """A layer with a LoRA of PEFT on it that is not at its start, in float64; and the LoRA."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"to_q": frozen(6, 4)})
    adapter = Standard(Adapters(lora_rank=2, lora_alpha=3.0, **options), Targets(suffixes=("to_q",)))
    adapter.attach(network)
    layer: Any = network["to_q"]
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.normal_(matrix["default"].double().weight)
    adapter.set_strength(strength)
    return network, layer, adapter


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "hooked"])
def test_a_lora_answers_as_peft_does_at_each_strength(strength, is_plain):
    _, layer, _ = lora(strength)
    x, parameters = draw(2, 3, 6), [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if not is_plain:
        layer.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)
    assert isinstance(layer.forward.__self__, QuickLora)

    found, wanted = layer(x), type(layer).forward(layer, x)

    assert_same(found, wanted, [x, *(parameters if strength else [])], torch.randn(2, 3, 4, dtype=torch.float64))


def test_dropout_and_calls_that_say_more_are_left_to_peft():
    _, layer, adapter = lora(lora_dropout=0.5)
    x = draw(2, 3, 6)
    adapter.train(True)
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    wanted = type(layer).forward(layer, x)
    adapter.train(False)

    assert dropped.equal(wanted) and not dropped.equal(layer(x))


def test_a_base_that_is_trained_as_well_gets_its_gradient():
    _, layer, _ = lora()
    layer.base_layer.requires_grad_(True)

    layer(draw(3, 6)).sum().backward()

    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((4,), 3.0, dtype=torch.float64))


def test_the_inputs_and_what_is_left_of_them_at_the_rank_are_all_that_is_kept():
    _, layer, _ = lora()
    layer.bfloat16()
    x = torch.randn(256, 6, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)

    assert [(tensor.shape, tensor.dtype) for tensor in kept if len(tensor) == 256] == [((256, 6), x.dtype), ((256, 2), x.dtype)]
