"""Answers so far, kept in a file after each question, so that neither Ctrl-C nor a lost connection loses them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError

NAME = ".configure-draft.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Draft:
    """What was answered, and where it stopped."""

    answers: Mapping[str, Any]
    step: str
    when: str = ""


def keep(folder: Path, draft: Draft) -> None:
    """Keep a draft; the one before it is there until this one is whole.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path, content = folder / NAME, {"version": VERSION, "step": draft.step, "answers": dict(draft.answers), "when": time.strftime("%Y-%m-%d %H:%M")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Choose a folder that this user may write to.") from error


def take_up(folder: Path) -> Draft | None:
    """The draft that is there; None without one, or if it cannot be used."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if content["version"] != VERSION or not isinstance(content["answers"], dict):
            return None
        return Draft(content["answers"], str(content["step"]), str(content["when"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def drop(folder: Path) -> None:
    """Remove the draft, and its folder if nothing else is in it."""
    (folder / NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds other things, or was never made
        folder.rmdir()
