"""From options and parameters to an optimizer and a schedule."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.errors import ConfigError, choose
from simpletuner.optim import schedules
from simpletuner.optim.arguments import parse_arguments
from simpletuner.optim.averaging import Averaging
from simpletuner.optim.catalogue import Row, find

if TYPE_CHECKING:
    from simpletuner.options.optim import Optim

OURS = {"self", "params", "lr", "gradient_release", "fused_back_pass"}
"""Arguments that a user may not set: the trainer does, or could not follow."""
SETTINGS = ("initial_lr", "betas", "eps", "momentum", "weight_decay")
"""What a user sets in a group; the rest of it (steps, estimates) is state."""


def build_optimizer(options: Optim, parameters: Mapping[str, nn.Parameter], text: Mapping[str, nn.Parameter] = MappingProxyType({})) -> Optimizer:
    """Make the optimizer over all parameters as one group; `initial_lr` in it is the rate at its peak.

    Args:
        text: those of the parameters that are on text encoders: a group of their own, with a rate of their own.

    Raises:
        ConfigError: unknown name, missing package, unknown or refused argument.
    """
    row = find(options.optimizer)
    module, name = row.where.split(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:  # installed, but broken or too old
        raise ConfigError(f"optimizer {row.name!r} cannot be imported: {error}", hint=f"Update the package {row.package}.") from error
    given = parse_arguments(options.optimizer_config)
    _check_arguments(row, kind, given)
    in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    arguments = {**row.defaults, **(row.bf16_defaults if in_bf16 else {}), **given}
    if row.fuses and not {"fused", "foreach", "differentiable"} & arguments.keys():
        arguments["fused"] = all(_is_fusable(parameter) for parameter in parameters.values())
    if row.has_triton and any(parameter.device.type == "cpu" for parameter in parameters.values()):
        arguments.setdefault("triton", False)
    check_devices(row, {parameter.device for parameter in parameters.values()})
    rate = options.learning_rate if row.rate is None else row.rate
    rates = [rate, rate if row.rate is not None else options.text_encoder_lr or rate]
    main = [parameter for name, parameter in parameters.items() if name not in text]
    groups = [{"params": members, "lr": own, "initial_lr": own} for members, own in zip((main, list(text.values())), rates) if members]
    try:
        optimizer = kind(groups, lr=rate, **arguments)
    except (ValueError, TypeError, NotImplementedError) as error:  # what the class itself says of its arguments
        raise ConfigError(f"optimizer {row.name!r} refuses its arguments: {error}", hint="Look at optimizer_config.") from error
    if isinstance(optimizer, Averaging):
        optimizer.train()
    return optimizer


def build_schedule(options: Optim, total_steps: int) -> Callable[[int], float]:
    """Make the function from an optimizer step (the first is 0) to the factor on the learning rate."""
    row = next(row for row in schedules.SCHEDULES if row.name == options.lr_scheduler)
    shape = schedules.Shape(
        total_steps=total_steps,
        warmup_steps=options.lr_warmup_steps,
        end=options.lr_end / options.learning_rate,
        cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    return lambda step: schedules.factor(row, step, shape)


def set_rate(optimizer: Optimizer, factor: float) -> float:
    """Set every group's rate to `factor` of its peak, and give the rate of the first."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # compiled optimizers read it from a tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return float(optimizer.param_groups[0]["lr"])


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state into a freshly built optimizer, whose own settings win: a rate that was changed stays changed.

    Raises:
        ConfigError: the state belongs to another set of parameters.
    """
    own = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(
            f"the saved state of the optimizer does not fit: {error}", hint="Continue with the adapter that the run began with, or start afresh."
        ) from error
    _take_as_saved(optimizer, state)
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)


def _take_as_saved(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put back what torch cast to the dtype of its parameter: float32 state of bf16 weights would lose its tail."""
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"]):
        for parameter, number in zip(group["params"], saved_group["params"]):
            state = optimizer.state[parameter] if number in saved["state"] else {}
            for key, value in state.items():
                before = saved["state"][number].get(key)
                if type(value) is type(before) is Tensor and value.dtype != before.dtype:
                    state[key] = before.to(value.device, copy=True)


def _is_fusable(parameter: Tensor) -> bool:
    """Whether torch's fused kernels can be had, and trusted: on a CPU those of SGD (2.13) leave most of a 16-bit tensor as it was."""
    return parameter.device.type == "cuda" or (parameter.device.type == "cpu" and parameter.dtype == torch.float32)


def check_devices(row: Row, devices: Set[torch.device]) -> None:
    """Refuse a GPU that lacks what the row's kernels need, which would only show at the first step."""
    if row.capability is None:
        return
    for device in devices:
        found = torch.cuda.get_device_capability(device) if device.type == "cuda" else row.capability
        if found < row.capability:
            have, need = (".".join(map(str, one)) for one in (found, row.capability))
            raise ConfigError(
                f"optimizer {row.name!r} needs a GPU of compute capability {need}, and {device} has {have}", hint="Take ao-adamw8bit in its place."
            )


def _check_arguments(row: Row, kind: Callable[..., Any], given: Mapping[str, Any]) -> None:
    signature = inspect.signature(kind).parameters
    known = {name for name, parameter in signature.items() if parameter.kind is not parameter.VAR_KEYWORD} - OURS
    if "lr" in given:
        raise ConfigError("optimizer_config sets lr", hint="Set learning_rate instead.")
    for name in given:
        if name not in known:
            raise ConfigError(f"optimizer_config: {row.name} has no argument {name!r}", hint=choose(name, known, "arguments"))
