"""Who is told of a run: trackers of its figures, webhooks of what it is doing; and, however it ends, of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from simpletuner.console import Console
from simpletuner.errors import Stopped
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.events import NOTE, Events
from simpletuner.reporting.report.recorder import Recorder
from simpletuner.reporting.tracker import Trackers, kinds_of, start_trackers
from simpletuner.reporting.webhooks import Hook
from simpletuner.training.evaluations import Progress
from simpletuner.training.report_facts import memory_in_use
from simpletuner.training.run_folder import without_paths
from simpletuner.training.signals import StopRequest

CLOSE_SECONDS = 5.0
"""How long the end of a run waits for webhooks, all of them together."""
FAULTS = ("AcceleratorError", "OutOfMemoryError")
FAULT_TEXTS = ("CUDA error", "HIP error", "NCCL error")


@contextmanager
def telling(config: TrainConfig, console: Console, stop: StopRequest, origins: Mapping[str, str] | None = None) -> Iterator[Events]:
    """Tell webhooks and the report of the run in the body, and at last how it ended; that takes `CLOSE_SECONDS` at most.

    Args:
        origins: option key to where its value comes from, for the report.

    Raises:
        ConfigError: the user's own tracker cannot be used, which is best known before anything is loaded.
    """
    options = config.reporting
    kinds = kinds_of(options.report_to, options.custom_tracker)
    hooks = [Hook(one, options.tracker_run_name, options.webhook_reporting_interval, console.warn) for one in options.webhooks()]
    report = Recorder(config.training.output_dir, console.warn, memory_in_use, origins or {}) if options.run_report and console.is_main else None
    console.on_warning = report.heard if report else None
    events = Events(hooks if console.is_main else (), report, kinds)
    try:
        yield events
    except BaseException as error:
        if isinstance(error, Stopped):
            events.emit(NOTE, error.message, level="warning")
        else:
            events.failed(error, getattr(error, "exit_code", 1), is_fault=is_fault(error))
        raise
    finally:
        with stop.deferred():
            events.close(CLOSE_SECONDS)
        console.on_warning = None


def is_fault(error: BaseException) -> bool:
    """Whether an error comes of the accelerator, or of its memory."""
    at: BaseException | None = error
    seen: list[BaseException] = []
    while at is not None and at not in seen:
        if type(at).__name__ in FAULTS or any(text in str(at) for text in FAULT_TEXTS):
            return True
        seen.append(at)
        at = at.__cause__ or at.__context__
    return False


def begin_trackers(config: TrainConfig, output_dir: Path, console: Console, events: Events, total_steps: int) -> Trackers:
    """Start the trackers, on the first process alone. They get no secrets, and no absolute paths."""
    options = config.reporting
    events.expect(total_steps)
    kinds = kinds_of(options.report_to, options.custom_tracker) if events.kinds is None else events.kinds
    names = (options.tracker_project_name, options.tracker_run_name)
    return start_trackers(
        kinds if console.is_main else {}, output_dir / options.logging_dir, *names, without_paths(config.flat()), console.warn, events
    )


def when_saved(events: Events, progress: Progress, then: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """What is done with each checkpoint that is on disk."""

    def saved(folder: Path) -> None:
        events.saved(int(folder.name.rpartition("-")[2]), folder.name)
        progress.note()
        if then is not None:
            then(folder)

    return saved
