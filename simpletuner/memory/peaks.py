"""The most memory that was taken between two moments, and what is free: of a card, or of main memory where the CPU computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

RESETS_PEAK = "5"
"""What Linux wants to be told, see proc_pid_clear_refs(5)."""


@dataclass(frozen=True, slots=True)
class Found:
    """A peak."""

    bytes: int
    held_bytes: int
    """That PyTorch's allocator holds of a card, the peak among them; 0 on the CPU."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A peak that is being watched for."""

    device: torch.device

    @classmethod
    def begin(cls, device: torch.device) -> Peak | None:
        """Forget the peak so far; None where the system keeps none, or lets nobody forget it."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return cls(device)
        try:
            Path("/proc/self/clear_refs").write_text(RESETS_PEAK, encoding="ascii")
        except OSError:
            return None
        return cls(device) if device.type == "cpu" else None

    def end(self) -> Found:
        """The peak since then."""
        if self.device.type == "cuda":
            return Found(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        return Found(_status("/proc/self/status", "VmHWM"), 0)


def free_on_card(device: torch.device) -> int | None:
    """What this process can have of a card, what it has included; None where there is none."""
    if device.type != "cuda":
        return None
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device)


def free_in_main() -> int | None:
    """What this process can have of main memory, what it has included; None where the system does not tell."""
    left = left_in_main()
    return None if left is None else left + _status("/proc/self/status", "VmRSS")


def held_in_main() -> int | None:
    """What this process has of main memory; None where the system does not tell."""
    try:
        return _status("/proc/self/status", "VmRSS")
    except OSError:
        return None


def left_in_main() -> int | None:
    """What nobody has of main memory; None where the system does not tell."""
    try:
        available = _status("/proc/meminfo", "MemAvailable")
    except OSError:
        return None
    left = _left_to_group()
    return available if left is None else min(available, left)


def _left_to_group(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of a container's limit (cgroup version 2), read files that are kept not counted; None without one."""
    try:
        limit, taken = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = next(line.split()[1] for line in (group / "memory.stat").read_text(encoding="ascii").splitlines() if line.startswith("file "))
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(taken) + int(cached)


def _status(file: str, key: str) -> int:
    """A figure of Linux', which has kB."""
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
