"""Images for a latent cache, without files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from simpletuner.types import Sample


@dataclass
class MadeImages:
    """Images that a function makes of their samples, whose content is known."""

    read: Callable[[Sample], Tensor]

    def content(self, sample: Sample) -> str:
        return sample.content

    def open(self, sample: Sample) -> tuple[str, Callable[[], Tensor]]:
        return sample.content, partial(self.read, sample)

    def save(self) -> None:
        pass
