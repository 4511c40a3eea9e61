"""Autocast among tensors without numbers casts what PyTorch's own casts among real ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from simpletuner.memory.casting import casting
from simpletuner.memory.shapes_only import shapes_only


def answers(layer: nn.Linear, x: Tensor) -> list[torch.dtype]:
    hidden = layer(x)
    images = functional.conv2d(x.view(1, 1, 4, 8), torch.zeros(2, 1, 3, 3))
    attended = functional.scaled_dot_product_attention(*(hidden.view(1, 1, 4, 8) for _ in range(3)))
    results = [hidden, images, attended, x @ x.mT, hidden + x, functional.layer_norm(x, (8,)), functional.mse_loss(hidden, x)]
    return [one.dtype for one in results]


def test_on_a_cpu_the_same_operations_are_cast():
    with torch.autocast("cpu", torch.bfloat16):
        real = answers(nn.Linear(8, 8), torch.zeros(4, 8))

    with shapes_only(), casting("cpu"), torch.autocast("cpu", torch.bfloat16):
        assert answers(nn.Linear(8, 8), torch.zeros(4, 8)) == real


def test_a_card_computes_norms_in_float32():
    with shapes_only(), casting("cuda"), torch.autocast("cpu", torch.bfloat16):
        narrow = torch.zeros(4, 8, dtype=torch.bfloat16)

        assert functional.layer_norm(narrow, (8,)).dtype == torch.float32
        assert (narrow @ narrow.mT).dtype == torch.bfloat16


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_trained_weight_is_cast_once_and_gets_a_gradient_of_its_own_dtype(recomputes):
    with shapes_only(), casting("cpu") as _:
        layer, seen = nn.Linear(8, 8), []

        def twice(x: Tensor) -> Tensor:
            seen.append(layer(layer(x)).dtype)
            return layer(layer(x))

        with torch.autocast("cpu", torch.bfloat16):
            x = torch.zeros(4, 8)
            loss = (checkpoint(twice, x, use_reentrant=False) if recomputes else twice(x)).float().sum()
        loss.backward()

    assert seen == [torch.bfloat16] * (2 if recomputes else 1)
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
