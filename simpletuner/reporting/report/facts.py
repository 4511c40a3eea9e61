"""What the report is told of a run when it begins; the rest it learns from events, and from files in the output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One dataset of pictures."""

    id: str
    role: str
    """E.g. trained, regularisation, held out."""
    images: int
    repeats: int
    buckets: Sequence[tuple[str, int]]
    """Size and pictures of each."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rule to pictures that it removed."""
    about: str = ""


@dataclass(frozen=True, slots=True)
class CropShown:
    """A picture, and what of it is trained on."""

    dataset: str
    file: str
    caption: str
    thumbnail: str
    """JPEG in base64; empty if there is none."""
    original: tuple[int, int]
    resized: tuple[int, int]
    """Width and height, of which the crop is a part."""
    crop: tuple[int, int, int, int]
    """Left, top, width, height."""
    bucket: str


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """The memory that a phase of the run is planned to take."""

    name: str
    card_bytes: int
    main_bytes: int


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run is. No secrets, no absolute paths."""

    name: str
    """Of the output folder."""
    output: str
    """The output folder as a command names it."""
    where: str
    """What a command must be told to find the model, where the output folder does not; no absolute paths."""
    family: str
    base: str
    learns: str
    device: str
    total_steps: int
    images_per_step: int
    steps_per_epoch: float
    start: str
    settings: Mapping[str, Any]
    """Effective options by key."""
    metric: str
    """By what the best checkpoint is told: `loss` or `clip`."""
    max_grad_norm: float
    checkpoint_limit: int | None
    is_adapter: bool
    software: str
    planned: Sequence[PlannedPhase] = ()
    datasets: Sequence[DatasetRow] = ()
    crops: Callable[[], Sequence[CropShown]] | None = None
    """Reads a few pictures of the datasets; called behind the run, may raise anything."""
