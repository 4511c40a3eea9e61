"""Optimizers that average the weights themselves (schedule-free): the weights that they step on are not those they end with.

What a user keeps or looks at is the average; what training goes on from is what it stepped on, bit for bit. The libraries
turn one into the other and back by arithmetic that rounds, so a copy is kept meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.errors import ConfigError


@runtime_checkable
class Averaging(Protocol):
    """What schedule-free optimizers have over others."""

    def train(self) -> None:
        """Make the parameters what is stepped on."""

    def eval(self) -> None:
        """Make the parameters the average."""


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Have the parameters be what the optimizer would end with while the body runs; nothing to do for most of them."""
    if not isinstance(optimizer, Averaging):
        yield
        return
    trained = [parameter.detach().clone() for parameter in parameters_of(optimizer)]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        _put(optimizer, trained)


def trained_values(optimizer: Optimizer) -> list[Tensor] | None:
    """What is stepped on, in the optimizer's order, where that is not what `averaged` shows."""
    return [parameter.detach() for parameter in parameters_of(optimizer)] if isinstance(optimizer, Averaging) else None


def restore_trained(optimizer: Optimizer, values: Sequence[Tensor] | None) -> None:
    """Put back what `trained_values` gave, after the state was restored.

    Raises:
        ConfigError: the values are not there, or of other shapes.
    """
    if not isinstance(optimizer, Averaging):
        return
    if [value.shape for value in values or ()] != [parameter.shape for parameter in parameters_of(optimizer)]:
        raise ConfigError(
            "the saved weights of the optimizer do not fit what is trained",
            hint="Continue with the adapter that the run began with, or start afresh.",
        )
    _put(optimizer, values or ())


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All that it trains, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _put(optimizer: Optimizer, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters_of(optimizer), values):
        parameter.copy_(value)
