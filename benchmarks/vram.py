"""Memory of real runs against the goals and against `simpletuner plan`: each in a process of its own, with no more of the card than its goal.

    python benchmarks/vram.py [--size real|medium|tiny] [--only auraflow] [--steps 3]

Random weights, made on the device layer by layer; text encoders and VAE are small ones, so that what is measured is the denoiser: how it is
loaded, and its steps. A step that ran out of memory and was mended does not count as having fit. On a CPU there is main memory alone,
and it goes through the motions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.book import RESULTS, Book
from benchmarks.cases import PIXELS, SIZES
from benchmarks.harness import device_name, device_named, host_peak_bytes, machine, pinned_bytes
from benchmarks.product import Bases, Job, config_of, put_together, write_data
from benchmarks.speed import LEAST_SECONDS, TIME_IS_UP
from simpletuner.errors import SimpleTunerError
from simpletuner.training.plan import CUDA_BYTES, plan_run
from simpletuner.types import Size

GB = 1e9
GOALS: Mapping[str, tuple[float, float | None]] = {"auraflow": (8 * GB, 12 * GB), "flux": (10 * GB, None), "sdxl": (5 * GB, None)}
"""Bytes of the card, and of main memory where that is limited too."""
HALF = {"auraflow": 18, "flux": 40, "sdxl": 35}
"""Blocks that wait: half of them, of Flux two thirds."""


@dataclass(frozen=True)
class Fit:
    """A run that is to fit a goal."""

    model: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_limited: bool = True
    """Whether it gets no more of the card than the goal; a run to compare with gets all of it."""

    def name(self, size: str) -> str:
        extra = "".join(f", {key} {value}" for key, value in self.options.items())
        return f"memory of {self.model} {size}, {self.precision}{extra}"


def fits() -> list[Fit]:
    """What is tried, for each model the likeliest to be taken first."""
    found = []
    for model in GOALS:
        half = {"blocks_to_swap": HALF[model]}
        found += [Fit(model, "int8-quanto", {} if model == "sdxl" else half), Fit(model, "nf4-bnb"), Fit(model, "fp8wo-torchao", half)]
        found += [Fit(model, "no_change", {"enable_group_offload": True}), Fit(model, "no_change", is_limited=False)]
    by_rank = [found[number :: len(found) // len(GOALS)] for number in range(len(found) // len(GOALS))]
    return [fit for same_rank in by_rank for fit in same_rank]


def options_of(fit: Fit, size: str) -> dict[str, Any]:
    """The options, with as many blocks as a small model has."""
    asked = dict(fit.options)
    if "blocks_to_swap" in asked and size != "real":
        asked["blocks_to_swap"] = 1
    return {"base_model_precision": fit.precision, "gradient_checkpointing": True, **asked}


@contextmanager
def watched_host() -> Iterator[list[int]]:
    """Give, in a list, how much less main memory the whole system had free at the least; page-locked memory is seen here, too."""
    found, ends = [0], threading.Event()

    def available() -> int:
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)

    before = available()

    def watch() -> None:
        while not ends.wait(0.05):
            found[0] = max(found[0], before - available())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


def measure(fit: Fit, size: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Plan a run, and take it: bytes of both, by phases."""
    px = PIXELS[size][0]
    job, is_cuda = Job(fit.model, size, (Size(px, px),)), device.type == "cuda"
    with tempfile.TemporaryDirectory() as name, watched_host() as host:
        folder = Path(name).resolve()
        write_data(folder, job)
        options = options_of(fit, size)
        plan = plan_run(config_of(folder, job, "lokr", options), job.pictures[0], job.batch, "cuda" if is_cuda else "cpu")
        others = _limit(fit, device) if is_cuda else 0
        ours = put_together(folder, job, "lokr", options, Bases(job))
        load = _peak(device)
        ours.step()  # the first one finds out kernels, and makes the optimizer's state
        seconds = []
        for _ in range(steps):
            _synchronise(device)
            began = time.perf_counter()
            ours.step()
            _synchronise(device)
            seconds.append(time.perf_counter() - began)
        step, events = _peak(device), ours.run.trainer.recovery.events
        ours.close()
    phases = {phase.name: {"vram_bytes": phase.vram_bytes, "ram_bytes": phase.ram_bytes} for phase in plan.phases}
    measured = {"load": load, "step": step, "other_bytes": others, "host_bytes": host_peak_bytes(), "pinned_bytes": pinned_bytes()}
    return {"planned": phases, "measured": {**measured, "system_bytes": host[0]}, "seconds": statistics.median(seconds), "ran_out": events}


