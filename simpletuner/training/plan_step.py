"""The memory of training steps and pictures, counted while the run's own code computes: with numbers, or with shapes alone.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.memory.offload import base_bytes, places, streamed_blocks
from simpletuner.memory.packing import frozen_weights
from simpletuner.memory.parts import bytes_of, parts_of
from simpletuner.memory.slabs import aligned, plan_slabs
from simpletuner.memory.tracker import WORK, Tracker
from simpletuner.models.family import ModelFamily
from simpletuner.options.memory import Memory
from simpletuner.training.parts import WHOLE
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Noised, Sample, Size

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, EMA = "weights", "adapter", "gradients", "optimizer", "average"
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"


class ShapedStep(Step):
    """A step that draws nothing: noise has the shape of latents, and numbers would not be looked at."""

    def noise(self, batch: Batch, step: int, micro_step: int, rows: slice = WHOLE) -> Noised:
        latents = torch.zeros(batch.latents["mean"].shape)
        return self.process.add_noise(latents, torch.zeros(latents.shape), torch.full((len(latents),), 0.5))


def shaped_batch(family: ModelFamily, text: Mapping[str, tuple[int, ...]], size: Size, count: int, references: int = 0) -> Batch:
    """A batch of pictures of a size, of zeros.

    Args:
        text: shapes of a prompt's embeddings, by name.
        references: pictures of the same size that the denoiser is shown with each.
    """
    stride, channels = family.vae_stride, family.latent_spec(getattr(family, "vae_config", None)).channels
    raw = torch.zeros(count, channels, size.height // stride, size.width // stride)
    embeddings = {
        name: torch.ones(count, *shape, dtype=torch.long) if name.endswith("mask") else torch.zeros(count, *shape) for name, shape in text.items()
    }
    sample = Sample("plan", "a picture", "", Geometry(size, size, Crop(0, 0, size.width, size.height)), ("",))
    latents = {"mean": raw, "std": raw}
    return Batch((sample,) * count, ("",) * count, latents, embeddings, references=(latents,) * references)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one step takes on the device, all weights being there."""

    peak: int
    parts: Mapping[str, int]
    """Of the peak; they add up to it."""
    kept: int
    """Between two steps: weights, adapter, optimizer and average."""
    host: int
    """In main memory: inputs of blocks that wait there."""
    trained: int
    """Numbers that are trained."""

    def with_part(self, name: str, size: int) -> StepBytes:
        """The same with another size of a part that is there throughout."""
        more = size - self.parts.get(name, 0)
        return replace(self, peak=self.peak + more, parts={**self.parts, name: size}, kept=self.kept + more)


def count_step(
    step: Step, batch: Batch, tracker: Tracker, *, autocast: Any, state_bytes: float = 0, average_bytes: float = 0, accumulates: bool = False
) -> StepBytes:
    """Count a forward and a backward pass. The tracker is entered, and was while the networks were made.

    Args:
        autocast: gives the context in which the loss is computed.
        state_bytes: that the optimizer remembers of each trained number.
        average_bytes: that a moving average takes of each on the device.
        accumulates: whether the gradients of an earlier batch are there already.
    """
    gc.collect()
    tracker.rename(WORK, WEIGHTS)
    tracker.name([*step.denoiser.parameters(), *step.denoiser.buffers()], WEIGHTS)
    parameters = [parameter for parameter in step.adapter.parameters().values() if parameter.requires_grad]
    if not step.adapter.trains_base:
        tracker.name(parameters, ADAPTER)
    trained = sum(parameter.numel() for parameter in parameters)
    tracker.add(int(trained * state_bytes), OPTIMIZER)
    tracker.add(int(trained * average_bytes), EMA)
    hooks = [parameter.register_post_accumulate_grad_hook(lambda one: tracker.name([one.grad], GRADIENTS)) for parameter in parameters]
    if accumulates:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            tracker.name([parameter.grad], GRADIENTS)
    kept = tracker.now - tracker.bytes[GRADIENTS]
    tracker.restart()
    with autocast():
        loss = step.losses(batch, 0, 0).mean()
    saved = tracker.bytes[WORK]
    loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    parts = dict(tracker.at_peak)
    work = parts.pop(WORK, 0)
    parts |= {ACTIVATIONS: min(work, saved), TEMPORARIES: max(0, work - saved)}
    return StepBytes(tracker.peak, parts, kept, tracker.host_peak, trained)


def count_picture(step: Step, batch: Batch, tracker: Tracker, *, autocast: Any) -> int:
    """Bytes that a call of the denoiser without gradients takes beyond what is kept."""
    step.denoiser.eval()
    tracker.restart()
    before = tracker.now
    with torch.no_grad(), autocast():
        step.predict(step.noise(batch, 0, 0), replace(batch, references=()))
    return tracker.peak - before


@dataclass(frozen=True, slots=True)
class Streamed:
    """What offload changes: bytes that wait, and bytes of the places for those that come."""

    waiting: int
    places: int
    weights: int
    """Of the whole base."""
    host: int
    """In main memory, where slabs are somewhat larger than what is in them."""
    on_disk: bool = False

    @property
    def resident(self) -> int:
        """Bytes of the base that are on the device at a time."""
        return self.weights - self.waiting + self.places


def streamed(denoiser: nn.Module, options: Memory) -> Streamed:
    """What a denoiser in its final precision, adapter and all, has waiting in main memory.

    Raises:
        ConfigError: as `streamed_blocks`.
    """
    names = streamed_blocks(denoiser, options)
    sizes = [_part_sizes(denoiser, name) for name in names]
    sizes = [of_block for of_block in sizes if of_block]
    weights = base_bytes(denoiser)
    if not sizes:
        return Streamed(0, 0, weights, 0)
    place = max(sum(map(aligned, of_block)) for of_block in sizes)
    slabs, _ = plan_slabs([size for of_block in sizes for size in of_block])
    room = places(options, len(sizes)) * place
    return Streamed(sum(map(sum, sizes)), room, weights, sum(slabs), options.group_offload_to_disk_path is not None)


def _part_sizes(denoiser: nn.Module, block: str) -> list[int]:
    weights = (module._parameters[name] for module, name in frozen_weights(denoiser, denoiser.get_submodule(block)))
    return [part.numel() * part.element_size() for weight in weights if weight is not None for part in parts_of(weight)]


def layer_bytes(network: nn.Module) -> int:
    """Bytes of the largest layer, as it is held."""
    return max((sum(map(bytes_of, module.parameters(recurse=False))) for module in network.modules()), default=0)


def widest(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest layer before it is quantised, in a dtype."""
    shapes = [
        module.in_features * module.out_features if isinstance(module, nn.Linear) else sum(one.numel() for one in module.parameters(recurse=False))
        for module in network.modules()
    ]
    return max(shapes, default=0) * dtype.itemsize


@contextmanager
def counted(tracker: Tracker) -> Iterator[list[int]]:
    """Give, in a list, the most bytes that were taken meanwhile beyond those before."""
    tracker.restart()
    before, found = tracker.now, [0]
    yield found
    found[0] = tracker.peak - before


def zeros_like_pixels(count: int, size: Size, dtype: torch.dtype) -> Tensor:
    """Pixels (B, 3, H, W) of a batch."""
    return torch.zeros(count, 3, size.height, size.width, dtype=dtype)
