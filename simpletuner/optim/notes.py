"""What to say aloud of the optimizer's options before a run: settings that will have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.optim.schedules import SCHEDULES

if TYPE_CHECKING:
    from simpletuner.options.optim import Optim


def notes(options: Optim) -> tuple[str, ...]:
    """Name every option that differs from its default and that the chosen optimizer or schedule does not heed."""
    said = []
    schedule = next(row for row in SCHEDULES if row.name == options.lr_scheduler)
    for key in sorted({key for row in SCHEDULES for key in row.heeds} - schedule.heeds):
        value = {
            "lr_end": options.lr_end,
            "lr_num_cycles": options.lr_num_cycles,
            "lr_power": options.lr_power,
        }[key]
        if value != type(options).model_fields[key].default:
            heeding = ", ".join(row.name for row in SCHEDULES if key in row.heeds)
            said.append(f"{key} {value:g} has no effect with lr_scheduler {schedule.name} (it has with {heeding})")
    optimizer = next((row for row in OPTIMIZERS if row.name == options.optimizer), None)
    if optimizer is not None and optimizer.averages and schedule.falls:
        said.append(f"optimizer {optimizer.name} is made for a constant rate: lr_scheduler {schedule.name} weakens what it averages late")
    own_rate = optimizer.rate if optimizer is not None else None
    if own_rate is not None:
        said.append(f"learning_rate {options.learning_rate:g} has no effect: optimizer {options.optimizer} finds its own")
        if options.text_encoder_lr is not None:
            said.append(f"text_encoder_lr {options.text_encoder_lr:g} has no effect either")
        if options.lr_scale or options.lr_scale_sqrt:
            said.append("lr_scale and lr_scale_sqrt have no effect either")
    return tuple(said)
