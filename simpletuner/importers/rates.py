"""Optimizers and schedules of other trainers, under our names and with the numbers that they have there by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.importers.importer import Imported

ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
"""What PyTorch and bitsandbytes take for AdamW."""
OF_ADAM = "betas eps weight_decay amsgrad"
OF_LION = "betas weight_decay"
OF_SCHEDULE_FREE = "betas eps weight_decay r weight_lr_power"
ARGUMENTS: Mapping[str, str] = {
    **dict.fromkeys(("torch-adamw", "torch-adam", "bnb-adamw8bit", "bnb-adamw8bit-paged", "bnb-adamw-paged", "bnb-adam8bit"), OF_ADAM),
    **dict.fromkeys(("lion", "bnb-lion8bit", "bnb-lion8bit-paged", "bnb-lion-paged"), OF_LION),
    **dict.fromkeys(("bnb-ademamix", "bnb-ademamix8bit", "bnb-ademamix8bit-paged"), "betas eps weight_decay alpha"),
    "torch-sgd": "momentum dampening weight_decay nesterov",
    "bnb-sgd8bit": "momentum weight_decay nesterov",
    "torch-adagrad": "lr_decay weight_decay eps",
    "torch-rmsprop": "alpha eps weight_decay momentum centered",
    "torch-adafactor": "weight_decay",
    "adamw_schedulefree": OF_SCHEDULE_FREE,
    "radam_schedulefree": "betas eps weight_decay r weight_lr_power",
    "sgd_schedulefree": "momentum weight_decay r weight_lr_power",
    "prodigy": "betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup d0 d_coef growth_rate slice_p",
    "prodigy_schedulefree": "betas beta3 weight_decay use_bias_correction d0 d_coef prodigy_steps eps use_speed factored use_stableadamw",
    "came": "betas weight_decay eps1 eps2",
}
"""Ours, and the arguments that mean the same there; a test compares them with the optimizers."""
IDLE: Mapping[str, Any] = {
    **dict.fromkeys(("relative_step", "scale_parameter", "warmup_init", "foreach", "maximize", "capturable", "differentiable", "is_paged"), False),
    **dict.fromkeys(("fused", "fused_back_pass", "stochastic_rounding", "optim_bits", "min_8bit_size", "percentile_clipping", "block_wise"), None),
    **dict.fromkeys(("fsdp_in_use", "log_every", "use_triton", "split_groups", "split_groups_mean", "factored_fp32"), None),
}
"""Arguments that ask for what is so here (None: whatever they say)."""
FINDS_ITS_RATE = ("prodigy", "prodigy_schedulefree")
SCHEDULE_FREE = ("adamw_schedulefree", "radam_schedulefree", "sgd_schedulefree", "prodigy_schedulefree")
SUBSTITUTE = "torch-adamw"
"""Where there is no such optimizer here."""


def use_optimizer(found: Imported, asked: str, table: Mapping[str, tuple[str, Mapping[str, Any]]], given: Mapping[str, Any], name: str) -> str:
    """Write an optimizer and its arguments, and name those that are not understood.

    Args:
        asked: as it is called there.
        table: their names in small letters to ours, with the arguments that it has there by itself.
        given: arguments by the names that PyTorch's optimizers use.
        name: of the setting, for messages.

    Returns:
        Our name of it.
    """
    ours, defaults = table.get(asked.lower(), ("", {}))
    if not ours:
        found.lose(f"{name} {asked}: there is no such optimizer; it is {SUBSTITUTE} now, which may want another learning_rate")
        ours, defaults = SUBSTITUTE, ADAM
        given = {key: value for key, value in given.items() if key in ADAM}
    arguments = dict(defaults)
    for key, value in given.items():
        if key in ARGUMENTS[ours].split():
            arguments[key] = list(value) if isinstance(value, tuple) else numbered(value)
        elif key not in IDLE or IDLE[key] not in (None, value):
            found.lose(f"{name} {asked}, argument {key} {value}: {ours} has none that is equal")
    found.config |= {"optimizer": ours, **({"optimizer_config": arguments} if arguments else {})}
    return ours


def numbered(value: Any) -> Any:
    """A number that is written as text, as YAML's 1e-4 is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def use_schedule(found: Imported, schedule: str, warmup: float, total: int, name: str) -> None:
    """Write a schedule that there is here, and its warm-up.

    Args:
        warmup: steps, or below 1 a share of all steps.
        total: steps of the run, 0 if they are not known.
        name: of the setting of the warm-up, for messages.
    """
    if 0 < warmup < 1 and not total:
        found.lose(f"{name} {warmup:g}: a share of all steps, whose number is not known here; set lr_warmup_steps; it is 0 now")
        warmup = 0
    steps = round(warmup * total) if 0 < warmup < 1 else int(warmup)
    found.config |= {"lr_scheduler": schedule, "lr_warmup_steps": steps}
