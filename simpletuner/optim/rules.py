"""What the options ask of an optimizer where all weights are trained, and whether it can; imports nothing that is heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from simpletuner.errors import ConfigError
from simpletuner.optim.arguments import parse_arguments
from simpletuner.optim.catalogue import OPTIMIZERS, find

if TYPE_CHECKING:
    from simpletuner.options.memory import Memory
    from simpletuner.options.optim import Optim


def trains_in(options: Optim, memory: Memory) -> Literal["bf16", "fp32"]:
    """The format of weights that are all trained, by the options.

    Raises:
        ConfigError: bf16 is asked for, and the optimizer would lose small updates, or optimizer_config makes no sense.
    """
    wanted, keeping = memory.base_model_default_dtype, [row.name for row in OPTIMIZERS if row.bf16_by]
    if wanted == "bf16":
        lost = "rounds what is below 1/256 of a weight away, which is most of a training"
        if options.optimizer not in keeping:
            raise ConfigError(
                f"base_model_default_dtype bf16 with optimizer {options.optimizer}: it {lost}",
                hint=f"Set base_model_default_dtype to fp32, or take an optimizer that does not: {', '.join(keeping)}.",
            )
        if off := switched_off(options):
            raise ConfigError(
                f"base_model_default_dtype bf16 with optimizer_config {off}: without it optimizer {options.optimizer} {lost}",
                hint=f"Leave {off.partition('=')[0]} out, or set base_model_default_dtype to fp32.",
            )
    if wanted != "default":
        return wanted
    return "bf16" if memory.mixed_precision == "bf16" and options.optimizer in keeping and not switched_off(options) else "fp32"


def switched_off(options: Optim) -> str:
    """What optimizer_config says, if it takes from the optimizer that by which it trains bf16 weights; empty otherwise.

    Raises:
        ConfigError: optimizer_config makes no sense.
    """
    row, given = next(row for row in OPTIMIZERS if row.name == options.optimizer), parse_arguments(options.optimizer_config)
    key = row.bf16_switch
    if key is None or key not in given or given[key]:
        return ""
    is_left = given[key] is None and key not in row.bf16_defaults  # to the class, which does it for bf16 weights
    return "" if is_left else f"{key}={given[key]}"


def check_release(options: Optim) -> list[str]:
    """Refuse to have an optimizer step tensor by tensor that cannot.

    Returns:
        What is to be said of it, a sentence each.

    Raises:
        ConfigError: it cannot, or there is no such optimizer here.
    """
    if not options.optimizer_release_gradients:
        return []
    row = find(options.optimizer)
    if row.is_joint:
        raise ConfigError(
            f"optimizer_release_gradients cannot be with optimizer {options.optimizer}: it finds one rate from all gradients together",
            hint="Take adamw_bf16, or leave optimizer_release_gradients out.",
        )
    if row.package != "bitsandbytes":
        return []
    return [f"optimizer_release_gradients with {row.name}: bitsandbytes waits for a GPU after each tensor, in the backward pass, which takes time"]
