"""What is told of a run besides its figures: what it is doing, what it made, and how it ended."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from simpletuner.reporting.report.recorder import Recorder
    from simpletuner.reporting.tracker import Tracker

STATUS, STAGE, CHECKPOINT, NOTE = "training.status", "lifecycle.stage", "training.checkpoint", "notification"
ERROR, FAULT, PICTURES = "error", "gpu.fault", "validation.image"
EVENTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    STAGE: ("info", {"stage": "which stage begins, by its key below", "status": "`running`, or `completed` for the last one"}),
    STATUS: (
        "info",
        {
            "step": "optimizer steps done",
            "total_steps": "steps of the whole run",
            "figures": "the metrics of this step by name, see tracking.md",
        },
    ),
    CHECKPOINT: ("info", {"step": "the step that was saved", "checkpoint": "name of its folder in `output_dir`"}),
    PICTURES: (
        "info",
        {
            "step": "the step that the pictures show; 0 is the untouched model",
            "captions": "prompt of each picture, by the picture's name",
            "left_out": "how many pictures are not sent since too many wait",
            "sampling_step": "of a picture that is still being made (`validation_preview`): the sampling steps done",
        },
    ),
    NOTE: ("info", {"step": "the step that it is about, if any", "figures": "metrics by name, e.g. held-out losses"}),
    ERROR: ("error", {"error": "the kind of error", "exit_code": "the exit code of the run; 1 where it is not known yet"}),
    FAULT: ("critical", {"error": "as for `error`, where the accelerator failed or its memory ran out", "exit_code": "the same"}),
}
"""Every kind of event: how much it matters, and the fields that it may have besides its message."""
STAGES: Mapping[str, str] = {
    "init_text_embed_cache": "Encoding captions",
    "init_vae_cache": "Encoding pictures",
    "init_load_base_model": "Loading the base model",
    "init_prepare_models": "Preparing the optimizer",
    "init_resume_checkpoint": "Looking for a checkpoint",
    "benchmark_base_model": "Rendering pictures of the base model",
    "validation": "Rendering pictures",
    "checkpoint_save": "Saving a checkpoint",
    "final_validation": "Rendering the last pictures",
    "model_save": "Saving the result",
    "training_complete": "Training is complete",
}
"""Stages of a run in their order, each with a message."""
FOLDERS = re.compile(r"(?<![\w/:])(?:/|~/|[A-Za-z]:[\\/])(?:[^\s/\\'\"]+[\\/])+")
"""The folders of an absolute path, which are nobody's business but this machine's."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing to tell."""

    kind: str
    level: str
    message: str
    fields: Mapping[str, Any]
    pictures: Mapping[str, Image] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    """In seconds since 1970."""


class Receiver(Protocol):
    """One who is told."""

    def take(self, event: Event) -> None:
        """Take an event; wait for nobody, raise nothing. Comes from the run's own thread and from that which writes checkpoints, perhaps at once."""

    def close(self, deadline: float) -> None:
        """Deliver what is held, until `time.monotonic()` has come so far at the latest. Comes once, after the last event, from any thread."""


class Events:
    """Everything that is to be told of a run, to everybody who is to be told. Without receivers all of it is nothing."""

    def __init__(self, receivers: Sequence[Receiver] = (), report: Recorder | None = None, kinds: Mapping[str, type[Tracker]] | None = None) -> None:
        """
        Args:
            report: is told before all others.
            kinds: the trackers that will get the run's figures, by name; None if nobody has looked for them.
        """
        self.report, self.kinds = report, kinds
        self._receivers = tuple(receivers) if report is None else (report, *receivers)
        self._total_steps: int | None = None

    def expect(self, total_steps: int) -> None:
        """Learn how long the run is, once that is known."""
        self._total_steps = total_steps

    def emit(self, kind: str, message: str, *, level: str | None = None, pictures: Mapping[str, Image] | None = None, **fields: Any) -> None:
        """Tell everybody; fields that are None are left out.

        Args:
            kind: one of EVENTS, which also says what its fields are.
            level: how much it matters, if not as usual.
            pictures: by name; must not be changed any more.
        """
        if not self._receivers:
            return
        usual, known = EVENTS[kind]
        assert fields.keys() <= known.keys(), f"{kind} has no fields {fields.keys() - known.keys()}"
        event = Event(kind, level or usual, message, {key: value for key, value in fields.items() if value is not None}, dict(pictures or {}))
        for receiver in self._receivers:
            receiver.take(event)

    def stage(self, key: str) -> None:
        """Say that a stage begins."""
        self.emit(STAGE, STAGES[key], stage=key, status="completed" if key == "training_complete" else "running")

    def looks(self, step: int) -> None:
        """Say that pictures of a step are rendered."""
        self.stage("final_validation" if step == self._total_steps else "validation")

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Tell of the figures of a step."""
        if not self._receivers:
            return
        if "train_loss" in values:
            of = f" of {self._total_steps}" if self._total_steps else ""
            said = f"step {step}{of}: loss {values['train_loss']:.4f}, rate {values.get('learning_rate', 0):.2e}"
            self.emit(STATUS, said, step=step, total_steps=self._total_steps, figures=dict(values))
        else:
            self.emit(NOTE, f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}", step=step, figures=dict(values))

    def pictures(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str]) -> None:
        """Tell of pictures of validation, and send them."""
        several = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
        prompts = {name: captions[name] for name in images if name in captions}
        self.emit(PICTURES, f"step {step}: {several}", pictures=images, step=step, captions=prompts)

    def preview(self, step: int, name: str, prompt: str, done: int, image: Image) -> None:
        """Show a picture that is still being made."""
        said = f"step {step}: {name} after {done} sampling steps"
        self.emit(PICTURES, said, pictures={name: image}, step=step, captions={name: prompt}, sampling_step=done)

    def saved(self, step: int, name: str) -> None:
        """Tell that a checkpoint is on disk."""
        self.emit(CHECKPOINT, f"step {step} is saved as {name}", step=step, checkpoint=name)

    def failed(self, error: BaseException, exit_code: int, *, is_fault: bool) -> None:
        """Tell that an error ends the run."""
        text = str(getattr(error, "message", error)).strip() or "no further word"
        said = f"{type(error).__name__}: {text}" if not hasattr(error, "message") else text
        self.emit(FAULT if is_fault else ERROR, without_folders(said), error=type(error).__name__, exit_code=exit_code)

    def move_later(self, step: int, aside: Path) -> None:
        """Put the report of a run that is not continued beside its checkpoints."""
        if self.report is not None:
            self.report.move_later(step, aside)

    def close(self, seconds: float) -> None:
        """Wait until everybody has been told, so long at most for all of them together."""
        if not self._receivers:
            return
        deadline = time.monotonic() + seconds
        with futures.ThreadPoolExecutor(len(self._receivers), "close") as at_once:  # so that one that hangs takes no time of the others'
            list(at_once.map(lambda receiver: receiver.close(deadline), self._receivers))


def without_folders(text: str) -> str:
    """Leave the last part alone of absolute paths in a text."""
    return FOLDERS.sub("", text)
