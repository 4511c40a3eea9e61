"""The contract of a tracker, and how several are used at once without ever stopping a run, or holding it up."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import plugins
from simpletuner.errors import Stopped
from simpletuner.options.reporting import CUSTOM
from simpletuner.reporting.custom import load_custom
from simpletuner.reporting.events import Events

if TYPE_CHECKING:
    from PIL.Image import Image


TRACKERS = "simpletuner.reporting.trackers"
HELD = 1000
"""Figures of steps that wait for a slow tracker, at most."""
FLUSH_SECONDS = 5.0
"""How long a checkpoint waits for its trackers; one that a scheduler asks for has hardly longer for all of it."""
CLOSE_SECONDS = 30.0
"""How long a run waits for them at its end."""


class Tracker(ABC):
    """One place where figures and pictures of a run go. Made on the main process only, when the loop begins, and used from one thread."""

    def __init__(self, folder: Path, project: str, run: str, config: Mapping[str, Any]) -> None:
        """
        Args:
            folder: where the tracker may write, the run's logging directory.
            project, run: names for services that group runs.
            config: the effective options by key, without secrets and absolute paths.
        """
        self.folder, self.project, self.run, self.config = folder, project, run, config

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take figures of one optimizer step; they may come in several calls. A resumed run may begin at an earlier step."""

    @abstractmethod
    def images(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str]) -> None:
        """Take pictures by name; those that were made by a prompt have it as their caption."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still held; perhaps there was nothing."""


class Trackers:
    """Several trackers as one, each behind a thread of its own. A tracker that fails is named once and dropped; the run goes on."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None], events: Events | None = None) -> None:
        """
        Args:
            events: told of the same figures and pictures; outlives the trackers.
        """
        self.events = events or Events()
        self._behind = [_Behind(tracker, warn) for tracker in trackers]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the figures of a step. Waits for nobody."""
        for one in self._behind:
            one.put(partial(one.tracker.log, step, dict(values)))
        self.events.figures(step, values)

    def images(self, step: int, images: Mapping[str, Image], captions: Mapping[str, str] | None = None) -> None:
        """Hand on pictures by name, which must not be changed any more, and their prompts. Waits for nobody."""
        for one in self._behind:
            one.put(partial(one.tracker.images, step, dict(images), dict(captions or {})))
        self.events.pictures(step, images, captions or {})

    def flush(self) -> None:
        """Wait until all trackers have taken what they were handed, or for as long as a checkpoint may."""
        deadline = time.monotonic() + FLUSH_SECONDS
        for one in self._behind:
            one.wait(deadline)

    def close(self) -> None:
        """Let all trackers write out what they hold, and end. There is nothing left to close a second time."""
        deadline = time.monotonic() + CLOSE_SECONDS
        behind, self._behind = self._behind, []
        for one in behind:
            one.end(deadline)


class _Behind:
    """A tracker with a queue before it, and a thread between them, so that a slow disk or network never holds up a step."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self.tracker, self._warn = tracker, warn
        self._waiting: queue.SimpleQueue[Callable[[], None] | threading.Event | None] = queue.SimpleQueue()
        self._has_failed = False
        self._left_out = 0
        self._awaited = threading.Event()
        """Set once all is done that somebody waited for in vain."""
        self._awaited.set()
        self._thread: threading.Thread | None = None

    @property
    def _name(self) -> str:
        return type(self.tracker).__module__.rsplit(".", 1)[-1]

    def put(self, call: Callable[[], None]) -> None:
        """Have something done behind the run; it is left out if too much waits already."""
        if self._has_failed:
            return
        if self._thread is None:
            self._start()
        if self._waiting.qsize() < HELD:
            self._waiting.put(call)
            return
        self._left_out += 1
        if self._left_out == 1:
            self._warn(f"tracker {self._name!r} is too slow: figures are left out")

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"tracker-{self._name}", daemon=True)  # one that hangs keeps no run from ending
        self._thread.start()

    def wait(self, deadline: float) -> None:
        """Wait until everything is done, or `time.monotonic()` has come so far. While one wait was in vain, no other is begun."""
        if self._thread is None or not self._awaited.is_set():
            return
        self._awaited = threading.Event()
        self._waiting.put(self._awaited)
        if not self._awaited.wait(max(0.0, deadline - time.monotonic())):
            self._warn(f"tracker {self._name!r} does not answer: figures may be missing")

    def end(self, deadline: float) -> None:
        """Close the tracker, however much waits before it, and wait for that."""
        if self._thread is None:
            self._start()
        self._waiting.put(self.tracker.close)
        self._awaited.set()
        self.wait(deadline)
        self._waiting.put(None)
        self._thread = None
        if self._left_out:
            self._warn(f"tracker {self._name!r} lacks {self._left_out:,} of its figures: it was too slow")

    def _work(self) -> None:
        while (due := self._waiting.get()) is not None:
            if isinstance(due, threading.Event):
                due.set()
            elif not self._has_failed:
                self._do(due)

    def _do(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # any library's any failure: figures are worth less than the run
            self._has_failed = True
            self._warn(f"tracker {self._name!r} failed and is off for the rest of the run: {error}")


def kinds_of(report_to: str, custom: Path | None) -> dict[str, type[Tracker]]:
    """The trackers that `report_to` names: a comma list, `none`, or `all`.

    Args:
        custom: the file of the user's own tracker.

    Raises:
        ConfigError: a name is no tracker's, or the user's own cannot be used.
    """
    asked = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    if "all" in asked:
        asked = [*plugins.names(TRACKERS), *([CUSTOM] if custom is not None else [])]

    def kind(name: str) -> type[Tracker]:
        if name == CUSTOM and custom is not None:
            return load_custom(custom, Tracker)  # type: ignore[type-abstract]
        return plugins.load(TRACKERS, name, Tracker)  # type: ignore[type-abstract]

    return {name: kind(name) for name in asked}


def start_trackers(
    kinds: Mapping[str, type[Tracker]],
    folder: Path,
    project: str,
    run: str,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
    events: Events | None = None,
) -> Trackers:
    """Make trackers. One that cannot start is named and left out."""
    started = []
    for name, kind in kinds.items():
        try:
            started.append(kind(folder, project, run, config))
        except Stopped:
            raise
        except Exception as error:  # a missing package, no network, a full disk: the run matters more
            warn(f"tracker {name!r} did not start and is off for this run: {error}")
    return Trackers(started, warn, events)
