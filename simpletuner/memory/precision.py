"""One row a precision: how the frozen base's weights are held, and how they get there."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.errors import ConfigError, choose

if TYPE_CHECKING:
    from torch import nn

Quantiser = Callable[["nn.Module", list[str], str], None]
"""Quantise, in place, the layers of a module that are named; the text is the row's `weights`."""


def quantise_quanto(module: nn.Module, layers: list[str], weights: str) -> None:
    """Integer and float8 weights of optimum-quanto, with a scale for each row or group."""
    from optimum import quanto

    quanto.quantize(module, weights=weights, include=layers)
    quanto.freeze(module)


def quantise_torchao(module: nn.Module, layers: list[str], weights: str) -> None:
    """Weights of torchao as tensors of their own kind inside plain Linear layers."""
    from torchao import quantization

    chosen = set(layers)
    quantization.quantize_(module, getattr(quantization, weights)(), filter_fn=lambda _, name: name in chosen)


@dataclass(frozen=True, slots=True)
class Row:
    """A precision that a user may name."""

    name: str
    summary: str
    quantiser: Quantiser | None = None
    weights: str = ""
    """What to make of the weights, in the library's word."""
    package: str = ""
    """What to install for it."""
    compiles: bool = False
    """Whether the library compiles C++ when the weights are first used."""
    input_multiple: int = 1
    """Layers whose inputs are not a multiple of this stay as they are."""


# torch's CPU kernel for int8 weights and bf16 inputs reads beyond the ends of rows that are no multiple of 16 (torch 2.13): garbage, or a crash.
PRECISIONS = [
    Row("no_change", "As loaded, in the dtype of mixed_precision."),
    Row("int8-quanto", "8-bit integers: half of bf16, hardly any loss.", quantise_quanto, "qint8", "optimum-quanto", input_multiple=16),
    Row("int4-quanto", "4-bit integers: a quarter of bf16, a loss that shows.", quantise_quanto, "qint4", "optimum-quanto", True),
    Row("int2-quanto", "2-bit integers: an eighth of bf16, a heavy loss.", quantise_quanto, "qint2", "optimum-quanto", True),
    Row("fp8-quanto", "8-bit floats (e4m3): half of bf16, a small loss.", quantise_quanto, "qfloat8", "optimum-quanto"),
    Row("int8-torchao", "8-bit integers of torchao: half of bf16, hardly any loss.", quantise_torchao, "Int8WeightOnlyConfig", "torchao"),
]


def find(name: str, key: str = "base_model_precision") -> Row:
    """Give the row of that name; `key` is the option that asked for it.

    Raises:
        ConfigError: no such precision.
    """
    rows = {row.name: row for row in PRECISIONS}
    if name not in rows:
        raise ConfigError(f"{key} {name!r} is unknown", hint=choose(name, rows, "precisions"))
    return rows[name]


def quantise(module: nn.Module, name: str, keep: Sequence[str] = (), key: str = "base_model_precision") -> int:
    """Quantise a frozen network's Linear layers in place, where it is, and freeze it.

    Args:
        module: the network; on any device.
        name: of a row.
        keep: globs of layer names that stay as they are.
        key: the option that asked for it, for messages.

    Returns:
        The number of layers quantised.

    Raises:
        ConfigError: unknown name, missing package or compiler, or nothing to quantise.
    """
    row = find(name, key)
    if row.quantiser is None:
        module.requires_grad_(False)
        return 0
    if row.compiles and not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++")):
        raise ConfigError(f"{key} {name} needs a C++ compiler, which is not installed", hint="apt install g++, or use int8-quanto.")
    layers = _layers(module, keep, row.input_multiple)
    if not layers:
        raise ConfigError(
            f"{key} {name} finds no layer to quantise in {type(module).__name__}",
            hint=f"Set {key} to no_change.",
        )
    try:
        row.quantiser(module, layers, row.weights)
    except ImportError as error:
        raise ConfigError(f"{key} {name} needs the package {row.package}: {error}", hint=f"pip install {row.package}") from error
    module.requires_grad_(False)  # quanto's freeze fixes the values but leaves the weights trainable
    return len(layers)


def _layers(module: nn.Module, keep: Sequence[str], input_multiple: int) -> list[str]:
    """Names of the Linear layers that are not to be kept."""
    from torch.nn import Linear

    fitting = [name for name, layer in module.named_modules() if isinstance(layer, Linear) and layer.in_features % input_multiple == 0]
    return [name for name in fitting if not any(fnmatch.fnmatch(name, pattern) for pattern in keep)]
