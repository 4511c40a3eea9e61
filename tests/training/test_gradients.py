from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.training.gradients import clip, is_beyond_repair, pieces


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_clipping_by_norm_scales_all_gradients_together():
    parameters = [with_gradient(3.0), with_gradient(4.0)]

    norm = clip(parameters, limit=1.0, method="norm")

    assert norm.item() == pytest.approx(5.0)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_clipping_by_tensor_scales_each_by_itself():
    parameters = [with_gradient(3.0, 4.0), with_gradient(0.5)]

    norm = clip(parameters, limit=1.0, method="tensor")

    assert norm.item() == pytest.approx(25.25**0.5)
    assert torch.cat([parameter.grad for parameter in parameters]).tolist() == pytest.approx([0.6, 0.8, 0.5], rel=1e-5)


class Counted(TorchDispatchMode):
    """Notes the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hundreds_of_tensors_are_clipped_in_a_few_operations_as_pytorch_clips_each(dtype):
    generator = torch.Generator().manual_seed(0)
    parameters, alone = ([nn.Parameter(torch.zeros(1 + number % 7, 3, dtype=dtype)) for number in range(200)] for _ in range(2))
    for number, (one, other) in enumerate(zip(parameters, alone)):
        one.grad = (torch.randn(one.shape, generator=generator) * (number / 50)).to(dtype)
        other.grad = one.grad.clone()
    expected = torch.nn.utils.get_total_norm([one.grad for one in alone])

    with Counted() as counted:
        norm = clip(parameters, limit=1.0, method="tensor")

    for other in alone:
        torch.nn.utils.clip_grad_norm_([other], 1.0)
    assert torch.equal(norm, expected)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(parameters, alone))
    assert len(counted.names) < 20
    assert not any("_local_scalar_dense" in name or "item" in name for name in counted.names)  # they wait for the device


def test_tensors_of_two_formats_or_none_are_clipped_too():
    halves = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    halves.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    whole = with_gradient(0.0, 12.0)

    assert clip([halves, whole], limit=1.0, method="tensor").item() == pytest.approx(13)
    assert halves.grad.dtype == torch.bfloat16 and halves.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-2)
    assert whole.grad.tolist() == pytest.approx([0, 1])
    assert clip([nn.Parameter(torch.zeros(2))], limit=1.0, method="tensor").item() == 0


def test_pieces_hold_every_tensor_once_and_no_more_numbers_than_asked():
    tensors = [torch.zeros(size) for size in (3, 3, 9, 1, 2, 3, 4)]

    found = list(pieces(tensors, 6))

    assert [[one.numel() for one in piece] for piece in found] == [[3, 3], [9], [1, 2, 3], [4]]
    assert list(pieces([], 6)) == []


def test_clipping_by_value_clamps_each_element():
    parameter = with_gradient(-3.0, 0.005, 0.02)

    clip([parameter], limit=0.01, method="value")

    assert parameter.grad.tolist() == pytest.approx([-0.01, 0.005, 0.01])


def test_a_limit_of_zero_only_measures():
    parameter = with_gradient(30.0)

    assert clip([parameter], limit=0.0, method="norm").item() == 30.0
    assert parameter.grad.item() == 30.0


def test_a_nan_anywhere_shows_in_the_norm():
    assert not torch.isfinite(clip([with_gradient(1.0), with_gradient(float("nan"))], limit=1.0, method="value"))


def test_an_infinity_is_seen_although_clipping_by_value_would_hide_it():
    parameter = with_gradient(1.0, float("inf"))

    assert not torch.isfinite(clip([parameter], limit=1.0, method="value"))
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "is_lost"),
    [
        (0.1, 3.0, None, False),
        (float("nan"), 3.0, None, True),
        (float("nan"), 3.0, 65536.0, True),
        (0.1, float("inf"), None, True),
        (0.1, float("inf"), 65536.0, False),
        (0.1, float("nan"), 0.5, True),
    ],
)
def test_only_an_overflow_that_a_smaller_scale_mends_is_passed_over(loss, norm, scale, is_lost):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)

    assert is_beyond_repair(loss, norm, scaler) == is_lost
