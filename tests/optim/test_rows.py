"""Every optimizer goes downhill and resumes exactly, on float32 and bf16, on the shapes that adapters have."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from simpletuner.optim.averaging import Averaging, averaged, parameters_of, restore_trained, trained_values
from simpletuner.optim.build import build_optimizer, restore, set_rate
from simpletuner.optim.catalogue import OPTIMIZERS, Row
from simpletuner.options.optim import Optim

SHAPES = {"vector": (96,), "down": (4, 64), "factor": (64, 128), "conv": (8, 4, 3, 3)}
RATES = {
    "torch-adadelta": 5.0,
    **dict.fromkeys(("torch-sgd", "torch-asgd", "optimi-sgd", "sgd_schedulefree"), 1.0),
    **dict.fromkeys(("torch-radam", "radam_schedulefree", "bnb-sgd", "bnb-sgd8bit"), 0.1),
}
CONFIGS = {"prodigy": {"d0": 1e-3}, "prodigy_schedulefree": {"d0": 1e-2}}
"""They begin at a rate of 1e-6, which takes them more steps than a test has."""
SETS = [row for row in OPTIMIZERS if row.name.startswith("ao-adamw")]


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """torchao compiles its step, which takes longer than all of these tests and changes no result here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=OPTIMIZERS, ids=[row.name for row in OPTIMIZERS])
def row(request) -> Row:
    if not request.param.is_installed:
        pytest.skip(f"{request.param.package} is not installed")
    return request.param


def make_parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for name, shape in SHAPES.items()}


def build(name: str, parameters: dict[str, nn.Parameter], **config: object) -> torch.optim.Optimizer:
    options = Optim(optimizer=name, learning_rate=RATES.get(name, 0.02), optimizer_config={**CONFIGS.get(name, {}), **config})
    return build_optimizer(options, parameters, {"vector": parameters["vector"]})


def descend(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> list[float]:
    """Steps on a quadratic bowl, with noise in the gradient and in what the optimizer may draw that depends on the step alone."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        noise = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            slope = parameter.detach().float() + 1e-2 * torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.grad = (0.1 * slope).to(parameter.dtype)
        losses.append(height(parameters))
        set_rate(optimizer, 1 / (1 + step / 20))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def height(parameters: dict[str, nn.Parameter]) -> float:
    return sum(parameter.detach().float().square().mean().item() for parameter in parameters.values())


def saved(optimizer: torch.optim.Optimizer) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "trained": trained_values(optimizer)}, file)
    file.seek(0)
    return file


def check_exact(name: str, dtype: torch.dtype, device: str = "cpu", **config: object) -> None:
    """Go downhill straight, and again from a file after some steps and a look at the average: the same bytes."""
    straight = make_parameters(dtype, device)
    optimizer = build(name, straight, **config)
    losses = descend(optimizer, straight, range(13))  # soap renews its basis after 10 and 20
    file = saved(optimizer)
    with averaged(optimizer):
        resumed = {key: nn.Parameter(value.detach().clone()) for key, value in straight.items()}

    losses += descend(optimizer, straight, range(13, 24))
    again = build(name, resumed, **config)
    content = torch.load(file, weights_only=True)
    if trained_values(again) is None:
        assert content["trained"] is None
    restore(again, content["optimizer"])
    restore_trained(again, content["trained"])
    descend(again, resumed, range(13, 24))

    assert losses[-1] < 0.98 * losses[0]
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.filterwarnings("ignore:.*aged")  # bitsandbytes says on the CPU that it pages nothing there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_optimizer_goes_downhill_and_continues_from_a_file_bit_for_bit(row, dtype):
    check_exact(row.name, dtype)


@pytest.mark.parametrize("name", [row.name for row in SETS])
def test_torchao_continues_with_stochastic_rounding_too(name):
    check_exact(name, torch.bfloat16, bf16_stochastic_round=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_optimizer_does_so_on_a_gpu(row):
    check_exact(row.name, torch.float32, "cuda")


@pytest.mark.filterwarnings("ignore:.*aged")
def test_the_table_says_what_is_remembered_and_who_averages(row):
    parameter = nn.Parameter(torch.ones(256, 256))
    optimizer = trained_twice(row.name, parameter)

    assert bytes_of(optimizer.state[parameter]) / parameter.numel() == pytest.approx(row.state_bytes, rel=0.08, abs=0.04)
    assert isinstance(optimizer, Averaging) == row.averages
    assert parameters_of(optimizer) == [parameter]


@pytest.mark.parametrize("row", [row for row in OPTIMIZERS if row.bf16_by], ids=lambda row: row.name)
def test_the_table_says_what_is_remembered_of_bf16_weights(row):
    if not row.is_installed:
        pytest.skip(f"{row.package} is not installed")
    parameter = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))

    optimizer = trained_twice(row.name, parameter)

    assert bytes_of(optimizer.state[parameter]) / parameter.numel() == pytest.approx(row.bf16_state_bytes, rel=0.08, abs=0.04)


def trained_twice(name: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """Build it and take two steps on one tensor."""
    optimizer = build_optimizer(Optim(optimizer=name), {"matrix": parameter})
    for step in range(2):
        torch.manual_seed(step)
        parameter.grad = torch.randn(256, 256).to(parameter.dtype)
        optimizer.step()
    return optimizer


def bytes_of(state: object) -> int:
    """Bytes of all tensors with more than one number, those of quantised tensors by their parts."""
    if isinstance(state, dict):
        return sum(bytes_of(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(bytes_of(value) for value in state)
    if not isinstance(state, Tensor) or state.ndim == 0:
        return 0
    if hasattr(state, "__tensor_flatten__"):
        return sum(bytes_of(getattr(state, name)) for name in state.__tensor_flatten__()[0])
    return state.numel() * state.element_size()
