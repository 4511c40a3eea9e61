"""Which batch comes next: a function of the seed, the position and the samples, and of nothing else.

The stream of batches is endless: epoch follows epoch, and one batch has one position, counted from 0 over all processes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from simpletuner.data.buckets import Group
from simpletuner.data.lane import Cut, Lane
from simpletuner.data.timeline import Order, Timeline
from simpletuner.data.window import ALWAYS
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.types import Sample, Size

if TYPE_CHECKING:
    from simpletuner.options.training import Training


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What one batch is made of: samples of one dataset and one bucket."""

    group: str
    epoch: int
    samples: tuple[Sample, ...]
    draws: tuple[int, ...]
    """For each sample, how often it was drawn before in this run; without repeats, that is the epochs its dataset took part in."""

    @property
    def bucket(self) -> Size:
        return self.samples[0].geometry.bucket


class Sampler:
    """The order in which the datasets of a run are drawn."""

    def __init__(self, datasets: Sequence[Group], batch_size: int, seed: int, batches_per_step: int = 1) -> None:
        """
        Args:
            datasets: in any order, their samples in any order: neither matters.
            batch_size: of datasets without their own.
            batches_per_step: batches that all processes together take for one optimizer step, in which windows are counted.
        """
        self.seed, self.batch_size, self.batches_per_step = seed, batch_size, batches_per_step
        self._lanes = [Lane(group, group.batch_size or batch_size, seed) for group in sorted(datasets, key=lambda group: group.name)]
        if not any(lane.rate for lane in self._lanes):
            raise DatasetError("no dataset has anything to draw", hint="Enable a dataset with images and a probability above 0.")
        self._timeline = Timeline(self._lanes, batches_per_step, seed)
        self._held: dict[int, EpochPlan] = {}
        self._located = 0, 0, 0
        """The epoch that was found last, where it begins, and where the next one does; readers are mostly in one."""
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Ids of the datasets."""
        return [lane.group.name for lane in self._lanes]

    @property
    def end(self) -> int | None:
        """The position from which on no dataset takes part; None if there is always one."""
        return self._timeline.end

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch; the same for all epochs unless a probability is not whole, or a dataset comes or goes."""
        return self._timeline.first(epoch + 1) - self._timeline.first(epoch)

    def counts(self, position: int) -> dict[str, int]:
        """How many of the batches before a position are of each dataset."""
        counts = self._timeline.counts(position)
        return {lane.group.name: counts[number] for number, lane in enumerate(self._lanes)}

    def epoch_batches(self, epoch: int) -> EpochPlan:
        """The batches of an epoch in their order; each is put together when it is asked for."""
        turns, order = self._timeline.epoch(epoch)
        return EpochPlan(self._lanes, epoch, turns, order)

    def windowed_position(self, step: int) -> int | None:
        """The position at which an optimizer step begins, if any dataset takes part in some steps only; None if none does."""
        has_windows = any(lane.group.window != ALWAYS for lane in self._lanes)
        return step * self.batches_per_step if has_windows else None

    def locate(self, position: int) -> tuple[int, int]:
        """Tell which epoch a position of the stream lies in, and which batch of it that is."""
        epoch, first, after = self._located
        if not first <= position < after:
            epoch = self._timeline.locate(position)
            first, after = self._timeline.first(epoch), self._timeline.first(epoch + 1)
            self._located = epoch, first, after
        return epoch, position - first

    def at(self, position: int) -> BatchPlan:
        """The batch at a position of the stream. Safe to call from several threads."""
        epoch, index = self.locate(position)
        with self._lock:
            if epoch not in self._held:
                # Readers that are ahead may be an epoch apart, never two.
                self._held = {old: plan for old, plan in self._held.items() if abs(old - epoch) == 1}
                self._held[epoch] = self.epoch_batches(epoch)
            plan = self._held[epoch]
        return plan[index]

    def digest(self) -> str:
        """Identity of all that decides which pictures and captions are drawn when: seed, datasets, images, sizes, captions.

        An image is told by its fingerprint, which is known whether or not the image was ever read whole.
        """
        digest = hashlib.blake2b(repr(self.seed).encode(), digest_size=16)
        for lane in self._lanes:
            group = lane.group
            digest.update(repr((group.name, group.repeats, group.probability, lane.batch_size)).encode())
            if group.window != ALWAYS:
                digest.update(repr((group.window, self.batches_per_step)).encode())
            for index in lane.order:
                sample = group.samples[index]
                resized, crop = sample.geometry.resized, sample.geometry.crop
                window = (resized.width, resized.height, crop.left, crop.top, crop.width, crop.height, sample.crops)
                digest.update(repr((sample.name, sample.fingerprint, window, sample.captions, sample.is_regularisation)).encode())
        return digest.hexdigest()


def total_steps(training: Training, sampler: Sampler) -> int:
    """Optimizer steps of the run.

    Raises:
        ConfigError: at some step of it no dataset takes part.
    """
    per_step, end = sampler.batches_per_step, sampler.end
    epochs = training.num_train_epochs or 1
    total = training.max_train_steps or math.ceil(sum(sampler.batches_per_epoch(epoch) for epoch in range(epochs)) / per_step)
    if end is None or end >= total * per_step:
        return total
    epoch, _ = sampler.locate(end)
    if not training.max_train_steps and epoch >= epochs and end >= per_step:
        return end // per_step  # what is left over fills no step, and no epoch follows to fill it up
    raise ConfigError(
        f"no dataset takes part from step {end // per_step + 1} on, in epoch {epoch + 1}; the run has {total} steps",
        hint="Look at start_epoch, end_epoch, start_step and end_step: at every step at least one dataset must take part.",
    )


class EpochPlan(Sequence[BatchPlan]):
    """The batches of one epoch: all datasets that take part shuffled together, kept as numbers of samples."""

    def __init__(self, lanes: Sequence[Lane], epoch: int, turns: Mapping[int, int], order: Order) -> None:
        self._lanes, self._epoch, self._order = lanes, epoch, order
        self._cuts: dict[int, Cut] = {number: lanes[number].cut(turn) for number, turn in turns.items()}

    def __len__(self) -> int:
        return self._order.shape[1]

    @overload
    def __getitem__(self, index: int) -> BatchPlan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[BatchPlan, ...]: ...
    def __getitem__(self, index: int | slice) -> BatchPlan | tuple[BatchPlan, ...]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        lane, batch = self._order[:, index].tolist()
        group, cut = self._lanes[lane].group, self._cuts[lane]
        start, stop = cut.starts[batch], cut.stops[batch]
        samples = tuple(group.samples[number] for number in cut.samples[start:stop])
        return BatchPlan(group.name, self._epoch, samples, tuple(cut.draws[start:stop].tolist()))
