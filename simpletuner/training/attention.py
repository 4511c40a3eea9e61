"""What the denoiser's attention is computed with while training, and in pictures; settled, and tried out, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from simpletuner.errors import ConfigError
from simpletuner.memory.attention import Row, check, find, works_here
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.attention import Compute, Switch, dispatched, try_out, with_exact_gradients
from simpletuner.models.family import ModelFamily
from simpletuner.options.memory import Memory


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention is computed with; None is what the model itself does."""

    training: Compute | None = None
    """In steps, evaluation and rollouts included."""
    pictures: Compute | None = None
    switch: Switch = field(default_factory=Switch)

    def attach(self, denoiser: nn.Module) -> None:
        """Have a denoiser compute with it."""
        if self.training or self.pictures:
            self.switch.compute = self.training
            self.switch.attach(denoiser)

    @contextmanager
    def in_pictures(self) -> Iterator[None]:
        """Compute as pictures are to be while the body renders some."""
        with self.switch.set_to(self.pictures):
            yield


def attention_of(options: Memory, family: ModelFamily, device: torch.device, *, trains: bool = True) -> Attention:
    """Settle what attention is computed with, and try it out.

    Args:
        trains: whether there will be steps, too, and not only pictures.

    Raises:
        ConfigError: it is not to be had here; says what is missing, and which ones are.
    """
    row = find(options.attention_mechanism)
    if row.backend is None:
        return Attention()
    check(row, device.type, name_if_masked(family))
    usage = "training+inference" if row.has_gradients else options.sageattention_usage
    in_training = trains and usage.startswith("training")
    compute = _tried(row, options, device, in_training)
    return Attention(compute if in_training else None, compute if usage.endswith("inference") else None)


def _tried(row: Row, options: Memory, device: torch.device, in_training: bool) -> Compute:
    dtype = weight_dtype(options)
    try:
        compute = dispatched(str(row.backend))
        compute = compute if row.has_gradients else with_exact_gradients(compute)
        try_out(compute, device, dtype, trains=in_training)
    except Exception as error:  # a kernel's any complaint: of the device, the dtype, a package that is too old
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        usable = ", ".join(name for name in works_here(device.type) if name != row.name)
        raise ConfigError(
            f"attention_mechanism {row.name} does not work on this {device.type} device in {str(dtype).removeprefix('torch.')}: {what}",
            hint=f"Take another. Here these may work: {usable}.",
        ) from error
    return compute


def name_if_masked(family: ModelFamily) -> str | None:
    """The family's name if it hides padding from its attention."""
    return family.options.model_family if family.masks_attention else None
