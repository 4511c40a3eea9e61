"""The memory of training steps and pictures, counted while the run's own code computes: with numbers, or with shapes alone.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.memory.offload import base_bytes, places, streamed_blocks
from simpletuner.memory.packing import frozen_weights
from simpletuner.memory.parts import bytes_of, parts_of
from simpletuner.memory.slabs import aligned, plan_slabs
from simpletuner.memory.tracker import HOST, WORK, Tracker
from simpletuner.models.family import ModelFamily
from simpletuner.optim.adamw_bf16 import MOST_ELSEWHERE, MOST_ON_CPU
from simpletuner.options.memory import Memory
from simpletuner.training.parts import WHOLE
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Noised, Sample, Size

UPDATE_BYTES = {
    **dict.fromkeys(("torch-radam", "torch-nadam", "torch-adamax", "torch-rmsprop", "torch-asgd", "torch-adafactor"), 4),
    **dict.fromkeys(("torch-adagrad", "torch-adadelta"), 8),
}
"""Of each trained number, in float32, that PyTorch's optimizers without fused kernels take on a card while they step: all tensors go at once."""
EVERYWHERE_BYTES = {"adamw_schedulefree": 4, "came": 8, "muon": 12}
"""The same of those that do so on a CPU, too."""
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


@dataclass(frozen=True, slots=True)
class Training:
    """What there is of each number that is trained, besides itself and its gradient, in bytes."""

    state_bytes: float = 0
    """That the optimizer remembers."""
    average_bytes: float = 0
    """Of a moving average on the device."""
    update_bytes: float = 0
    """That the optimizer takes while it steps, of each number that is updated at the same time."""
    update_numbers: float = math.inf
    """How many these are at most, or those of a single tensor."""
    accumulates: bool = False
    """Whether the gradients of an earlier batch are there already."""
    releases: bool = False
    """Whether each gradient goes as soon as it is whole."""

    def update(self, sizes: Sequence[int]) -> int:
        """Bytes for an update of tensors with so many numbers."""
        return int(self.update_bytes * min(sum(sizes), max(self.update_numbers, *sizes))) if sizes else 0


def update_of(optimizer: str, device: str, *, in_bf16: bool) -> tuple[float, float]:
    """`update_bytes` and `update_numbers` of an optimizer, by its name, on a type of device."""
    if optimizer == "adamw_bf16":
        return (24 if in_bf16 else 16), (MOST_ON_CPU if device == "cpu" else MOST_ELSEWHERE)
    found = EVERYWHERE_BYTES.get(optimizer) or (UPDATE_BYTES.get(optimizer, 0) if device == "cuda" else 0)
    return found * (0.5 if in_bf16 else 1), math.inf


def count_step(step: Step, batch: Callable[[], Batch], tracker: Tracker, training: Training, *, autocast: Any) -> StepBytes:
    """Count a forward and a backward pass, and the update. The tracker is entered, and was while the networks were made.

    Args:
        batch: makes one.
        autocast: gives the context in which the loss is computed.
    """
    gc.collect()
    gc.freeze()  # adapters may have undone it
    tracker.rename(WORK, WEIGHTS)
    tracker.name([*step.denoiser.parameters(), *step.denoiser.buffers()], WEIGHTS)
    parameters = [parameter for parameter in step.adapter.parameters().values() if parameter.requires_grad]
    if not step.adapter.trains_base:
        tracker.name(parameters, ADAPTER)
    trained = sum(parameter.numel() for parameter in parameters)
    tracker.add(int(trained * training.state_bytes), OPTIMIZER)
    tracker.add(int(trained * training.average_bytes), EMA)

    def has_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.name([parameter.grad], GRADIENTS)
        if training.releases:
            tracker.add(training.update([parameter.numel()]), WORK)
            tracker.add(-training.update([parameter.numel()]), WORK)
            parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(has_gradient) for parameter in parameters]
    if training.accumulates:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            tracker.name([parameter.grad], GRADIENTS)
    kept = tracker.now - tracker.bytes[GRADIENTS]
    tracker.restart()
    with autocast():
        loss = step.losses(batch(), 0, 0).mean()
    saved = tracker.bytes[WORK]
    loss.backward()
    for hook in hooks:
        hook.remove()
    parts, gradients = dict(tracker.at_peak), sum(bytes_of(parameter.grad) for parameter in parameters if parameter.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    work, update = parts.pop(WORK, 0), 0 if training.releases else training.update([parameter.numel() for parameter in parameters])
    if kept + gradients + update > tracker.peak:
        there = {name: size for name, size in tracker.bytes.items() if name not in (WORK, GRADIENTS, HOST)}
        parts = {**there, GRADIENTS: gradients, ACTIVATIONS: 0, TEMPORARIES: update}
    else:
        parts |= {ACTIVATIONS: min(work, saved), TEMPORARIES: max(0, work - saved)}
    return StepBytes(sum(parts.values()), parts, kept, tracker.host_peak, trained)


def count_picture(step: Step, batch: Callable[[], Batch], tracker: Tracker, *, autocast: Any) -> int:
    """Bytes that a call of the denoiser without gradients takes beyond what is kept."""
    step.denoiser.eval()
    tracker.restart()
    before = tracker.now
    with torch.no_grad(), autocast():
        given = batch()
        step.predict(step.noise(given, 0, 0), given)
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


def held_bytes(network: nn.Module) -> int:
    """Bytes of a network's numbers, in whatever form they are; what is shared counts once."""
    storages = {part.untyped_storage() for one in (*network.parameters(), *network.buffers()) for part in parts_of(one)}
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def widest(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest layer before it is quantised, in a dtype."""
    shapes = [
        module.in_features * module.out_features if isinstance(module, nn.Linear) else sum(one.numel() for one in module.parameters(recurse=False))
        for module in network.modules()
    ]
    return max(shapes, default=0) * dtype.itemsize


@contextmanager
def new_garbage_alone() -> Iterator[None]:
    """Have no garbage looked for among what is there already: of all libraries' objects that takes longer than a plan."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
