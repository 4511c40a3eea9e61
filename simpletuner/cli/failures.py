"""What a failure says and which exit code it has."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path

from simpletuner.errors import ConfigError, MemoryLimitError, SimpleTunerError, Stopped

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
"""How libraries that are not Python's own report the same."""
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")
SHORT_OF_MEMORY = "Lower train_batch_size or resolution, turn gradient_checkpointing on, or set base_model_precision to int8-quanto."
INTERRUPTED, PIPE_CLOSED = 130, 1
FAILURES_VARIABLE = "SIMPLETUNER_FAILURES"
"""Names the folder in which a launcher collects what its processes have to say at their end."""


def report(error: BaseException, *, debug: bool) -> int:
    """Print what went wrong and what to do, and give the exit code."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit does not fail once more
        return PIPE_CLOSED
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    known = understand(error)
    folder, rank = os.environ.get(FAILURES_VARIABLE), os.environ.get("RANK", "0")
    if folder:
        _leave(known, Path(folder) / f"{rank}.json")
    elif rank == "0" or not isinstance(known, ConfigError):  # a wrong setting is found by every process
        say(known)
    return known.exit_code


def collect(folder: Path, exit_code: int) -> list[SimpleTunerError]:
    """What the processes of a run left about this exit code, each thing once, in the order of their ranks."""
    found: dict[tuple[str, str | None], SimpleTunerError] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        left = json.loads(path.read_text(encoding="utf-8"))
        if left["exit_code"] == exit_code:
            kind = Stopped(left["message"], left["hint"], exit_code=exit_code) if left["stopped"] else SimpleTunerError(left["message"], left["hint"])
            found.setdefault((kind.message, kind.hint), kind)
    return list(found.values())


def _leave(error: SimpleTunerError, path: Path) -> None:
    """Put a failure where the launcher looks, so that it is said once however many processes found it."""
    left = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint, "stopped": isinstance(error, Stopped)}
    staged = path.with_suffix(".tmp")  # the launcher may end this process at any moment
    try:
        staged.write_text(json.dumps(left), encoding="utf-8")
        staged.replace(path)
    except OSError:  # the launcher is gone, or its disk is full
        say(error)


def understand(error: BaseException) -> SimpleTunerError:
    """Put any failure into words of ours; out of memory and disk full have an exit code of their own."""
    if isinstance(error, SimpleTunerError):
        return error
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return _disk_full(cause.filename)
    if any(text in str(cause) for cause in chain for text in FULL_TEXTS):
        return _disk_full(None)
    for cause in chain:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return MemoryLimitError(f"out of memory: {_one_line(cause)}", hint=SHORT_OF_MEMORY)
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in MEMORY_TEXTS):
            return MemoryLimitError(f"out of memory: {_one_line(cause)}", hint=SHORT_OF_MEMORY)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return SimpleTunerError(
        f"unexpected {type(error).__name__}: {_one_line(error)}{where}",
        hint="This is a fault of ours or of a library's. Run again with --debug for the traceback, and please report it.",
    )


def _disk_full(path: object) -> MemoryLimitError:
    place = f" while writing {path}" if path else ""
    return MemoryLimitError(
        f"disk full: no space left{place}", hint="Make room; what was written before is kept, and the same command goes on from there."
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no further word"


def say(error: SimpleTunerError) -> None:
    """Print an error, or a stop, with its hint."""
    from simpletuner.console import Console

    console = Console(stream=sys.stderr)
    if isinstance(error, Stopped):
        console.stopped(error.message, error.hint)
    else:
        console.error(error.message, error.hint)
