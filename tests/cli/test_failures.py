"""What a failure says, and its exit code."""

from __future__ import annotations

import errno

import pytest

from simpletuner.cli.failures import report, understand
from simpletuner.errors import ConfigError, DatasetError, MemoryLimitError, Stopped


class OutOfMemoryError(RuntimeError):
    """By this name torch raises it."""


def raised(error, cause=None):
    """Give an error a traceback, as it has when it is caught."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (DatasetError("a"), 3),
        (MemoryLimitError("a"), 4),
        (Stopped("a", exit_code=143), 143),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 4),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 4),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, "No space left on device", "cache/a.safetensors"), 4),
        (OSError(errno.EFBIG, "File too large"), 4),
        (Exception("I/O error: No space left on device (os error 28)"), 4),
        (KeyboardInterrupt(), 130),
        (KeyError("x"), 1),
        (OSError(errno.EACCES, "Permission denied", "a"), 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_each_failure_has_its_exit_code_and_shows_no_traceback(error, code, capsys):
    assert report(raised(error), debug=False) == code

    shown = capsys.readouterr().err
    assert shown
    assert "Traceback" not in shown


def test_a_full_disk_is_found_behind_another_error_and_named_with_its_path():
    full = OSError(errno.ENOSPC, "No space left on device", "cache/a.safetensors")

    known = understand(raised(RuntimeError("cannot write"), full))

    assert isinstance(known, MemoryLimitError)
    assert "cache/a.safetensors" in known.message


def test_what_was_not_foreseen_is_named_with_its_place_and_asks_for_debug():
    known = understand(raised(KeyError("x")))

    assert "KeyError" in known.message
    assert "test_failures.py" in known.message
    assert "--debug" in str(known.hint)


def test_debug_adds_the_traceback(capsys):
    report(raised(ConfigError("a sentence", hint="do this")), debug=True)

    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "do this" in shown


def test_under_another_launcher_the_first_process_says_what_every_one_finds(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    assert report(raised(ConfigError("a")), debug=False) == 2
    assert capsys.readouterr().err == ""
    assert report(raised(DatasetError("one's own")), debug=False) == 3
    assert "one's own" in capsys.readouterr().err
    assert report(raised(OutOfMemoryError("CUDA out of memory")), debug=False) == 4
    assert "out of memory" in capsys.readouterr().err
