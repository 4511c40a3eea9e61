"""Where on the way from data to noise training looks: distributions over time, and shifts towards noise.

Time is in [0, 1], 0 data and 1 noise. All draws come from one CPU generator. Importing this file imports no torch, so that the
families that name these distributions stay cheap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

FEWEST_TOKENS, MU_AT_FEWEST = 256, 0.5
MOST_TOKENS, MU_AT_MOST = 4096, 1.15
"""The two points through which `resolution_shift` is drawn: 256 and 1024 pixels square at 16 pixels a token (the SD3 and Flux papers)."""


class Times(ABC):
    """A distribution over [0, 1]."""

    @abstractmethod
    def sample(self, count: int, generator: Generator) -> Tensor:
        """Draw `count` times, float32, (count,)."""


@dataclass(frozen=True, slots=True)
class LogitNormal(Times):
    """sigmoid(scale * n), n standard normal: most draws near the middle, fewer as `scale` grows."""

    scale: float = 1.0

    def sample(self, count: int, generator: Generator) -> Tensor:
        import torch

        return torch.sigmoid(self.scale * torch.randn(count, generator=generator))


@dataclass(frozen=True, slots=True)
class Uniform(Times):
    """Every time alike."""

    def sample(self, count: int, generator: Generator) -> Tensor:
        import torch

        return torch.rand(count, generator=generator)


@dataclass(frozen=True, slots=True)
class Beta(Times):
    """Beta(alpha, beta): towards noise where alpha is the larger, towards data where beta is; to the middle where both are large."""

    alpha: float
    beta: float

    def sample(self, count: int, generator: Generator) -> Tensor:
        import torch

        # torch.distributions.Beta takes no generator; the gamma draws that it is made of do.
        ones = torch.ones(count, dtype=torch.float64)
        first = torch._standard_gamma(self.alpha * ones, generator=generator)
        second = torch._standard_gamma(self.beta * ones, generator=generator)
        return (first / (first + second)).float()


@dataclass(frozen=True, slots=True)
class Listed(Times):
    """One of these, each as often as it stands there."""

    values: tuple[float, ...]

    def sample(self, count: int, generator: Generator) -> Tensor:
        import torch

        return torch.tensor(self.values)[torch.randint(len(self.values), (count,), generator=generator)]


FAST = Listed((1.0,) * 7 + (0.75, 0.5, 0.25))
"""The few times at which a model distilled to four steps is asked, the first of them most often."""


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move times towards noise where `shift` > 1, s t / (1 + (s - 1) t); 0 and 1 stay where they are."""
    return shift * time / (1 + (shift - 1) * time)


def resolution_shift(tokens: int) -> float:
    """The shift for a picture of so many image tokens: exp(mu), mu linear in the count and not clamped.

    A large picture keeps its outlines visible under more noise than a small one, so it is trained nearer to noise.
    """
    slope = (MU_AT_MOST - MU_AT_FEWEST) / (MOST_TOKENS - FEWEST_TOKENS)
    return math.exp(MU_AT_FEWEST + slope * (tokens - FEWEST_TOKENS))
