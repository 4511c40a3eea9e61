"""What this machine has: cards, as a process of its own asks PyTorch, so that nobody waits for that import; main memory and disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROBE = """
import json, torch
found = []
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append([facts.name, facts.total_memory, torch.cuda.mem_get_info(number)[0], facts.major >= 8 or bool(torch.version.hip)])
print(json.dumps(found))
"""
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator."""

    name: str
    total_bytes: int
    free_bytes: int
    has_bf16: bool = True
    """Whether it computes in bf16; cards before NVIDIA's Ampere do so slowly, if at all."""

    def __str__(self) -> str:
        used = f", {self.free_bytes / GIGABYTE:.0f} GB free" if self.free_bytes < 0.9 * self.total_bytes else ""
        return f"{self.name}, {self.total_bytes / GIGABYTE:.0f} GB{used}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run could use."""

    cards: tuple[Card, ...] = ()
    ram_bytes: int | None = None
    """None where the system does not tell."""
    disk_bytes: int | None = None
    """Free, where the run writes."""

    @property
    def card(self) -> Card | None:
        """The one that proposals are for: the smallest, since each process of a run takes the same."""
        return min(self.cards, key=lambda card: card.total_bytes, default=None)

    def __str__(self) -> str:
        parts = [str(card) for card in self.cards] or ["no card that PyTorch can use"]
        parts += [f"{self.ram_bytes / GIGABYTE:.0f} GB of main memory"] if self.ram_bytes else []
        parts += [f"{self.disk_bytes / GIGABYTE:.0f} GB of free disk"] if self.disk_bytes is not None else []
        return "; ".join(parts)


class Probe:
    """A look at this machine that is under way."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._said: bytes | None = None

    @property
    def is_done(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> Machine:
        """Wait for what it found; no cards where PyTorch cannot tell of any."""
        return machine_with(cards_of(self._read().decode("utf-8", "replace")))

    def stop(self) -> None:
        if not self.is_done:
            self._process.kill()
        self._read()

    def _read(self) -> bytes:
        """What it printed; its pipe can be read once."""
        if self._said is None:
            self._said, _ = self._process.communicate()
        return self._said


def cards_of(said: str) -> tuple[Card, ...]:
    """Read what the probe printed; libraries may have printed before it."""
    lines = said.strip().splitlines()
    try:
        return tuple(Card(*facts) for facts in json.loads(lines[-1])) if lines else ()
    except (json.JSONDecodeError, TypeError):
        return ()


def machine_with(cards: tuple[Card, ...]) -> Machine:
    """This machine with such cards."""
    return Machine(cards, ram_bytes(), shutil.disk_usage(Path.cwd()).free)


def named_card(size: int) -> Card:
    """A card of which only the size is known."""
    return Card("a card", size, size)


def ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
