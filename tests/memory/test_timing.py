"""The stopwatch at the start of a run, and the file of what it found."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from simpletuner.memory.timing import LEAST_ROWS, LONG_SECONDS, ROUNDS, Stopwatch, TimingBook

CPU = torch.device("cpu")


def book(folder: Path) -> TimingBook:
    return TimingBook(folder, CPU, torch.bfloat16)


def test_the_faster_way_is_found_and_slow_ones_are_not_repeated():
    calls: list[str] = []

    def sleeping(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = Stopwatch(CPU, 10).compare({"slow": lambda: sleeping("slow", 0.02), "fast": lambda: sleeping("fast", 0.0002)})

    assert 0.0002 <= found["fast"] < 0.02 <= found["slow"]
    assert calls.count("slow") == 1 + ROUNDS <= calls.count("fast")


def test_nothing_is_repeated_once_the_budget_is_spent():
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.01)

    found = Stopwatch(CPU, 0).compare({"only": work})

    assert len(calls) == 1 and found["only"] >= 0.01


@pytest.mark.parametrize("seconds_a_row, most, expected", [(0.0, 1000, 1000), (0.0, 20, 20), (LONG_SECONDS / 100, 10_000, 2 * LEAST_ROWS)])
def test_rows_are_all_or_as_many_as_take_long(seconds_a_row, most, expected):
    assert Stopwatch(CPU, 10).rows(lambda count: lambda: time.sleep(seconds_a_row * count), most) == expected


def test_what_was_found_is_there_at_the_next_start(tmp_path):
    first = book(tmp_path / "timings")
    first.rows |= {"a product": {"one way": 0.25, "another": 0.5}, "no time for it": None}

    first.save()

    assert book(tmp_path / "timings").rows == first.rows
    (file,) = (tmp_path / "timings").iterdir()
    assert torch.__version__ in file.name and "bfloat16" in file.name and f"{torch.get_num_threads()}-threads" in file.name
    assert TimingBook(tmp_path / "timings", CPU, torch.float32).rows == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": 3}', '{"a": {"way": "x"}}', "\x00"], ids=["empty", "cut", "list", "number", "word", "zero"]
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, content):
    written = book(tmp_path)
    written.save()
    (file,) = tmp_path.iterdir()
    file.write_text(content)

    again = book(tmp_path)

    assert again.rows == {}
    again.rows["a"] = {"way": 1.0}
    again.save()
    assert json.loads(file.read_text()) == {"a": {"way": 1.0}} and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "timings").write_text("a file in its place")

    found = book(tmp_path / "timings")
    found.rows["a"] = None
    found.save()

    assert (tmp_path / "timings").read_text() == "a file in its place"
