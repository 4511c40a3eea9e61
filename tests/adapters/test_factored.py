"""What adapters add, from their factors, against the product of a weight that is built in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from simpletuner.adapters import added_product
from simpletuner.adapters.factored import Factored, quicken

WHOLE = {"lora_dim": 10000, "factor": 4}
LINEAR = {
    "lokr, more outputs": (LokrModule, lambda: nn.Linear(24, 48), WHOLE),
    "lokr, more inputs": (LokrModule, lambda: nn.Linear(48, 24), WHOLE),
    "lokr, of a rank": (LokrModule, lambda: nn.Linear(48, 64), {"lora_dim": 2, "alpha": 3, "factor": 4}),
    "lokr, of a rank that is no saving": (LokrModule, lambda: nn.Linear(48, 64), {"lora_dim": 7, "alpha": 3, "factor": 4}),
    "lokr, both of a rank": (LokrModule, lambda: nn.Linear(48, 64), {"lora_dim": 1, "alpha": 0.5, "factor": 4, "decompose_both": True}),
    "lokr, groups of unlike numbers": (LokrModule, lambda: nn.Linear(18, 40), {"lora_dim": 10000, "factor": 5}),
    "lora": (LoConModule, lambda: nn.Linear(24, 48), {"lora_dim": 4, "alpha": 2}),
    "loha": (LohaModule, lambda: nn.Linear(24, 48), {"lora_dim": 2, "alpha": 3}),
}
CONVOLUTIONS = {
    "lokr": (LokrModule, lambda: nn.Conv2d(16, 24, 1), WHOLE),
    "lokr, a window": (LokrModule, lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1), WHOLE),
    "lokr, a window and a rank": (LokrModule, lambda: nn.Conv2d(16, 32, 3, padding=1), {"lora_dim": 2, "alpha": 3, "factor": 2}),
    "loha": (LohaModule, lambda: nn.Conv2d(24, 16, 1), {"lora_dim": 2, "alpha": 1}),
    "loha, a window": (LohaModule, lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), {"lora_dim": 2, "alpha": 3}),
    "lora, a window": (LoConModule, lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), {"lora_dim": 4, "alpha": 2}),
}
CASES = LINEAR | {f"convolution, {name}": case for name, case in CONVOLUTIONS.items()}


def make(case: str, dtype: torch.dtype, is_quick: bool = True) -> tuple[nn.Module, Any]:
    """A frozen layer with an adapter on it that is not at its start."""
    torch.manual_seed(0)
    kind, build, settings = CASES[case]
    layer = build().to(dtype).requires_grad_(False)
    module = kind("layer", layer, 1.0, bypass_mode=True, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    if dtype == torch.float64:
        module.double()
    if is_quick:
        quicken([module])
        assert isinstance(module.bypass_forward, Factored)
    module.apply_to()
    return layer, module


def inputs(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    shape = (2, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 5, layer.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).requires_grad_()


def change_of(module: Any) -> Tensor:
    """The change of the weight that the factors stand for, in plain words of the library's file."""
    parts = dict(module.named_parameters())
    if isinstance(module, LoConModule):
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        return (up.flatten(1) @ down.flatten(1)).view(module.shape) * module.scale
    if isinstance(module, LohaModule):
        both = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return both.view(module.shape) * module.scale
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    right = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    right = right.view(right.shape[0], -1, *module.shape[2:])
    return torch.kron(left.view(*left.shape, *[1] * (right.dim() - 2)), right) * module.scale


