"""One row a precision: how the frozen base's weights are held. Importing this imports no torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from simpletuner import plugins
from simpletuner.errors import ConfigError, choose
from simpletuner.memory.quantisers.quantiser import Quantiser


@dataclass(frozen=True, slots=True)
class Row:
    """A precision that a user may name."""

    name: str
    summary: str
    library: str = ""
    """A file in memory/quantisers; none for what stays as it is."""
    weights: str = ""
    """What to make of the weights, in the library's word."""
    package: str = ""
    """What to install for it."""
    bits: float = 16
    """That a weight takes, its share of the scales included, in a layer with many inputs."""
    compiles: bool = False
    """Whether the library compiles C++ when the weights are first used on a CPU."""
    input_multiple: int = 1
    """Layers whose inputs are not a multiple of this stay as they are."""
    output_multiple: int = 1
    """The same of their outputs."""
    devices: tuple[str, ...] = ()
    """Types of devices that multiply them; all if none is named."""
    capability: tuple[int, int] | None = None
    """The least compute capability of a CUDA device that has such units; it is for CUDA alone then."""

    @property
    def needs_cuda(self) -> bool:
        return self.capability is not None


# torch's CPU kernel for int8 weights and bf16 inputs reads beyond the ends of rows that are no multiple of 16 (torch 2.13): garbage, or a crash.
PRECISIONS = [
    Row("no_change", "As loaded, in the dtype of mixed_precision."),
    Row("int8-quanto", "8-bit integers: half of bf16, hardly any loss.", "quanto", "qint8", "optimum-quanto", 8, input_multiple=16),
    Row("int4-quanto", "4-bit integers: a quarter of bf16, a loss that shows.", "quanto", "qint4", "optimum-quanto", 4.25, compiles=True),
    Row("int2-quanto", "2-bit integers: an eighth of bf16, a heavy loss.", "quanto", "qint2", "optimum-quanto", 2.25, compiles=True),
    Row("fp8-quanto", "8-bit floats (e4m3): half of bf16, a small loss.", "quanto", "qfloat8", "optimum-quanto", 8),
    Row("int8-torchao", "8-bit integers of torchao: half of bf16, hardly any loss.", "torchao", "Int8WeightOnlyConfig", "torchao", 8),
    Row(
        "int8-matmul",
        "8-bit integers, multiplied as such forward and backward: on CPUs faster than bf16 from about 1,500 inputs on; not measured on cards.",
        "eight_bit",
        "int8",
        "torch",
        8,
        input_multiple=16,
        output_multiple=16,
        devices=("cpu", "cuda"),
    ),
    Row(
        "int8-rotated",
        "The same with inputs turned first, so that a few large ones cost no accuracy; a little slower.",
        "eight_bit",
        "int8 rotated",
        "torch",
        8,
        input_multiple=16,
        output_multiple=16,
        devices=("cpu", "cuda"),
    ),
    Row(
        "fp8-matmul",
        "8-bit floats (e4m3), multiplied as such forward and backward: for cards that have such units (Ada, Hopper and later); not measured.",
        "eight_bit",
        "float8_e4m3fn",
        "torch",
        8,
        input_multiple=16,
        output_multiple=16,
        capability=(8, 9),
    ),
    Row("fp8wo-torchao", "8-bit floats of torchao (e4m3): half of bf16, a small loss.", "torchao", "Float8WeightOnlyConfig", "torchao", 8),
    Row(
        "fp8-torchao",
        "The same, and the product in 8-bit floats too: for cards that have such units (Ada, Hopper and later).",
        "torchao",
        "Float8DynamicActivationFloat8WeightConfig",
        "torchao",
        8,
        input_multiple=16,
        output_multiple=16,
        capability=(8, 9),
    ),
    Row(
        "int8dq-torchao",
        "8-bit integers, and the product in 8-bit integers too.",
        "torchao",
        "Int8DynamicActivationInt8WeightConfig",
        "torchao",
        8,
        input_multiple=16,
        output_multiple=16,
    ),
    Row(
        "int4-torchao",
        "4-bit integers of torchao with zeros of their own: a quarter of bf16, a loss that shows.",
        "torchao_int4",
        "int4",
        "torchao",
        4.375,
        input_multiple=64,
    ),
    Row("nf4-bnb", "4-bit floats spaced as normal weights are (QLoRA): a quarter of bf16.", "bnb", "nf4", "bitsandbytes", 4.13, input_multiple=64),
    Row("fp4-bnb", "4-bit floats of bitsandbytes: a quarter of bf16, more loss than nf4.", "bnb", "fp4", "bitsandbytes", 4.13, input_multiple=64),
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


def quantiser_of(row: Row, device: str, key: str, capability: tuple[int, int] | None = None) -> Quantiser | None:
    """Build what quantises layers for a row; None for what stays as it is.

    Args:
        device: the type of the device that the weights will be used on.
        key: the option that asked for it, for messages.
        capability: of that device, if it is a CUDA one.

    Raises:
        ConfigError: a package or a compiler is missing, or this device has no such weights.
    """
    if not row.library:
        return None
    if row.capability is not None and (capability is None or capability < row.capability):
        needed = ".".join(map(str, row.capability))
        has = f"is on {device}" if capability is None else f"has one of {'.'.join(map(str, capability))}"
        raise ConfigError(
            f"{key} {row.name} needs a CUDA device of compute capability {needed}; this run {has}",
            hint="Use fp8wo-torchao or int8-quanto, or nf4-bnb for the least memory.",
        )
    if row.devices and device not in row.devices:
        raise ConfigError(
            f"{key} {row.name} multiplies 8-bit integers, which PyTorch does on {' and '.join(row.devices)} alone; this run is on {device}",
            hint="Use int8-quanto or int8-torchao, which take as little memory.",
        )
    if row.compiles and device == "cpu" and not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++")):
        raise ConfigError(f"{key} {row.name} needs a C++ compiler, which is not installed", hint="apt install g++, or use int8-quanto.")
    try:
        return plugins.load("simpletuner.memory.quantisers", row.library, Quantiser)(row.weights)  # type: ignore[type-abstract]
    except ImportError as error:
        raise ConfigError(f"{key} {row.name} needs the package {row.package}: {error}", hint=f"pip install {row.package}") from error