def _limit(fit: Fit, device: torch.device) -> int:
    """Allow torch no more than the goal leaves beside CUDA itself; gives what CUDA takes, as far as it shows yet."""
    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device))  # has cuBLAS begin
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    if fit.is_limited:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (GOALS[fit.model][0] - CUDA_BYTES) / total), device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(others)


def _peak(device: torch.device) -> dict[str, int]:
    """What torch gave out at the most, and what it had taken of the card for that; forgets both."""
    if device.type != "cuda":
        return {"allocated": 0, "reserved": 0}
    _synchronise(device)
    found = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judged(fit: Fit, size: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same, with whether the goal is met and how far off the plan is."""
    card, main = GOALS[fit.model]
    measured = found["measured"]
    taken = max(measured["load"]["reserved"], measured["step"]["reserved"])
    host = max(
        measured[one] for one in ("host_bytes", "pinned_bytes", "system_bytes")
    )  # which of them shows page-locked memory depends on the system
    fits = 0 < taken + max(CUDA_BYTES, measured["other_bytes"]) <= card and found["ran_out"] == 0 and (main is None or host <= main)
    planned = found["planned"]["step"]["vram_bytes"]
    off = planned / measured["step"]["allocated"] - 1 if measured["step"]["allocated"] else None
    return {
        **found,
        "goal": {"card_bytes": card, "main_bytes": main},
        "is_met": fits if size == "real" and fit.is_limited else None,
        "plan_is_off_by": off,
    }


def attempt(fit: Fit, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own; its figures, or why there are none."""
    number = fits().index(fit)
    line = [sys.executable, __file__, "--device", arguments.device, "--size", arguments.size, "--steps", str(arguments.steps), "--fit", str(number)]
    answer = subprocess.run(line, capture_output=True, text=True)
    lines = answer.stdout.splitlines()
    if answer.returncode == 0 and lines:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    return {"left_out": (answer.stderr.strip().splitlines() or [f"the process ended with {answer.returncode}"])[-1][:300]}


def run(chosen: list[Fit], arguments: argparse.Namespace) -> int:
    device = device_named(arguments.device)
    name, described = device_name(device), machine(device)
    book, longest = Book.of(arguments.results, name), LEAST_SECONDS if device.type == "cuda" else 0.0
    for fit in chosen:
        case = fit.name(arguments.size)
        if book.is_done(case):
            continue
        if arguments.until and time.time() + longest > arguments.until:
            print("time is up; the same command goes on from here", file=sys.stderr)
            return TIME_IS_UP
        if not book.begin(case):
            continue
        began = time.monotonic()
        result = attempt(fit, arguments)
        longest = max(longest, time.monotonic() - began)
        book.write(case, {"kind": "memory", "model": fit.model, "size": arguments.size, **result}, described)
        print(f"{case}: {in_a_line(result)}", file=sys.stderr, flush=True)
    return 0


def in_a_line(result: dict[str, Any]) -> str:
    if "left_out" in result:
        return f"left out: {result['left_out']}"
    step, planned = result["measured"]["step"], result["planned"]["step"]["vram_bytes"]
    met = {None: "", True: "; the goal is met", False: "; the goal is missed"}[result["is_met"]]
    return (
        f"step {step['allocated'] / GB:.2f} GB ({step['reserved'] / GB:.2f} taken, {planned / GB:.2f} planned), {result['seconds'] * 1e3:.0f} ms{met}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs with all of these words in their names")
    parser.add_argument("--first", type=int, help="so many runs at most")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured, after one that is not")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--until", type=float, help="begin no run that would not be done by then, in seconds since 1970")
    parser.add_argument("--fit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fit is not None:
        fit = fits()[arguments.fit]
        try:
            print(json.dumps(judged(fit, arguments.size, measure(fit, arguments.size, device_named(arguments.device), arguments.steps))))
        except SimpleTunerError as error:
            print(error.message, file=sys.stderr)
            return 1
        return 0
    return run([fit for fit in fits() if all(word in fit.name(arguments.size) for word in arguments.only)][: arguments.first], arguments)


if __name__ == "__main__":
    sys.exit(main())
