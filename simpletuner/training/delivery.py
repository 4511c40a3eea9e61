"""Bring batches to the device while it still computes the step before, so that neither it nor the host waits for a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from simpletuner.types import Batch, Drawn


class Delivery:
    """The way from main memory to one device. On the CPU there is none, and batches are left alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: Batch | None = None
        """What may still be copied where there is no page-locked memory; it must not be gone before."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(self, batch: Batch) -> Batch:
        """Put what the device will want into page-locked memory, from which it copies by itself. Called from the loader's threads."""
        return batch if self._stream is None else _each(batch, lambda tensor: tensor.pin_memory(), with_masks=True)

    def bring(self, batch: Batch) -> Batch:
        """Begin to copy a batch, on a stream of its own, and have the device's work wait where it needs it.

        The host is ahead of a busy device, so that the copies are made while that computes. Masks over text stay where they are, since
        families read the lengths of prompts off them.
        """
        if self._device.type == "cpu":
            return batch
        if self._stream is None:
            self._under_way = batch
            return _each(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
        current = torch.cuda.current_stream(self._device)

        def copy(tensor: Tensor) -> Tensor:
            there = tensor.to(self._device, non_blocking=True)
            there.record_stream(current)  # or its memory could be given to the next batch while a step still reads it
            return there

        with torch.cuda.stream(self._stream):
            there = _each(batch, copy)
        current.wait_stream(self._stream)
        return there


def _each(batch: Batch, change: Callable[[Tensor], Tensor], *, with_masks: bool = False) -> Batch:
    """A batch with everything changed that a step reads on the device; raw latents, of which the scaled ones were made, are not among it."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    drawn = batch.drawn
    if drawn is not None:
        latents, noise, time = (change(tensor) for tensor in (drawn.latents, drawn.noise, drawn.time))
        drawn = Drawn(drawn.place, latents, noise, time, changed(drawn.mixed), changed(drawn.guidance), changed(drawn.way))
    return replace(
        batch,
        text={name: change(value) if with_masks or not name.endswith("mask") else value for name, value in batch.text.items()},
        mask=changed(batch.mask),
        references=tuple({name: change(value) if name == "scaled" else value for name, value in one.items()} for one in batch.references),
        drawn=drawn,
    )
