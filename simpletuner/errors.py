"""Every error raised on purpose, each with a hint.

    SimpleTunerError            1   anything else
    ├── ConfigError             2   a setting, or a file of settings
    ├── DatasetError            3   images, captions, caches of them
    ├── MemoryLimitError        4   the accelerator, RAM or disk is too small
    └── Stopped             130/143 a signal ended the run; the same command resumes it

The number is the process's exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SimpleTunerError(Exception):
    """Something a user can cause and mend: what is wrong, and in `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class ConfigError(SimpleTunerError):
    """A setting, or a file of settings, cannot be used."""

    exit_code = 2


class DatasetError(SimpleTunerError):
    """Images, captions or their caches cannot be used."""

    exit_code = 3


class MemoryLimitError(SimpleTunerError):
    """The accelerator's memory, the RAM or the disk is too small for what was asked."""

    exit_code = 4


class Stopped(SimpleTunerError):
    """A signal ended the run after a verified checkpoint; the same command continues it."""

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the known spelling closest to `name`, or None if nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def choose(name: str, known: Iterable[str], what: str) -> str:
    """Say that `name` is no known `what`, offer the nearest right one, and list the rest."""
    names = sorted(known)
    best = nearest(name, names)
    meant = f"did you mean {best!r}? " if best else ""
    return f"{meant}Known {what}: {', '.join(names) or 'none'}."
