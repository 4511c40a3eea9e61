"""The batches of one dataset: pass after pass over it, each a new shuffle of all its draws.

Shuffling sorts by the raw numbers of PCG64, a stream that NumPy promises never to change. It makes no such promise for
`Generator.permutation`, nor Python for `random.shuffle`; and hashing a million names an epoch would take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy
from numpy.typing import NDArray

from simpletuner.data.buckets import Group
from simpletuner.randomness import seed_from

Numbers = NDArray[numpy.int32]
"""Numbers of samples, and of draws."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Batches of one dataset in a row: batch i is samples[starts[i] : stops[i]]."""

    samples: Numbers
    draws: Numbers
    starts: NDArray[numpy.int64]
    stops: NDArray[numpy.int64]


class Lane:
    """The endless stream of batches of one dataset.

    Its turns are the epochs in which it takes part. A turn takes the next `probability` passes of it: at 0.5 two turns share
    a pass, and every sample is seen in one of them.
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
        """Batches a turn, not rounded."""

    def first(self, turn: int) -> int:
        """Batches taken before a turn. Rounded up, so that turn 0 of a small dataset has one at all."""
        return math.ceil(turn * self.rate)

    def count(self, turn: int) -> int:
        """Batches that a turn takes."""
        return self.first(turn + 1) - self.first(turn)

    def cut(self, turn: int) -> Cut:
        """The batches that a turn takes."""
        begin, end = self.first(turn), self.first(turn + 1)
        parts = []
        while begin < end:
            number, offset = divmod(begin, self._batches)
            count = min(end - begin, self._batches - offset)
            parts.append(self._pass(number, offset, count))
            begin += count
        return parts[0] if len(parts) == 1 else joined(parts)

    def _pass(self, number: int, offset: int, count: int) -> Cut:
        """Some of the batches of a pass."""
        parts = []
        for (width, height), members in self._buckets.items():
            samples = shuffles(members, self._passes, seed_from("samples", self._seed, self.group.name, width, height, number))
            draws = numpy.repeat(number * self._passes + numpy.arange(self._passes, dtype=numpy.int32), len(members))
            starts = numpy.arange(0, len(samples), self.batch_size)
            parts.append(Cut(samples, draws, starts, numpy.minimum(starts + self.batch_size, len(samples))))
        whole = joined(parts)
        taken = shuffle(self._batches, seed_from("pass", self._seed, self.group.name, number))[offset : offset + count]
        return Cut(whole.samples, whole.draws, whole.starts[taken], whole.stops[taken])


def joined(parts: Sequence[Cut]) -> Cut:
    """One cut after another."""
    if not parts:
        none = numpy.zeros(0, dtype=numpy.int64)
        return Cut(none.astype(numpy.int32), none.astype(numpy.int32), none, none)
    shifts = numpy.cumsum([0, *(len(part.samples) for part in parts[:-1])])
    return Cut(
        numpy.concatenate([part.samples for part in parts]),
        numpy.concatenate([part.draws for part in parts]),
        numpy.concatenate([part.starts + shift for part, shift in zip(parts, shifts)]),
        numpy.concatenate([part.stops + shift for part, shift in zip(parts, shifts)]),
    )


def shuffle(count: int, seed: int) -> NDArray[numpy.int64]:
    """A permutation of 0 ... count - 1."""
    return numpy.argsort(numpy.random.PCG64(seed).random_raw(count), kind="stable")


def shuffles(members: Numbers, times: int, seed: int) -> Numbers:
    """`members` shuffled anew `times` times, one after another: copies of one then lie far apart and hardly ever share a batch."""
    keys = numpy.random.PCG64(seed).random_raw((times, len(members)))
    return members[numpy.argsort(keys, axis=1, kind="stable")].reshape(-1)
