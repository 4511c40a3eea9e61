"""The memory plan of what was answered, made by `simpletuner plan` in a process of its own: it can be left, and nobody waits for its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.cli.wizard.machine import GIGABYTE

NO_FIT = "DOES NOT FIT"
"""What a line about a plan begins with, if the card is too small for it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan said."""

    peak_bytes: int
    """On the card, with what CUDA itself takes."""
    ram_bytes: int
    phase: str
    """The one that takes most."""
    fits: bool
    changes: tuple[Mapping[str, Any], ...] = ()
    """Options to change, as `simpletuner plan --fit` writes them."""

    def described(self, card_bytes: int) -> str:
        """The plan in a line."""
        verdict = "fits" if self.peak_bytes <= card_bytes else NO_FIT
        peak = f"{self.peak_bytes / GIGABYTE:.1f} of {card_bytes / GIGABYTE:.1f} GB of the card ({self.phase})"
        return f"{verdict}: {peak}, {self.ram_bytes / GIGABYTE:.1f} GB of main memory"

    @property
    def settings(self) -> dict[str, Any]:
        """All options to change."""
        return {key: value for change in self.changes for key, value in change["settings"].items()}


class Forecast:
    """A plan that is being made."""

    def __init__(self, files: Mapping[str, str], arguments: Sequence[str]) -> None:
        """
        Args:
            files: names to texts of config.json and what goes with it; `{folder}` in them is where they will lie.
            arguments: of the command.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="simpletuner-plan-")
        folder = Path(self._folder.name)
        for name, text in files.items():
            (folder / name).write_text(text.replace("{folder}", folder.as_posix()), encoding="utf-8")
        line = [sys.executable, "-m", "simpletuner", "plan", "--config", str(folder / "config.json"), "--json", *arguments]
        self._process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
        self._said: tuple[bytes, bytes] | None = None

    @property
    def is_done(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome | str:
        """What it said, or why there is none."""
        if self._said is None:
            self._said = self._process.communicate()
            self._folder.cleanup()
        out, errors = (text.decode("utf-8", "replace") for text in self._said)
        return read(out, errors)

    def stop(self) -> None:
        if not self.is_done:
            self._process.kill()
        self.outcome()


def read(out: str, errors: str) -> Outcome | str:
    """Read what `simpletuner plan --json` printed."""
    try:
        said = json.loads(out)
        largest = max(said["phases"], key=lambda phase: phase["vram_bytes"])
        fit = said.get("fit", {})
        card = said["peak_vram_bytes"] + said["cuda_bytes"]
        return Outcome(card, said["peak_ram_bytes"], largest["name"], fit.get("fits", True), tuple(fit.get("changes", ())))
    except (json.JSONDecodeError, KeyError, ValueError):
        lines = [line for line in errors.strip().splitlines() if "error:" in line] or errors.strip().splitlines()
        return lines[-1].strip() if lines else "no plan was made"
