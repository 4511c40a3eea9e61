"""Measure several ways of doing the same thing, in turns, in one process; and keep what came out.

In each round every contender takes the same number of steps, in an order that is turned around from round to round. The first round is thrown
away. On a GPU steps are timed by events, and the host waits for the device at the ends of a turn alone.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """One way of doing it."""

    name: str
    step: Callable[[], object]
    """Takes one step; on a GPU it may return before the device is done."""


@dataclass
class Turns:
    """What one contender took."""

    rounds: list[list[float]] = field(default_factory=list)
    """Seconds of each step, by rounds."""
    wall: list[float] = field(default_factory=list)
    """Seconds of each turn, as the host saw it, waiting for the device included."""
    peak_bytes: int = 0
    """The most that torch had given out on the GPU, everything included; 0 on a CPU."""
    reserved_bytes: int = 0
    work_bytes: int = 0
    """The most of it that was not there yet when a turn began."""

    @property
    def medians(self) -> list[float]:
        return [statistics.median(steps) for steps in self.rounds]


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int, device: torch.device) -> dict[str, Turns]:
    """Have all contenders take `steps` steps in each of `rounds` rounds, after one that does not count."""
    found = {contender.name: Turns() for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            turns = Turns() if number == 0 else found[contender.name]
            _turn(contender, steps, device, turns)
            if number == 0:  # memory is the same from the first step on
                found[contender.name].peak_bytes, found[contender.name].work_bytes = turns.peak_bytes, turns.work_bytes
    return found


def _turn(contender: Contender, steps: int, device: torch.device, turns: Turns) -> None:
    is_cuda = device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    turns.rounds.append(_on_cuda(contender.step, steps, device) if is_cuda else _on_host(contender.step, steps))
    turns.wall.append(time.perf_counter() - began)
    if is_cuda:
        peak = torch.cuda.max_memory_allocated(device)
        turns.peak_bytes, turns.work_bytes = max(turns.peak_bytes, peak), max(turns.work_bytes, peak - before)
        turns.reserved_bytes = max(turns.reserved_bytes, torch.cuda.max_memory_reserved(device))


def _on_host(step: Callable[[], object], steps: int) -> list[float]:
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return taken


def _on_cuda(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """From the end of one step to the end of the next, on the device's clock; it waits for a slow host within them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]


def figures(turns: Turns) -> dict[str, Any]:
    """Median, quartiles and extremes of the steps' seconds, and the memory."""
    every = sorted(value for steps in turns.rounds for value in steps)
    quartiles = statistics.quantiles(every, n=4) if len(every) > 1 else every * 3
    found: dict[str, Any] = {
        "seconds": statistics.median(every),
        "quartiles": [quartiles[0], quartiles[2]],
        "extremes": [every[0], every[-1]],
        "wall_seconds": statistics.median(turns.wall) / len(turns.rounds[0]),
    }
    memory = {"peak_bytes": turns.peak_bytes, "reserved_bytes": turns.reserved_bytes, "work_bytes": turns.work_bytes}
    return found | (memory if turns.peak_bytes else {})


def ratio(ours: Turns, theirs: Turns) -> dict[str, float]:
    """Their time by ours, round by round: above 1 they are slower."""
    by_round = sorted(second / first for first, second in zip(ours.medians, theirs.medians))
    return {"median": statistics.median(by_round), "least": by_round[0], "most": by_round[-1]}


def host_peak_bytes() -> int:
    """The most main memory that this process ever had; 0 where the system does not say (it is read from /proc)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def pinned_bytes() -> int:
    """The most page-locked memory that torch had; systems do not always count it as the process's own. 0 where torch does not say."""
    stats: Mapping[str, Any] = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") and torch.cuda.is_available() else {}
    return max((int(stats.get(key, 0)) for key in ("allocated_bytes.peak", "active_bytes.peak", "segment_bytes.peak")), default=0)


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device))}
    return found


def device_named(name: str) -> torch.device:
    """With its number, without which some functions of CUDA refuse it."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU {named or platform.processor() or platform.machine()}"
