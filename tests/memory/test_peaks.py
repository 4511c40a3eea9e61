"""Peaks of main memory, as Linux counts them."""

from __future__ import annotations

import sys

import pytest
import torch

from simpletuner.memory import peaks
from simpletuner.memory.peaks import Peak, _left_to_group, free_in_main, free_on_card

CPU = torch.device("cpu")
MEGABYTE = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")


@linux
def test_a_peak_is_what_was_there_at_once_since_then():
    torch.ones(300 * MEGABYTE, dtype=torch.uint8)
    small, large = ((_peak_of(size), size) for size in (10 * MEGABYTE, 200 * MEGABYTE))

    assert large[0] - small[0] == pytest.approx(large[1] - small[1], rel=0.15)


def _peak_of(size: int) -> int:
    peak = Peak.begin(CPU)
    assert peak is not None
    torch.ones(size, dtype=torch.uint8)
    found = peak.end()
    assert found.held_bytes == 0
    return found.bytes


@pytest.mark.parametrize(("left_to_group", "free"), [(None, 700), (250, 350)])
def test_what_a_process_can_have_is_what_is_left_and_what_it_has(monkeypatch, left_to_group, free):
    kept = {("/proc/meminfo", "MemAvailable"): 600, ("/proc/self/status", "VmRSS"): 100}
    monkeypatch.setattr(peaks, "_status", lambda file, key: kept[file, key])
    monkeypatch.setattr(peaks, "_left_to_group", lambda: left_to_group)

    assert free_in_main() == free
    assert free_on_card(CPU) is None


@linux
def test_linux_tells_what_is_free():
    assert MEGABYTE < free_in_main() < 2**50


@pytest.mark.parametrize(("limit", "left"), [("max", None), ("8000", 8000 - 5000 + 1500)])
def test_a_container_may_have_less_than_the_machine(tmp_path, limit, left):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 1500\nkernel 500\n")

    assert _left_to_group(tmp_path) == left
    assert _left_to_group(tmp_path / "nowhere") is None
