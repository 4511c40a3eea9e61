"""How far a run is: the few numbers a checkpoint needs besides weights. Randomness is not among them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_FILE = "training_state.json"


@dataclass(frozen=True, slots=True)
class TrainState:
    """The position of a run after a whole optimizer step."""

    step: int
    """Optimizer steps done."""
    position: int
    """Batches taken from the data stream, over all processes."""
    epoch: int
    """Epoch that the next batch belongs to, counted from 0."""
    data_digest: str
    """Identity of the data order; another one means that images, batch size or seed changed."""
    assistant: str = ""
    """Identity of the frozen adapter that stands beside the base; empty without one."""

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
