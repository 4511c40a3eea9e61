"""The learning rate for the pictures of a step: scaled by their number, or by its square root."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.options.optim import Optim


def scaled(options: Optim, images: int) -> Optim:
    """The options with the rates that are trained at; `lr_end` is a rate as it stands."""
    factor = options.rate_factor(images)
    text = options.text_encoder_lr
    rates = {"learning_rate": options.learning_rate * factor, "text_encoder_lr": None if text is None else text * factor}
    return options.model_copy(update={**rates, "lr_scale": False, "lr_scale_sqrt": False})


def scaling_notes(options: Optim, images: int) -> tuple[str, ...]:
    """Say what comes of the scaling, if there is any."""
    factor = options.rate_factor(images)
    if not (options.lr_scale or options.lr_scale_sqrt):
        return ()
    how = f"{'the square root of ' if options.lr_scale_sqrt else ''}{images} pictures a step"
    key = "lr_scale_sqrt" if options.lr_scale_sqrt else "lr_scale"
    return (f"{key} multiplies learning_rate {options.learning_rate:g} by {how}: {options.learning_rate * factor:g}",)
