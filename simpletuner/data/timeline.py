"""Which datasets take part when: the endless stream of batches cut into epochs, as windows open and close over it.

An epoch draws the datasets that take part when it begins. Where one begins by its `start_step` in the middle of an epoch, its
batches are shuffled into what is left of that epoch; where one ends, what is left of it falls out. All others go on as they
were: a dataset that takes part throughout shows each sample once an epoch, whatever comes and goes beside it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy
from numpy.typing import NDArray

from simpletuner.data.lane import Lane, shuffle
from simpletuner.randomness import seed_from

Order = NDArray[numpy.int32]
"""(2, n): for each batch of an epoch the number of its lane, and its number among the batches that this lane takes in it."""


@dataclass(frozen=True, slots=True)
class Era:
    """Epochs in which the same datasets take part from beginning to end; or one epoch within which that changes."""

    epoch: int
    """Its first."""
    position: int
    """Where that begins."""
    turns: Mapping[int, int]
    """Number of each lane that takes part, to the turns which that took before."""
    epochs: float = math.inf
    order: Order | None = None
    """Of a lone epoch within which something changes."""

    def first(self, epoch: int, lanes: Sequence[Lane]) -> int:
        """The position at which an epoch begins, or the one behind the era's last."""
        if self.order is not None:
            return self.position + (self.order.shape[1] if epoch > self.epoch else 0)
        passed = epoch - self.epoch
        return self.position + sum(lanes[number].first(turn + passed) - lanes[number].first(turn) for number, turn in self.turns.items())

    def locate(self, position: int, lanes: Sequence[Lane]) -> int:
        """The epoch in which a position lies, or the first behind the era."""
        if self.order is not None:
            return self.epoch
        rate = sum((lanes[number].rate for number in self.turns), Fraction(0))
        epoch = self.epoch + math.floor((position - self.position + len(self.turns)) / rate)  # or a little later: each lane rounds
        while self.first(epoch, lanes) > position:
            epoch -= 1
        return epoch


class Timeline:
    """The epochs of a run."""

    def __init__(self, lanes: Sequence[Lane], batches_per_step: int, seed: int) -> None:
        """
        Args:
            batches_per_step: batches that all processes together take for one optimizer step.
        """
        self._lanes, self._per_step, self._seed = lanes, batches_per_step, seed
        self._eras: list[Era] = []
        self.end: int | None = None
        """The position from which on no dataset takes part; None if there is always one."""
        self._build()

    def first(self, epoch: int) -> int:
        """The position at which an epoch begins; the end, for those behind it."""
        if not self._eras:
            return 0
        era = self._eras[bisect_right(self._eras, epoch, key=lambda era: era.epoch) - 1]
        return era.first(int(min(epoch, era.epoch + era.epochs)), self._lanes)

    def locate(self, position: int) -> int:
        """The epoch in which a position lies."""
        if not self._eras:
            return 0
        era = self._eras[bisect_right(self._eras, position, key=lambda era: era.position) - 1]
        if self.end is not None and position >= self.end:
            return int(era.epoch + era.epochs)
        return era.locate(position, self._lanes)

    def counts(self, position: int) -> Counter[int]:
        """How many of the batches before a position are of each lane, by its number."""
        epoch = self.locate(position)
        counts: Counter[int] = Counter()
        for era in self._eras:
            passed = int(min(epoch, era.epoch + era.epochs)) - era.epoch
            if passed > 0 and era.order is not None:
                counts.update(era.order[0].tolist())
            elif passed > 0:
                for number, turn in era.turns.items():
                    counts[number] += self._lanes[number].first(turn + passed) - self._lanes[number].first(turn)
        _, order = self.epoch(epoch)
        counts.update(order[0, : position - self.first(epoch)].tolist())
        return counts

    def epoch(self, epoch: int) -> tuple[dict[int, int], Order]:
        """The turn of each lane that takes part in an epoch, and the order of its batches."""
        era = self._eras[bisect_right(self._eras, epoch, key=lambda era: era.epoch) - 1] if self._eras else None
        if era is None or epoch >= era.epoch + era.epochs:
            return {}, numpy.zeros((2, 0), dtype=numpy.int32)
        turns = {number: turn + epoch - era.epoch for number, turn in era.turns.items()}
        return turns, self._shuffled(turns, epoch) if era.order is None else era.order

    def _build(self) -> None:
        epoch, position = 0, 0
        turns = [0] * len(self._lanes)
        while True:
            active = {number: turns[number] for number in self._active(epoch, position)}
            if not active:
                self.end = position
                return
            era = Era(epoch, position, active)
            epoch_change, position_change = self._next_epoch_change(epoch), self._next_change(position)
            era = replace(
                era, epochs=min(epoch_change, math.inf if position_change == math.inf else era.locate(int(position_change), self._lanes)) - epoch
            )
            if not era.epochs:
                era = self._mixed(era)
            self._eras.append(era)
            if era.epochs == math.inf:
                return
            epoch = int(epoch + era.epochs)
            position = era.first(epoch, self._lanes)
            for number in era.turns:
                turns[number] += int(era.epochs)

    def _mixed(self, era: Era) -> Era:
        """The lone epoch that begins where `era` does, with all that changes within it."""
        left, position = self._shuffled(era.turns, era.epoch), era.position
        turns = dict(era.turns)
        done: list[Order] = []
        while (change := self._next_change(position)) < position + left.shape[1]:
            taken = int(change) - position
            done.append(left[:, :taken])
            position += taken
            active = self._active(era.epoch, position)
            left = left[:, taken:]
            left = left[:, numpy.isin(left[0], active)]
            fresh = {number: 0 for number in active if number not in turns}
            if fresh:
                left = numpy.concatenate([left, self._listed(fresh)], axis=1)
                left = left[:, shuffle(left.shape[1], seed_from("batches", self._seed, era.epoch, position))]
                turns |= fresh
        return Era(era.epoch, era.position, turns, 1, numpy.concatenate([*done, left], axis=1))

    def _active(self, epoch: int, position: int) -> list[int]:
        """The lanes that take part at a position within an epoch."""
        return [
            number
            for number, lane in enumerate(self._lanes)
            if lane.rate
            and lane.group.window.epochs[0] <= epoch < lane.group.window.epochs[1]
            and lane.group.window.steps[0] * self._per_step <= position < lane.group.window.steps[1] * self._per_step
        ]

    def _next_epoch_change(self, epoch: int) -> float:
        return min(later(epoch, (bound for lane in self._lanes for bound in lane.group.window.epochs)), default=math.inf)

    def _next_change(self, position: int) -> float:
        """The next position from which on other steps' windows hold."""
        return min(later(position, (bound * self._per_step for lane in self._lanes for bound in lane.group.window.steps)), default=math.inf)

    def _shuffled(self, turns: Mapping[int, int], epoch: int) -> Order:
        listed = self._listed(turns)
        return listed[:, shuffle(listed.shape[1], seed_from("batches", self._seed, epoch))]

    def _listed(self, turns: Mapping[int, int]) -> Order:
        """All batches of these lanes' turns, lane after lane."""
        counts = [self._lanes[number].count(turn) for number, turn in turns.items()]
        batches = [numpy.arange(count, dtype=numpy.int32) for count in counts]
        return numpy.stack([numpy.repeat(numpy.array([*turns], dtype=numpy.int32), counts), numpy.concatenate(batches)])


def later(value: int, bounds: Iterable[float]) -> Iterable[float]:
    return (bound for bound in bounds if bound > value)