@pytest.mark.parametrize("case", CASES)
def test_answer_and_every_gradient_are_those_of_the_changed_weight_in_float64(case):
    layer, module = make(case, torch.float64)
    module.multiplier = 0.7
    x, parameters = inputs(layer, torch.float64), list(module.parameters())

    answer = layer(x)
    slopes = torch.autograd.grad(answer.square().sum(), [x, *parameters])

    weight = layer.weight + 0.7 * change_of(module)
    wanted = module.op(x, weight, layer.bias, **module.kw_dict)
    torch.testing.assert_close(answer, wanted, rtol=1e-10, atol=1e-10)
    for found, other in zip(slopes, torch.autograd.grad(wanted.square().sum(), [x, *parameters])):
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_in_bf16_it_is_as_near_to_the_truth_as_the_library(case):
    errors = {}
    for is_quick in (True, False):
        layer, module = make(case, torch.bfloat16, is_quick)
        module.org_forward = lambda x, forward=module.org_forward: torch.zeros_like(forward(x))  # the change alone
        x, parameters = inputs(layer, torch.bfloat16), list(module.parameters())
        answer = layer(x)
        slopes = torch.autograd.grad(answer.float().square().sum(), [x, *parameters])
        exact, truth = x.detach().double().requires_grad_(), make(case, torch.float64)[1]
        wanted = truth.op(exact, change_of(truth), None, **truth.kw_dict)
        true_slopes = torch.autograd.grad(wanted.square().sum(), [exact, *truth.parameters()])
        errors[is_quick] = [((a - b).norm() / b.norm()).item() for a, b in zip((answer, *slopes), (wanted, *true_slopes))]
        assert all(slope.dtype == torch.float32 for slope in slopes[1:])

    for ours, theirs in zip(errors[True], errors[False], strict=True):
        assert ours < max(1.25 * theirs, 0.006)  # bf16 rounds by 0.004 at most


@pytest.mark.parametrize("case", LINEAR)
def test_less_is_kept_for_the_way_back_than_the_library_keeps(case):
    kept = {}
    for is_quick in (True, False):
        layer, module = make(case, torch.bfloat16, is_quick)
        x = torch.randn(256, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        there = {value.untyped_storage().data_ptr() for value in (x, layer.weight, layer.bias, *module.parameters())}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = layer(x)
        answer.sum().backward()
        kept[is_quick] = sum(size for place, size in storages.items() if place not in there)

    assert kept[True] <= kept[False] + sum(parameter.nbytes for parameter in module.parameters())  # which a scale may be multiplied into


@pytest.mark.parametrize("case", LINEAR)
def test_more_tokens_than_one_call_takes_give_the_same_answer_and_gradients(case, monkeypatch):
    layer, module = make(case, torch.float64)
    x = inputs(layer, torch.float64)  # of 10 tokens
    wanted = [layer(x), *torch.autograd.grad(layer(x).square().sum(), [x, *module.parameters()])]
    monkeypatch.setattr(added_product, "MOST_PRODUCTS", 4)
    counts: list[int] = []
    for name in ("bmm", "baddbmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, product=product: counts.append(len(args[-1])) or product(*args))

    found = [layer(x), *torch.autograd.grad(layer(x).square().sum(), [x, *module.parameters()])]

    assert set(counts) == ({4, 2} if case.startswith("lokr") else set())
    assert all(map(torch.allclose, found, wanted))


def test_a_gradient_that_is_a_slice_or_transposed_is_read_right():
    layer, module = make("lokr, more inputs", torch.float64)
    x = inputs(layer, torch.float64)
    parameters = list(module.parameters())
    direction = torch.randn(5, 24, 2, dtype=torch.float64)

    found = torch.autograd.grad(layer(x), [x, *parameters], direction.permute(2, 0, 1))

    wanted = torch.autograd.grad(layer(x), [x, *parameters], direction.permute(2, 0, 1).contiguous())
    assert all(map(torch.allclose, found, wanted))


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"use_tucker": True, "lora_dim": 2}], ids=["dropout", "ranks", "tucker"]
)
def test_what_is_not_computed_here_is_left_to_the_library(settings):
    module = LoConModule("layer", nn.Conv2d(16, 16, 3), 1.0, bypass_mode=True, **{"lora_dim": 4, **settings})

    quicken([module])

    assert not isinstance(module.bypass_forward, Factored)


def test_a_loha_whose_ranks_multiply_to_more_than_half_of_the_layer_is_left_to_the_library():
    found = {}
    for rank in (2, 3):
        module = LohaModule("layer", nn.Linear(24, 24), 1.0, bypass_mode=True, lora_dim=rank)
        quicken([module])
        found[rank] = isinstance(module.bypass_forward, Factored)

    assert found == {2: True, 3: False}  # 4 (24 + 24) <= 24 24 / 2 < 9 (24 + 24)
