"""What the report knows of a run: of bounded size however long it is, and kept in a file so that a resumed run goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.reporting.report.curve import Curve

STATE_FILE, PAGE_FILE = "report/report.json", "report.html"
"""In the output folder."""
FIGURES = {"train_loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
"""What trackers get, to the curves of it."""
PHASES = ("starting", "caching text", "caching images", "loading", "training", "held-out loss", "validation", "saving")
SPANS, NOTES = 400, 200
"""Spans of the timeline, and warnings, that are kept."""


@dataclass(slots=True)
class State:
    """What came of a run so far."""

    began: float
    """In seconds since 1970."""
    updated: float
    status: str = "starting"
    """starting, running, finished, stopped or failed."""
    ended: str = ""
    """Why it ended, if not by its last step."""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    phase: str = "starting"
    starts: int = 1
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """Phases from one second of running to another."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By step."""
    memory: dict[str, Curve] = field(default_factory=dict)
    """Bytes by second of running."""
    warnings: list[tuple[float, int, str]] = field(default_factory=list)
    """Time, step, text."""
    checkpoints: dict[int, str] = field(default_factory=dict)
    """Names by step; older ones may have been removed since."""
    ran_out: float = 0.0
    """How often memory did, in this start."""
    facts: dict[str, Any] = field(default_factory=dict)
    crops: list[dict[str, Any]] = field(default_factory=list)
    previous: dict[str, Any] = field(default_factory=dict)
    """Options of the start before."""

    @property
    def seconds(self) -> float:
        """How long the run has been running, stops not counted."""
        return sum(self.phases.values())

    def spend(self, phase: str, seconds: float) -> None:
        """Count time for a phase."""
        if seconds <= 0:
            return
        at = self.seconds
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        if self.spans and self.spans[-1][0] == phase:
            self.spans[-1] = (phase, self.spans[-1][1], at + seconds)
        else:
            self.spans.append((phase, at, at + seconds))
        if len(self.spans) > SPANS:
            self.spans = without_shortest(self.spans)

    def warn(self, at: float, text: str) -> None:
        """Keep a warning, if there are not very many already."""
        if len(self.warnings) < NOTES and all(text != known for _, _, known in self.warnings):
            self.warnings.append((at, self.step, text))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        for name, curve in FIGURES.items():
            if name in values:
                self.curve(curve).add(step, values[name])
        self.step, self.epoch = max(self.step, step), values.get("epoch", self.epoch)

    def curve(self, name: str) -> Curve:
        return self.curves.setdefault(name, Curve())

    def cut(self, step: int) -> None:
        """Forget what was made after a step that the run goes on from; time was spent all the same."""
        for curve in self.curves.values():
            curve.cut(step)
        self.checkpoints = {at: name for at, name in self.checkpoints.items() if at <= step}
        self.step = min(self.step, step)

    def as_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("curves", "memory"):
            found[name] = {key: curve.as_json() for key, curve in found[name].items()}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> State:
        """Raises KeyError, TypeError or ValueError for what is no state."""
        known = {name: found[name] for name in cls.__dataclass_fields__}
        for name in ("curves", "memory"):
            known[name] = {key: Curve.from_json(curve) for key, curve in known[name].items()}
        known["checkpoints"] = {int(step): name for step, name in known["checkpoints"].items()}
        known["spans"] = [tuple(one) for one in known["spans"]]
        known["warnings"] = [tuple(one) for one in known["warnings"]]
        return cls(**known)


def without_shortest(spans: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The timeline with its shorter half left to their neighbours before."""
    limit = sorted(end - begin for _, begin, end in spans)[len(spans) // 2]
    kept: list[tuple[str, float, float]] = []
    for phase, begin, end in spans:
        if kept and (kept[-1][0] == phase or end - begin <= limit):
            kept[-1] = (kept[-1][0], kept[-1][1], end)
        else:
            kept.append((phase, begin, end))
    return kept


def joined(earlier: State, now: State) -> State:
    """A run that was begun earlier and goes on now."""
    offset = earlier.seconds
    names = {*earlier.memory, *now.memory}
    whole = State.from_json(json.loads(json.dumps(now.as_json())))
    whole.began, whole.starts = earlier.began, earlier.starts + now.starts
    whole.step, whole.epoch = max(earlier.step, now.step), max(earlier.epoch, now.epoch)
    whole.phases = {name: earlier.phases.get(name, 0.0) + now.phases.get(name, 0.0) for name in {**earlier.phases, **now.phases}}
    whole.spans = [*earlier.spans, *((phase, begin + offset, end + offset) for phase, begin, end in now.spans)]
    whole.memory = {name: earlier.memory.get(name, Curve()).then(now.memory.get(name, Curve()).moved(int(offset))) for name in names}
    whole.curves = State.from_json(earlier.as_json()).curves
    for name, curve in now.curves.items():
        whole.curves[name] = whole.curve(name).then(curve)
    whole.warnings = [*earlier.warnings, *now.warnings][-NOTES:]
    whole.checkpoints = {**earlier.checkpoints, **now.checkpoints}
    whole.total_steps = now.total_steps or earlier.total_steps
    whole.facts, whole.crops = now.facts or earlier.facts, now.crops or earlier.crops
    return whole


def load(output_dir: Path) -> State | None:
    """What an earlier start left; None if that is nothing, or cannot be read."""
    try:
        return State.from_json(json.loads((output_dir / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(output_dir: Path, state: State) -> None:
    """Write it, whole or not at all.

    Raises:
        OSError: there is no room, or no permission.
    """
    write_whole(output_dir / STATE_FILE, json.dumps(state.as_json(), ensure_ascii=False, separators=(",", ":"), default=str))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was.

    Raises:
        OSError: there is no room, or no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    try:
        staged.write_text(text, encoding="utf-8", errors="replace")
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
