"""Options of the optimizer, its learning rate over time, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any, Literal

from simpletuner.options.option import Section, option

SHORT = {
    "adamw": "torch-adamw",
    "adam": "torch-adam",
    "sgd": "torch-sgd",
    "adafactor": "torch-adafactor",
    "adamw8bit": "bnb-adamw8bit",
    "lion8bit": "bnb-lion8bit",
    "pagedadamw8bit": "bnb-adamw8bit-paged",
    "pagedlion8bit": "bnb-lion8bit-paged",
    "adamwschedulefree": "adamw_schedulefree",
    "adamw_schedulefree+no_kahan": "adamw_schedulefree",
    "radamschedulefree": "radam_schedulefree",
    "sgdschedulefree": "sgd_schedulefree",
    "prodigyplusschedulefree": "prodigy_schedulefree",
}
"""Names that other trainers have for optimizers of ours."""
SDNQ = "sdnq is not supported, its licence (GPL-3.0) does not allow it; the nearest here is {}"
UNKEPT = "its package is no longer maintained; prodigy, by the same authors, took its place"
INSTEAD = {
    **dict.fromkeys(("sdnq-adamw", "sdnq-adamw+no_quant"), SDNQ.format("ao-adamw8bit")),
    "sdnq-adafactor": SDNQ.format("torch-adafactor"),
    "sdnq-came": SDNQ.format("came"),
    "sdnq-lion": SDNQ.format("bnb-lion8bit"),
    **dict.fromkeys(("sdnq-muon", "sdnq-muon+quantized_matmul"), SDNQ.format("muon")),
    **dict.fromkeys(("dadaptation", "dadaptadam", "dadaptadagrad", "dadaptsgd", "dadaptlion"), UNKEPT),
    "adamw_schedulefree+aggressive": "the nearest here is adamw_schedulefree with a higher learning_rate",
    "torch-sparseadam": "it is for sparse gradients, which nothing here has; the nearest is torch-adam",
}
"""Names that other trainers have and that are not here, to what to take in their place."""


class Optim(Section):
    """How what is trained learns."""

    optimizer: str = option("torch-adamw", ask="Which optimizer?", choices_from="optimizer", spellings=SHORT, instead=INSTEAD)
    """Optimizer. The default suits adapters; lion ones want 3 to 10 times less `learning_rate`."""

    optimizer_config: dict[str, Any] | str | None = option(None, advanced=True)
    """Further arguments of the optimizer, as an object or as `weight_decay=0.1,eps=1e-6`."""

    learning_rate: float = option(1e-4, ask="Learning rate?", gt=0)
    """Step size at its peak. Usual for an adapter: 1e-5 to 1e-3; less for a large rank, a large file or all weights."""

    text_encoder_lr: float | None = option(None, gt=0, advanced=True)
    """The same for text encoders with `train_text_encoder`; `learning_rate` if not given. Usual: a fifth of it. The schedule is one for both."""

    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"] = option(
        "constant", ask="How should the rate go over time?", spellings={"cosine_with_warmup": "cosine"}
    )
    """How the rate goes over time. All of them begin with `lr_warmup_steps`."""

    lr_warmup_steps: int = option(0, ge=0)
    """Optimizer steps over which the rate rises to its peak."""

    lr_end: float = option(0.0, ge=0, advanced=True)
    """Rate at the end of a schedule that falls."""

    lr_num_cycles: int = option(1, ge=1, advanced=True)
    """Times that `cosine_with_restarts` and `sine` run through their shape."""

    lr_power: float = option(1.0, gt=0, advanced=True)
    """Power of `polynomial`: above 1 falls early, below 1 late."""

    lr_scale: bool = option(False, advanced=True)
    """Multiply `learning_rate` and `text_encoder_lr` by the pictures of a step: processes, `gradient_accumulation_steps` and
    `train_batch_size` multiplied. `lr_end` stays as it is."""

    lr_scale_sqrt: bool = option(False, advanced=True)
    """The same by the square root of that number, with `lr_scale` or without."""

    max_grad_norm: float = option(1.0, ge=0)
    """Largest gradient that is let through; 0 lets all through."""

    grad_clip_method: Literal["norm", "value", "tensor"] = option("norm", advanced=True)
    """What `max_grad_norm` limits: the length of the whole gradient (norm), each of its numbers (value), or each tensor's length (tensor)."""

    optimizer_release_gradients: bool = option(False, advanced=True)
    """Update each tensor as soon as its gradient is there, and let the gradient go: no more of them are held than of one tensor or two.
    For `model_type` full on one process, without accumulation and with `grad_clip_method` value or tensor."""

    def rate_factor(self, images: int) -> float:
        """What `learning_rate` is multiplied by in steps of so many pictures."""
        if self.lr_scale_sqrt:
            return math.sqrt(images)
        return float(images) if self.lr_scale else 1.0
