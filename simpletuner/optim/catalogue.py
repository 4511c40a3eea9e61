"""One row an optimizer; nothing is imported until one is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

    @property
    def package(self) -> str:
        return self.where.split(":")[0].split(".")[0]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


OPTIMIZERS = [
    Row("torch-adamw", "torch.optim:AdamW", "AdamW in float32, fused. The default for adapters.", fuses=True),
    Row("torch-adam", "torch.optim:Adam", "Adam; weight decay, if any, goes through the gradient.", fuses=True),
    Row("torch-sgd", "torch.optim:SGD", "Plain gradient descent; momentum through optimizer_config.", fuses=True),
    Row("torch-radam", "torch.optim:RAdam", "Adam with a rectified start; needs no warm-up."),
    Row("torch-nadam", "torch.optim:NAdam", "Adam with Nesterov momentum."),
    Row("torch-adamax", "torch.optim:Adamax", "Adam with the largest gradient in place of the squared one."),
    Row("torch-rmsprop", "torch.optim:RMSprop", "Gradient over its running root mean square."),
    Row("torch-adagrad", "torch.optim:Adagrad", "Rates that fall with the sum of squared gradients."),
    Row("torch-adadelta", "torch.optim:Adadelta", "Adagrad over a window; wants a rate near 1."),
    Row("torch-asgd", "torch.optim:ASGD", "Gradient descent with averaging."),
    Row("torch-adafactor", "torch.optim:Adafactor", "Adam with a factored second moment: little state for large matrices."),
    Row("adamw_bf16", "simpletuner.optim.adamw_bf16:AdamWBF16", "AdamW for bf16 weights: bf16 state, stochastic rounding, exact resume."),
    Row("optimi-adamw", "optimi:AdamW", "AdamW with Kahan summation for bf16 weights.", has_triton=True),
    Row("optimi-stableadamw", "optimi:StableAdamW", "AdamW that clips each tensor's update by itself.", has_triton=True),
    Row("optimi-adam", "optimi:Adam", "Adam with Kahan summation for bf16 weights.", has_triton=True),
    Row("optimi-lion", "optimi:Lion", "Sign of momentum; wants 3 to 10 times less rate than AdamW.", has_triton=True),
    Row("optimi-adan", "optimi:Adan", "Nesterov momentum estimated from gradient differences.", has_triton=True),
    Row("optimi-radam", "optimi:RAdam", "Adam with a rectified start; needs no warm-up.", has_triton=True),
    Row("optimi-ranger", "optimi:Ranger", "RAdam with Lookahead.", has_triton=True),
    Row("optimi-sgd", "optimi:SGD", "Gradient descent with Kahan summation for bf16 weights.", has_triton=True),
    Row("bnb-adamw", "bitsandbytes.optim:AdamW32bit", "AdamW of bitsandbytes, 32-bit state."),
    Row("bnb-adamw-paged", "bitsandbytes.optim:PagedAdamW32bit", "AdamW of bitsandbytes; state moves to RAM when memory is short."),
    Row("bnb-adamw8bit", "bitsandbytes.optim:AdamW8bit", "AdamW of bitsandbytes, 8-bit state; for full training rather than adapters."),
    Row("bnb-adamw8bit-paged", "bitsandbytes.optim:PagedAdamW8bit", "The same, with state that moves to RAM when memory is short."),
    Row("bnb-lion", "bitsandbytes.optim:Lion32bit", "Lion of bitsandbytes, 32-bit state."),
    Row("bnb-lion-paged", "bitsandbytes.optim:PagedLion32bit", "Lion of bitsandbytes; state moves to RAM when memory is short."),
    Row("bnb-lion8bit", "bitsandbytes.optim:Lion8bit", "Lion of bitsandbytes, 8-bit state."),
    Row("bnb-lion8bit-paged", "bitsandbytes.optim:PagedLion8bit", "The same, with state that moves to RAM when memory is short."),
    Row("ao-adamw8bit", "torchao.optim:AdamW8bit", "AdamW of torchao, 8-bit state, compiled at the first step."),
    Row("ao-adamw4bit", "torchao.optim:AdamW4bit", "AdamW of torchao, 4-bit state, compiled at the first step."),
    Row("prodigy", "prodigyopt:Prodigy", "AdamW that finds its own learning rate.", extra="optimizers", rate=1.0),
    Row("lion", "lion_pytorch:Lion", "Sign of momentum; wants 3 to 10 times less rate than AdamW.", extra="optimizers"),
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
