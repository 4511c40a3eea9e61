"""Follows a run by what is told of it, and renews the report: all of that on a thread of its own."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from simpletuner.reporting.events import CHECKPOINT, ERROR, FAULT, NOTE, PICTURES, STAGE, STATUS, Event, without_folders
from simpletuner.reporting.report.curve import Curve
from simpletuner.reporting.report.facts import CropShown, RunFacts
from simpletuner.reporting.report.page import Pictures, write_page
from simpletuner.reporting.report.state import STATE_FILE, State, joined, load, save

STATE_SECONDS, PAGE_SECONDS, SOON_SECONDS = 10.0, 30.0, 5.0
"""Between two writings of what is known, and of the page; and of the page where something happened that one wants to see."""
SHARE = 1 / 200
"""Of the time that the report may take at most: it waits so many times longer than its last renewal took, new pictures not counted."""
MEMORY_SECONDS = 5.0
"""Between two looks at the memory."""
TICK_SECONDS = 2.0
STAGES = {
    "init_text_embed_cache": "caching text",
    "init_vae_cache": "caching images",
    "init_load_base_model": "loading",
    "init_prepare_models": "loading",
    "init_resume_checkpoint": "loading",
    "benchmark_base_model": "validation",
    "validation": "validation",
    "final_validation": "validation",
    "model_save": "saving",
}
"""Stages to the phases that their time is counted for. A checkpoint is written behind the training."""
HELD_OUT = "loss/val/"
Measure = Callable[[], Mapping[str, float]]
"""Gives bytes in use by the name of the memory: main, card."""


class Recorder:
    """A receiver of events that keeps the report of one run. It begins with the first stage, when the output folder is known to be its own."""

    def __init__(self, output_dir: Path, warn: Callable[[str], None], measure: Measure, origins: Mapping[str, str]) -> None:
        """
        Args:
            warn: told once if the report cannot be written.
            measure: asked on the thread.
            origins: option key to where its value comes from.
        """
        now = time.time()
        self._output_dir, self._warn, self._measure = output_dir, warn, measure
        self._origins = {key: without_folders(origin) for key, origin in origins.items()}
        self._state = State(began=now, updated=now)
        self._earlier: State | None = None
        """Of the start before, until it is known whether this one goes on with it."""
        self._pictures = Pictures(output_dir)
        self._due: deque[Callable[[], None]] = deque()
        self._wake, self._is_closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._since, self._looked = now, False
        self._last_status: tuple[int, float] | None = None
        self._step_seconds: float | None = None
        self._state_at, self._page_at, self._measured_at = 0.0, 0.0, 0.0
        self._rests_until = 0.0
        self._has_failed = self._is_over = False
        self._crops: Callable[[], Sequence[CropShown]] | None = None

    def take(self, event: Event) -> None:
        """Take an event; nothing is done here, and nothing waited for."""
        self._due.append(lambda: self._learn(event))
        if self._thread is None and event.kind == STAGE:
            self._thread = threading.Thread(target=self._work, name="report", daemon=True)
            self._thread.start()
        elif event.kind != STATUS:
            self._wake.set()

    def heard(self, text: str) -> None:
        """Take a warning that was printed."""
        at = time.time()
        self._due.append(lambda: self._state.warn(at, without_folders(text)))

    def begin(self, facts: RunFacts, step: int) -> None:
        """Learn what the run is, once it is ready to train, and from which step it goes on."""
        at = time.time()
        self._due.append(lambda: self._begin(facts, step, at))
        self._wake.set()

    def move_later(self, step: int, aside: Path) -> None:
        """Put the report of a run that is not continued beside its checkpoints. A failure is no reason not to go on."""
        try:
            if (self._output_dir / STATE_FILE).is_file():
                (aside / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._output_dir / STATE_FILE, aside / STATE_FILE)
        except OSError as error:
            self._fail(error)

    def close(self, deadline: float) -> None:
        """Write the last page, until `time.monotonic()` has come so far at the latest."""
        self._is_closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self._is_over = True

    def _work(self) -> None:
        try:
            self._earlier = load(self._output_dir)
            while not self._is_closing.is_set():
                self._do_due()
                self._look_at_memory()
                self._renew(is_last=False)
                self._wake.wait(TICK_SECONDS)
                self._wake.clear()
            self._do_due()
            self._renew(is_last=True)
        except Exception as error:  # the run matters more
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not (self._has_failed or self._is_over):
            self._has_failed = True
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._warn(f"the report of the run cannot be renewed: {why}. The run goes on")

    def _do_due(self) -> None:
        while self._due:
            self._due.popleft()()
        if self._crops is not None:
            read, self._crops = self._crops, None
            try:
                self._state.crops = [asdict(one) for one in read()]
            except Exception:  # any backend's any failure: the page lacks a few pictures of the dataset
                self._state.crops = []

    def _learn(self, event: Event) -> None:
        state, fields, at = self._state, event.fields, event.time
        state.updated = max(state.updated, at)
        if event.kind == STATUS:
            self._step(fields["step"], at)
            state.figures(fields["step"], fields["figures"])
            state.total_steps = fields.get("total_steps") or state.total_steps
            return
        if event.kind == STAGE:
            self._stage(fields["stage"], at)
        elif event.kind == PICTURES and "sampling_step" not in fields:
            self._spend(at)  # more may follow that are of the same look
            self._looked = state.status == "running"
        elif event.kind == NOTE:
            self._note(event)
        elif event.kind == CHECKPOINT:
            state.checkpoints[fields["step"]] = fields["checkpoint"]
        elif event.kind in (ERROR, FAULT):
            self._spend(at)
            state.status, state.ended = "failed", event.message
        now = time.monotonic()
        self._page_at = min(self._page_at, max(now + SOON_SECONDS, self._rests_until))
        self._state_at = min(self._state_at, max(now, self._rests_until))

    def _step(self, step: int, at: float) -> None:
        """Count the time to a step's figures, which come while the next one is taken, as training; and how long a step takes."""
        state = self._state
        self._enter("training", at, "training")
        before, self._last_status = self._last_status, (step, at)
        if self._step_seconds is not None:
            state.curve("seconds").add(step - 1, self._step_seconds)
        # What comes before a look or a checkpoint is told at once, and not a step later: it is no measure, and nothing follows it.
        self._step_seconds = at - before[1] if before is not None and step == before[0] + 1 else None

    def _stage(self, key: str, at: float) -> None:
        if key == "training_complete":
            self._spend(at)
            self._state.status = "finished"
            return
        self._forget_pace()
        if phase := STAGES.get(key):
            self._enter(phase, at, "training" if self._looked else None)

    def _forget_pace(self) -> None:
        self._last_status = self._step_seconds = None

    def _note(self, event: Event) -> None:
        state, figures = self._state, event.fields.get("figures")
        if figures is None:
            self._spend(event.time)
            state.status, state.ended = "stopped", event.message
        elif any(name.startswith(HELD_OUT) for name in figures):
            phase, state.phase = state.phase, "held-out loss"
            self._enter(phase, event.time, None)
            self._forget_pace()
        elif "memory/ran_out" in figures:
            state.ran_out = figures["memory/ran_out"]
        elif state.phase == "validation":
            self._spend(event.time)  # scores of pictures

    def _spend(self, at: float) -> None:
        self._state.spend(self._state.phase, at - self._since)
        self._since = max(self._since, at)

    def _enter(self, phase: str, at: float, meanwhile: str | None) -> None:
        """Begin a phase.

        Args:
            meanwhile: what the time since the last event was, if not the phase until now.
        """
        if meanwhile is not None:
            self._state.phase = meanwhile
        self._spend(at)
        self._state.phase = phase
        self._looked = False
        if phase != "training":
            self._forget_pace()

    def _begin(self, facts: RunFacts, step: int, at: float) -> None:
        self._enter("training", at, None)
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            self._state.previous = dict(earlier.facts.get("settings") or {})
            if step:
                previous = self._state.previous
                self._state = joined(earlier, self._state)
                self._state.previous = previous
        state = self._state
        state.cut(step)
        told = {**asdict(replace(facts, crops=None)), "origins": self._origins}
        state.facts, state.total_steps, state.status = told, facts.total_steps, "running"
        self._crops = facts.crops

    def _look_at_memory(self) -> None:
        now = time.monotonic()
        if now - self._measured_at < MEMORY_SECONDS:
            return
        self._measured_at = now
        at = int(self._state.seconds + max(0.0, time.time() - self._since))
        for name, size in self._measure().items():
            self._state.memory.setdefault(name, Curve()).add(at, size)

    def _renew(self, *, is_last: bool) -> None:
        now = time.monotonic()
        if not is_last and now < min(self._state_at, self._page_at):
            return
        if self._state.status in ("starting", "running"):
            self._state.updated = time.time()
        state = self._state if self._earlier is None else joined(self._earlier, self._state)
        try:
            began = time.thread_time() - self._pictures.seconds
            save(self._output_dir, state)
            is_due = is_last or now >= self._page_at
            if is_due:
                write_page(self._output_dir, state, self._pictures)
            self._rests_until = now + (time.thread_time() - self._pictures.seconds - began) / SHARE
            self._state_at = max(now + STATE_SECONDS, self._rests_until)
            self._page_at = max(now + PAGE_SECONDS, self._rests_until) if is_due else max(self._page_at, self._rests_until)
        except Exception as error:  # a full disk, a picture that cannot be read
            self._state_at = self._page_at = now + PAGE_SECONDS
            self._fail(error)
