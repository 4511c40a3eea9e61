"""Times ways to compute the same before a run begins, within a budget, and keeps what was found on disk for the next start."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

ROUNDS = 3
"""In turns, so that what slows the machine down for a while slows all ways alike; of each way the fastest round counts."""
SHORT_SECONDS = 0.002
"""Passes of less are repeated within a round: one alone would wait for the device to wake up."""
MOST_REPEATS = 20
LONG_SECONDS = 0.01
"""A pass of so long is measured as well as a longer one."""
LEAST_ROWS = 64
Work = Callable[[], object]


class Stopwatch:
    """Measures until its budget is spent. What is under way then is brought to its end, a round at most."""

    def __init__(self, device: torch.device, budget_seconds: float) -> None:
        self.device = device
        self._end = time.monotonic() + budget_seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def compare(self, ways: Mapping[str, Work]) -> dict[str, float]:
        """Seconds that each way takes."""
        best = {name: self._seconds(work) for name, work in ways.items()}
        repeats = {name: min(MOST_REPEATS, math.ceil(SHORT_SECONDS / seconds)) for name, seconds in best.items()}
        for _ in range(ROUNDS):
            if self.is_over and max(best.values()) >= SHORT_SECONDS:  # of less than that the first pass says nothing
                break
            for name, work in ways.items():
                best[name] = min(best[name], self._seconds(work, repeats[name]))
        return best

    def rows(self, make: Callable[[int], Work], most: int) -> int:
        """How many rows to measure with: `most`, or fewer where a pass is long enough with these.

        Args:
            make: gives the work with so many rows.
        """
        count = min(LEAST_ROWS, most)
        while count < most:
            work = make(count)
            first = self._seconds(work)  # kernels are looked up meanwhile
            if first >= 10 * LONG_SECONDS or self._seconds(work) >= LONG_SECONDS or self.is_over:
                break
            count = min(2 * count, most)
        return count

    def _seconds(self, work: Work, repeats: int = 1) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self._wait()
        return max(time.perf_counter() - began, 1e-9) / repeats

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class TimingBook:
    """A file of what was measured on one machine. A damaged one counts as empty, and one that cannot be written does no harm."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            folder: gets a file for each device, release of PyTorch, dtype and number of threads.
        """
        facts = (device_name(device), f"torch {torch.__version__}", str(dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads")
        self._file = folder / (re.sub(r"[^\w.+-]+", "-", "-".join(facts)) + ".json")
        self.rows: dict[str, dict[str, float] | None] = _read(self._file)
        """What was timed, in words, to what each way takes; None where the time was up, which is not tried again: a run that starts anew is to
        do as it did before."""

    def save(self) -> None:
        """Write the file anew; another run's that was written meanwhile is replaced."""
        staged = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        try:
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            os.replace(staged, self._file)
        except OSError:
            with suppress(OSError):
                staged.unlink(missing_ok=True)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, dict[str, float] | None]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): None if row is None else {str(way): float(seconds) for way, seconds in row.items()} for name, row in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
