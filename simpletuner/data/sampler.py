"""Which batch comes next: a function of the seed, the position and the samples, and of nothing else.

The stream of batches is endless: epoch follows epoch, and one batch has one position, counted from 0 over all processes.

Shuffling sorts by the raw numbers of PCG64, a stream that NumPy promises never to change. It makes no such promise for
`Generator.permutation`, nor Python for `random.shuffle`; and hashing a million names an epoch would take seconds.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import overload

import numpy
from numpy.typing import NDArray

from simpletuner.data.buckets import Group
from simpletuner.errors import DatasetError
from simpletuner.randomness import seed_from
from simpletuner.types import Sample, Size

Numbers = NDArray[numpy.int32]
"""Numbers of samples, and of draws."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What one batch is made of: samples of one dataset and one bucket."""

    group: str
    epoch: int
    samples: tuple[Sample, ...]
    draws: tuple[int, ...]
    """For each sample, how often it was drawn before in this run; without repeats, that is the epoch."""

    @property
    def bucket(self) -> Size:
        return self.samples[0].geometry.bucket


class Sampler:
    """The order in which the datasets of a run are drawn."""

    def __init__(self, datasets: Sequence[Group], batch_size: int, seed: int) -> None:
        """
        Args:
            datasets: in any order, their samples in any order: neither matters.
            batch_size: of datasets without their own.
        """
        self.seed, self.batch_size = seed, batch_size
        self._lanes = [_Lane(group, group.batch_size or batch_size, seed) for group in sorted(datasets, key=lambda group: group.name)]
        self._rate = sum((lane.rate for lane in self._lanes), Fraction(0))
        if not self._rate:
            raise DatasetError("no dataset has anything to draw", hint="Enable a dataset with images and a probability above 0.")
        self._held: dict[int, EpochPlan] = {}
        self._lock = threading.Lock()

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch; the same for all epochs unless a probability is not whole."""
        return self._first(epoch + 1) - self._first(epoch)

    def epoch_batches(self, epoch: int) -> EpochPlan:
        """The batches of an epoch in their order; each is put together when it is asked for."""
        return EpochPlan(self._lanes, epoch, self.seed)

    def locate(self, position: int) -> tuple[int, int]:
        """Tell which epoch a position of the stream lies in, and which batch of it that is."""
        epoch = math.floor(position / self._rate)  # or a little later than the true one: each lane rounds up
        while self._first(epoch) > position:
            epoch -= 1
        return epoch, position - self._first(epoch)

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
        """Identity of all that decides which pictures and captions are drawn when: seed, datasets, contents, sizes, captions."""
        digest = hashlib.blake2b(repr(self.seed).encode(), digest_size=16)
        for lane in self._lanes:
            group = lane.group
            digest.update(repr((group.name, group.repeats, group.probability, lane.batch_size)).encode())
            for index in lane.order:
                sample = group.samples[index]
                resized, crop = sample.geometry.resized, sample.geometry.crop
                window = (resized.width, resized.height, crop.left, crop.top, crop.width, crop.height)
                digest.update(repr((sample.name, sample.content, window, sample.captions, sample.is_regularisation)).encode())
        return digest.hexdigest()

    def _first(self, epoch: int) -> int:
        """The position at which an epoch begins."""
        return sum(lane.first(epoch) for lane in self._lanes)


class EpochPlan(Sequence[BatchPlan]):
    """The batches of one epoch: all datasets shuffled together, kept as numbers of samples."""

    def __init__(self, lanes: Sequence[_Lane], epoch: int, seed: int) -> None:
        self._lanes, self._epoch = lanes, epoch
        cuts = [(number, cut) for number, lane in enumerate(lanes) for cut in lane.cuts(epoch)]
        self._cuts = [cut for _, cut in cuts]
        self._lane_of = [number for number, _ in cuts]
        source = numpy.repeat(numpy.arange(len(cuts)), [len(cut.starts) for _, cut in cuts])
        batch = numpy.concatenate([numpy.arange(len(cut.starts)) for _, cut in cuts]) if cuts else source
        order = _shuffle(len(batch), seed_from("batches", seed, epoch))
        self._source, self._batch = source[order], batch[order]

    def __len__(self) -> int:
        return len(self._batch)

    @overload
    def __getitem__(self, index: int) -> BatchPlan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[BatchPlan, ...]: ...
    def __getitem__(self, index: int | slice) -> BatchPlan | tuple[BatchPlan, ...]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        source = self._source[index]
        cut, group = self._cuts[source], self._lanes[self._lane_of[source]].group
        start, stop = cut.starts[self._batch[index]], cut.stops[self._batch[index]]
        samples = tuple(group.samples[number] for number in cut.samples[start:stop])
        return BatchPlan(group.name, self._epoch, samples, tuple(cut.draws[start:stop].tolist()))


@dataclass(frozen=True, slots=True)
class _Cut:
    """Batches out of one pass over a dataset: batch i is samples[starts[i] : stops[i]]."""

    samples: Numbers
    draws: Numbers
    starts: NDArray[numpy.int64]
    stops: NDArray[numpy.int64]


class _Lane:
    """The endless stream of batches of one dataset: pass after pass, each a new shuffle of all its draws.

    An epoch takes the next `probability` passes of it. At 0.5 two epochs share a pass, and every sample is seen in one of them.
    """

    def __init__(self, group: Group, batch_size: int, seed: int) -> None:
        self.group, self.batch_size, self._seed = group, batch_size, seed
        self.order = sorted(range(len(group.samples)), key=lambda index: group.samples[index].name)
        buckets: dict[tuple[int, int], list[int]] = {}
        for index in self.order:
            crop = group.samples[index].geometry.crop
            buckets.setdefault((crop.width, crop.height), []).append(index)
        self._buckets = {size: numpy.array(members, dtype=numpy.int32) for size, members in sorted(buckets.items())}
        self._passes = group.repeats + 1
        self._batches = sum(math.ceil(len(members) * self._passes / batch_size) for members in self._buckets.values())
        self.rate = Fraction(str(group.probability)) * self._batches
        """Batches an epoch, not rounded."""

    def first(self, epoch: int) -> int:
        """Batches taken before an epoch. Rounded up, so that epoch 0 of a small dataset has one at all."""
        return math.ceil(epoch * self.rate)

    def cuts(self, epoch: int) -> Iterator[_Cut]:
        """The batches that an epoch takes, pass by pass."""
        begin, end = self.first(epoch), self.first(epoch + 1)
        while begin < end:
            number, offset = divmod(begin, self._batches)
            count = min(end - begin, self._batches - offset)
            yield self._cut(number, offset, count)
            begin += count

    def _cut(self, number: int, offset: int, count: int) -> _Cut:
        samples, draws, starts, stops = [], [], [], []
        length = 0
        for (width, height), members in self._buckets.items():
            seed = seed_from("samples", self._seed, self.group.name, width, height, number)
            samples.append(_shuffles(members, self._passes, seed))
            draws.append(numpy.repeat(number * self._passes + numpy.arange(self._passes, dtype=numpy.int32), len(members)))
            bounds = numpy.arange(0, len(samples[-1]), self.batch_size)
            starts.append(length + bounds)
            stops.append(length + numpy.minimum(bounds + self.batch_size, len(samples[-1])))
            length += len(samples[-1])
        taken = _shuffle(self._batches, seed_from("pass", self._seed, self.group.name, number))[offset : offset + count]
        return _Cut(numpy.concatenate(samples), numpy.concatenate(draws), numpy.concatenate(starts)[taken], numpy.concatenate(stops)[taken])


def _shuffle(count: int, seed: int) -> NDArray[numpy.int64]:
    """A permutation of 0 ... count - 1."""
    return numpy.argsort(numpy.random.PCG64(seed).random_raw(count), kind="stable")


def _shuffles(members: Numbers, times: int, seed: int) -> Numbers:
    """`members` shuffled anew `times` times, one after another: copies of one then lie far apart and hardly ever share a batch."""
    keys = numpy.random.PCG64(seed).random_raw((times, len(members)))
    return members[numpy.argsort(keys, axis=1, kind="stable")].reshape(-1)
