"""One row an optimizer; nothing is imported until one is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from simpletuner.errors import ConfigError, choose


@dataclass(frozen=True, slots=True)
class Row:
    """An optimizer that a user may name."""

    name: str
    where: str
    """module:Class."""
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments where ours differ from the class's own."""
    extra: str | None = None
    """The extra of this package that installs it; None for what is always installed."""
    rate: float | None = None
    """The base learning rate of one that finds its own; it then replaces `learning_rate`."""
    fuses: bool = False
    """Whether the class has fused kernels, for which it must be asked."""
    has_triton: bool = False
    """Whether the class has Triton kernels. Where Triton is installed it takes them on a CPU too, and fails, unless it is told not to."""
    averages: bool = False
    """Whether it averages the weights itself (schedule-free): what it steps on is not what it ends with, see `averaging`."""
    state_bytes: float = 8
    """What it remembers of each number that is trained, in a large square float32 matrix."""
    bf16_by: Literal["stochastic rounding", "Kahan summation"] | None = None
    """How it trains bf16 weights without losing updates that are small beside them; None if it loses them."""
    bf16_state_bytes: float = 0
    """What it remembers of each number of such weights."""
    bf16_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that it needs for it."""
    bf16_switch: str | None = None
    """The argument that turns it off where it is false; None if nothing does. Left at None, it is as `bf16_defaults` or the class have it."""
    is_joint: bool = False
    """Whether the update of a tensor depends on the gradients of others."""
    needs: str | None = None
    """The package that must be installed, where it is another than that of `where`."""
    capability: tuple[int, int] | None = None
    """The least compute capability of a CUDA device on which it runs; a CPU has it all."""

    @property
    def package(self) -> str:
        return self.needs or self.where.split(":")[0].split(".")[0]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


BY_CHANCE: Literal["stochastic rounding"] = "stochastic rounding"
KAHAN: Literal["Kahan summation"] = "Kahan summation"
OF_OPTIMI, OF_TORCHAO = "kahan_sum", "bf16_stochastic_round"
ROUNDED_BY_CHANCE = {OF_TORCHAO: True}
OPTIMIZERS = [
    Row("torch-adamw", "torch.optim:AdamW", "AdamW in float32, fused. The default for adapters.", fuses=True),
    Row("torch-adam", "torch.optim:Adam", "Adam; weight decay, if any, goes through the gradient.", fuses=True),
    Row("torch-sgd", "torch.optim:SGD", "Plain gradient descent; momentum through optimizer_config.", fuses=True, state_bytes=0),
    Row("torch-radam", "torch.optim:RAdam", "Adam with a rectified start; needs no warm-up."),
    Row("torch-nadam", "torch.optim:NAdam", "Adam with Nesterov momentum."),
    Row("torch-adamax", "torch.optim:Adamax", "Adam with the largest gradient in place of the squared one."),
    Row("torch-rmsprop", "torch.optim:RMSprop", "Gradient over its running root mean square.", state_bytes=4),
    Row("torch-adagrad", "torch.optim:Adagrad", "Rates that fall with the sum of squared gradients.", state_bytes=4),
    Row("torch-adadelta", "torch.optim:Adadelta", "Adagrad over a window; wants a rate near 1."),
    Row("torch-asgd", "torch.optim:ASGD", "Gradient descent with averaging.", state_bytes=4),
    Row(
        "torch-adafactor",
        "torch.optim:Adafactor",
        "Adam with a factored second moment and no first: hardly any state for large matrices.",
        state_bytes=0,
    ),
    Row(
        "adamw_bf16",
        "simpletuner.optim.adamw_bf16:AdamWBF16",
        "AdamW whose bf16 weights and state are rounded by chance; float32 ones are trained as by torch-adamw.",
        bf16_by=BY_CHANCE,
        bf16_state_bytes=4,
    ),
    Row(
        "optimi-adamw",
        "optimi:AdamW",
        "AdamW with Kahan summation for bf16 weights.",
        has_triton=True,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=6,
    ),
    Row(
        "optimi-stableadamw",
        "optimi:StableAdamW",
        "AdamW that clips each tensor's update by itself.",
        has_triton=True,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=6,
    ),
    Row(
        "optimi-adam",
        "optimi:Adam",
        "Adam with Kahan summation for bf16 weights.",
        has_triton=True,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=6,
    ),
    Row(
        "optimi-lion",
        "optimi:Lion",
        "Sign of momentum; wants 3 to 10 times less rate than AdamW.",
        has_triton=True,
        state_bytes=4,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=4,
    ),
    Row("optimi-adan", "optimi:Adan", "Nesterov momentum estimated from gradient differences.", has_triton=True, state_bytes=16),
    Row(
        "optimi-radam",
        "optimi:RAdam",
        "Adam with a rectified start; needs no warm-up.",
        has_triton=True,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=6,
    ),
    Row("optimi-ranger", "optimi:Ranger", "RAdam with Lookahead.", has_triton=True, state_bytes=12),
    Row(
        "optimi-sgd",
        "optimi:SGD",
        "Gradient descent with Kahan summation for bf16 weights.",
        has_triton=True,
        state_bytes=0,
        bf16_by=KAHAN,
        bf16_switch=OF_OPTIMI,
        bf16_state_bytes=2,
    ),
    Row("bnb-adamw", "bitsandbytes.optim:AdamW32bit", "AdamW of bitsandbytes, 32-bit state."),
    Row("bnb-adamw-paged", "bitsandbytes.optim:PagedAdamW32bit", "bnb-adamw, whose state moves to RAM when a GPU is short of memory."),
    Row(
        "bnb-adamw8bit", "bitsandbytes.optim:AdamW8bit", "AdamW of bitsandbytes, 8-bit state; for full training rather than adapters.", state_bytes=2
    ),
    Row(
        "bnb-adamw8bit-paged",
        "bitsandbytes.optim:PagedAdamW8bit",
        "bnb-adamw8bit, whose state moves to RAM when a GPU is short of memory.",
        state_bytes=2,
    ),
    Row("bnb-adam", "bitsandbytes.optim:Adam32bit", "Adam of bitsandbytes, 32-bit state."),
    Row("bnb-adam-paged", "bitsandbytes.optim:PagedAdam32bit", "bnb-adam, whose state moves to RAM when a GPU is short of memory."),
    Row("bnb-adam8bit", "bitsandbytes.optim:Adam8bit", "Adam of bitsandbytes, 8-bit state.", state_bytes=2),
    Row(
        "bnb-adam8bit-paged",
        "bitsandbytes.optim:PagedAdam8bit",
        "bnb-adam8bit, whose state moves to RAM when a GPU is short of memory.",
        state_bytes=2,
    ),
    Row("bnb-lion", "bitsandbytes.optim:Lion32bit", "Lion of bitsandbytes, 32-bit state.", state_bytes=4),
    Row("bnb-lion-paged", "bitsandbytes.optim:PagedLion32bit", "bnb-lion, whose state moves to RAM when a GPU is short of memory.", state_bytes=4),
    Row("bnb-lion8bit", "bitsandbytes.optim:Lion8bit", "Lion of bitsandbytes, 8-bit state.", state_bytes=1),
    Row(
        "bnb-lion8bit-paged",
        "bitsandbytes.optim:PagedLion8bit",
        "bnb-lion8bit, whose state moves to RAM when a GPU is short of memory.",
        state_bytes=1,
    ),
    Row(
        "bnb-ademamix",
        "bitsandbytes.optim:AdEMAMix",
        "AdEMAMix, AdamW with a second, slower momentum, of bitsandbytes, 32-bit state.",
        state_bytes=12,
    ),
    Row(
        "bnb-ademamix-paged",
        "bitsandbytes.optim:PagedAdEMAMix",
        "bnb-ademamix, whose state moves to RAM when a GPU is short of memory.",
        state_bytes=12,
    ),
    Row(
        "bnb-ademamix8bit",
        "bitsandbytes.optim:AdEMAMix8bit",
        "AdEMAMix, AdamW with a second, slower momentum, of bitsandbytes, 8-bit state.",
        state_bytes=3,
    ),
    Row(
        "bnb-ademamix8bit-paged",
        "bitsandbytes.optim:PagedAdEMAMix8bit",
        "bnb-ademamix8bit, whose state moves to RAM when a GPU is short of memory.",
        state_bytes=3,
    ),
    Row("bnb-adagrad", "bitsandbytes.optim:Adagrad32bit", "Adagrad of bitsandbytes, 32-bit state.", state_bytes=4),
    Row("bnb-adagrad8bit", "bitsandbytes.optim:Adagrad8bit", "Adagrad of bitsandbytes, 8-bit state.", state_bytes=1),
    Row("bnb-rmsprop", "bitsandbytes.optim:RMSprop32bit", "RMSprop of bitsandbytes, 32-bit state.", state_bytes=4),
    Row("bnb-rmsprop8bit", "bitsandbytes.optim:RMSprop8bit", "RMSprop of bitsandbytes, 8-bit state.", state_bytes=1),
    Row(
        "bnb-sgd",
        "bitsandbytes.optim:SGD32bit",
        "Gradient descent with momentum of bitsandbytes, 32-bit state.",
        defaults={"momentum": 0.9},
        state_bytes=4,
    ),
    Row(
        "bnb-sgd8bit",
        "bitsandbytes.optim:SGD8bit",
        "Gradient descent with momentum of bitsandbytes, 8-bit state.",
        defaults={"momentum": 0.9},
        state_bytes=1,
    ),
    Row(
        "ao-adamw8bit",
        "torchao.optim:AdamW8bit",
        "AdamW of torchao, 8-bit state, compiled at the first step.",
        state_bytes=2,
        bf16_by=BY_CHANCE,
        bf16_state_bytes=2,
        bf16_defaults=ROUNDED_BY_CHANCE,
        bf16_switch=OF_TORCHAO,
    ),
    Row(
        "ao-adamw4bit",
        "torchao.optim:AdamW4bit",
        "AdamW of torchao, 4-bit state, compiled at the first step.",
        state_bytes=1,
        bf16_by=BY_CHANCE,
        bf16_state_bytes=1,
        bf16_defaults=ROUNDED_BY_CHANCE,
        bf16_switch=OF_TORCHAO,
    ),
    Row(
        "ao-adamwfp8",
        "torchao.optim:AdamWFp8",
        "AdamW of torchao, fp8 state, compiled at the first step; an RTX 40 or H100 and later.",
        state_bytes=2,
        bf16_by=BY_CHANCE,
        bf16_state_bytes=2,
        bf16_defaults=ROUNDED_BY_CHANCE,
        bf16_switch=OF_TORCHAO,
        capability=(8, 9),
    ),
    Row(
        "ao-adamfp8",
        "torchao.optim:AdamFp8",
        "Adam of torchao, fp8 state, compiled at the first step; an RTX 40 or H100 and later.",
        state_bytes=2,
        bf16_by=BY_CHANCE,
        bf16_state_bytes=2,
        bf16_defaults=ROUNDED_BY_CHANCE,
        bf16_switch=OF_TORCHAO,
        capability=(8, 9),
    ),
    Row("lion", "lion_pytorch:Lion", "Sign of momentum; wants 3 to 10 times less rate than AdamW.", extra="optimizers", state_bytes=4),
    Row(
        "adamw_schedulefree",
        "schedulefree:AdamWScheduleFree",
        "AdamW whose weights average themselves: no schedule to choose, warm-up aside.",
        extra="optimizers",
        averages=True,
    ),
    Row(
        "radam_schedulefree",
        "schedulefree:RAdamScheduleFree",
        "RAdam whose weights average themselves; needs no warm-up.",
        extra="optimizers",
        averages=True,
    ),
    Row(
        "sgd_schedulefree",
        "schedulefree:SGDScheduleFree",
        "Gradient descent whose weights average themselves; wants a far higher rate.",
        extra="optimizers",
        averages=True,
        state_bytes=4,
    ),
    Row("prodigy", "prodigyopt:Prodigy", "AdamW that finds its own learning rate.", extra="optimizers", rate=1.0, state_bytes=16, is_joint=True),
    Row(
        "prodigy_schedulefree",
        "prodigyplus:ProdigyPlusScheduleFree",
        "Prodigy whose weights average themselves, with factored state.",
        defaults={"split_groups": False},
        extra="optimizers",
        rate=1.0,
        averages=True,
        state_bytes=4.4,
        is_joint=True,
    ),
    Row(
        "came",
        "pytorch_optimizer:CAME",
        "Adafactor that trusts steady gradients more; wants 3 to 10 times less rate than AdamW.",
        extra="optimizers",
        state_bytes=4,
    ),
    Row(
        "soap",
        "pytorch_optimizer:SOAP",
        "Adam in the eigenbasis of Shampoo: fewer, slower steps. Sides above 512 are left as they are.",
        defaults={"max_precondition_dim": 512},
        extra="optimizers",
        state_bytes=24,
    ),
    Row(
        "muon",
        "simpletuner.optim.muon:muon",
        "Orthogonal momentum for matrices and kernels, AdamW for the rest, at AdamW's rates.",
        extra="optimizers",
        needs="pytorch_optimizer",
        state_bytes=4,
    ),
]


def find(name: str) -> Row:
    """Give the row of that name, if its package is installed; imports nothing.

    Raises:
        ConfigError: no such optimizer, or the package is missing.
    """
    rows = {row.name: row for row in OPTIMIZERS}
    if name not in rows:
        raise ConfigError(f"optimizer {name!r} is unknown", hint=choose(name, rows, "optimizers"))
    row = rows[name]
    if not row.is_installed:
        hint = f"pip install 'simpletuner[{row.extra}]'" if row.extra else "pip install --upgrade simpletuner, which brings it wherever it runs"
        raise ConfigError(f"optimizer {name!r} needs the package {row.package}, which is not installed", hint=hint)
    return row
