"""A figure over a run of any length in a bounded number of points: neighbours are put together as more come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_BINS = 800
"""Points of a curve at most; a page is hardly as wide."""


@dataclass(slots=True)
class Bin:
    """Neighbouring values as one."""

    first: int
    """The x of the first of them."""
    last: int
    count: int
    mean: float
    least: float
    most: float

    def take(self, other: Bin) -> None:
        """Add values that come after these."""
        count = self.count + other.count
        self.mean += (other.mean - self.mean) * other.count / count
        self.count, self.last = count, other.last
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)


@dataclass(slots=True)
class Curve:
    """Values by x, a whole number that grows."""

    width: int = 1
    """How far the values of one bin may be apart: bin n holds those from n x width on."""
    bins: list[Bin] = field(default_factory=list)

    def add(self, x: int, value: float) -> None:
        """Take a value; one that is not finite is left out, and so is one before the last."""
        if not math.isfinite(value) or (self.bins and x < self.bins[-1].last):
            return
        self._put(Bin(x, x, 1, value, value, value))
        while len(self.bins) > MOST_BINS:
            self.width *= 2
            fine, self.bins = self.bins, []
            for one in fine:
                self._put(one)

    def _put(self, new: Bin) -> None:
        if self.bins and self.bins[-1].first // self.width == new.first // self.width:
            self.bins[-1].take(new)
        else:
            self.bins.append(new)

    def cut(self, x: int) -> None:
        """Forget what is after x; of a bin that reaches over it nothing stays."""
        self.bins = [one for one in self.bins if one.last <= x]

    def as_json(self) -> dict[str, Any]:
        return {"width": self.width, "bins": [[one.first, one.last, one.count, *map(_short, (one.mean, one.least, one.most))] for one in self.bins]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Curve:
        return cls(int(found["width"]), [Bin(*one) for one in found["bins"]])

    def moved(self, by: int) -> Curve:
        """The same, so much later."""
        return Curve(self.width, [Bin(one.first + by, one.last + by, one.count, one.mean, one.least, one.most) for one in self.bins])

    def then(self, later: Curve) -> Curve:
        """This one and one that follows it."""
        whole = Curve(max(self.width, later.width))
        for one in (*self.bins, *later.bins):
            whole._put(Bin(one.first, one.last, one.count, one.mean, one.least, one.most))
        while len(whole.bins) > MOST_BINS:
            fine, whole = whole.bins, Curve(whole.width * 2)
            for one in fine:
                whole._put(one)
        return whole


def mean_of(bins: Sequence[Bin]) -> float:
    """The mean of all values in some bins."""
    count = sum(one.count for one in bins)
    return sum(one.mean * one.count for one in bins) / count if count else math.nan


def _short(value: float) -> float:
    return float(f"{value:.6g}")
