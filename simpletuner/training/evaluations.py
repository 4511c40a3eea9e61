"""What evaluations found, by step: written down, so that the best checkpoint is known, and a run that gets no better can end."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from accelerate import Accelerator

from simpletuner.options.validation import Validation
from simpletuner.training.sharing import of_first

FILE, BEST_FILE = "evaluation.jsonl", "best_checkpoint.json"
FOLDER = "checkpoint-"
HELD_OUT, CLIP = "loss/val/", "clip/mean"
WORDS = {"loss": "held-out loss", "clip": "CLIP score"}


class Book:
    """The figures of a run's evaluations in a file, a line a step."""

    def __init__(self, output_dir: Path) -> None:
        self._file = output_dir / FILE

    def rows(self) -> list[dict[str, float]]:
        """What was found so far, by steps; a last line that a power failure cut short is left out."""
        rows = []
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Write down figures of a step, beside others that it has; what is not finite is none.

        Raises:
            OSError: the disk is full.
        """
        rows = {row["step"]: row for row in self.rows()}
        rows[step] = {**rows.get(step, {}), "step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
        self._write(self._file, [rows[step] for step in sorted(rows)])

    def drop_later(self, step: int) -> None:
        """Forget what was found after `step`, which a run that goes on from there finds anew."""
        rows = self.rows()
        if any(row["step"] > step for row in rows):
            self._write(self._file, [row for row in rows if row["step"] <= step])

    def move_later(self, step: int, aside: Path) -> None:
        """Put what was found after `step` beside checkpoints that are not continued."""
        rows = self.rows()
        later = [row for row in rows if row["step"] > step]
        if later:
            self._write(self._file, [row for row in rows if row["step"] <= step])
            self._write(aside / FILE, later)

    def values(self, metric: str) -> dict[int, float]:
        """The losses (`loss`, the mean over datasets) or scores (`clip`, made negative) by step: the less the better."""
        found = {}
        for row in self.rows():
            finite = {name: value for name, value in row.items() if math.isfinite(value)}
            losses = [value for name, value in finite.items() if name.startswith(HELD_OUT) and "/" not in name.removeprefix(HELD_OUT)]
            if metric == "loss" and losses:
                found[int(row["step"])] = fmean(losses)
            elif metric == "clip" and CLIP in finite:
                found[int(row["step"])] = -row[CLIP]
        return found

    @staticmethod
    def _write(file: Path, rows: Sequence[Mapping[str, float]]) -> None:
        staged = file.with_suffix(".tmp")
        staged.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        staged.replace(file)


def best_of(book: Book, metric: str, steps: Collection[int]) -> int | None:
    """The best one of these steps; None if none of them was evaluated."""
    found = {step: value for step, value in book.values(metric).items() if step in steps}
    return min(found, key=lambda step: (found[step], step)) if found else None


class Progress:
    """Whether a run gets better by its evaluations: which checkpoint is the best, and whether it may end."""

    def __init__(self, output_dir: Path, options: Validation, accelerator: Accelerator, warn: Callable[[str], object]) -> None:
        self._output_dir, self._book, self._accelerator, self._warn = output_dir, Book(output_dir), accelerator, warn
        self._metric, self._patience = options.best_checkpoint, options.early_stop_patience

    def best_of(self, steps: Collection[int]) -> int | None:
        """The best one of these steps; None if none of them was evaluated."""
        return best_of(self._book, self._metric, steps)

    def note(self) -> str:
        """Write down which checkpoint that is there is the best one, and say it in a line; empty if none is known to be. Only the first
        process does."""
        numbers = (folder.name.removeprefix(FOLDER) for folder in self._output_dir.glob(f"{FOLDER}*"))
        steps = [int(number) for number in numbers if number.isdecimal()]
        best = self.best_of(steps) if self._accelerator.is_main_process else None
        file = self._output_dir / BEST_FILE
        try:
            if best is None:
                file.unlink(missing_ok=True)
                return ""
            values, what = self._book.values(self._metric), WORDS[self._metric]
            value, last = abs(values[best]), max(values)
            content = {"step": best, "checkpoint": f"{FOLDER}{best}", "metric": what, "value": value}
            staged = file.with_suffix(f".{threading.get_ident()}.tmp")  # written after checkpoints too, by the thread that writes these
            staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            staged.replace(file)
        except OSError as error:
            self._warn(f"{BEST_FILE} cannot be written: {error}")
            return ""
        beside = "" if last == best else f"; it was {abs(values[last]):.4f} at step {last}"
        return f"best {what} {value:.4f} at step {best}: {FOLDER}{best}{beside}"

    def is_over(self) -> bool:
        """Whether evaluations have long not become better. All processes ask it."""
        if not self._patience:
            return False
        values = self._book.values(self._metric) if self._accelerator.is_main_process else {}
        steps = sorted(step for step in values if step)  # what the base gives is no measure of training
        best = min(steps, key=lambda step: (values[step], step), default=0)
        return of_first(self._accelerator, sum(step > best for step in steps) >= self._patience)
