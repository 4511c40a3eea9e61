"""The plan in a run: said at the start, held against the second step, and never a reason not to train."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import pytest

from simpletuner.training import plan_check
from simpletuner.training.plan import Phase, Plan
from simpletuner.training.plan_check import compared, planned, too_much
from simpletuner.types import Size
from tests.builders.run import adapter_bytes, add_pictures, train_in_process, write_run

GB = 1_000_000_000
CARD = Plan((Phase("text", 3 * GB, 4 * GB), Phase("step", 9 * GB, 2 * GB)), Size(1024, 1024), 1, "cuda", ())


def test_a_run_says_what_is_planned_and_how_far_that_was_off_and_trains_the_same_bytes(tmp_path, capsys):
    write_run(tmp_path / "plain")
    assert train_in_process(tmp_path / "plain") == 0
    assert "memory" not in capsys.readouterr().out
    write_run(tmp_path / "planned", plan_memory=True)

    assert train_in_process(tmp_path / "planned") == 0

    said = capsys.readouterr().out
    assert re.search(r"memory +planned \d\.\d GB of main memory \(text .*, step \d\.\d, ", said)
    assert len(re.findall(r"memory of a step: planned \d\.\d GB, measured \d\.\d GB \([+-]\d+%\)\n", said)) == 1
    assert adapter_bytes(tmp_path / "planned") == adapter_bytes(tmp_path / "plain")


def test_the_plan_is_of_the_largest_batch_that_the_pictures_make(tmp_path, monkeypatch):
    planned_with = []
    monkeypatch.setattr(plan_check, "plan_run", lambda config, *batch: planned_with.append(batch) or CARD)
    plain = {"type": "local", "caption_strategy": "filename", "crop": False}
    for name, size in (("wide", (64, 32)), ("square", (48, 48))):
        add_pictures(tmp_path / name, 4, size)
    wide = {**plain, "id": "wide", "instance_data_dir": "wide", "resolution": 32, "train_batch_size": 4}
    square = {**plain, "id": "square", "instance_data_dir": "square", "resolution": 48}
    write_run(tmp_path, pictures=0, datasets=[wide, square], max_train_steps=1, plan_memory=True)

    train_in_process(tmp_path)

    assert planned_with == [(Size(64, 32), 4, "cpu", 0)]


def test_what_cannot_be_planned_is_trained_all_the_same(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("an operation without shapes")

    monkeypatch.setattr(plan_check, "plan_run", fails)
    write_run(tmp_path, max_train_steps=1, plan_memory=True)

    assert train_in_process(tmp_path) == 0
    assert "note: the memory of this run cannot be planned: an operation without shapes" in capsys.readouterr().out


def test_a_stop_while_the_memory_is_planned_is_a_stop(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(plan_check, "plan_run", interrupted)
    write_run(tmp_path, max_train_steps=1, plan_memory=True)

    assert train_in_process(tmp_path) == 143
    assert "cannot be planned" not in capsys.readouterr().out
    assert not list((tmp_path / "output").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("on_card", "in_main", "said"),
    [
        (9 * GB, 4 * GB, []),
        (None, None, []),
        (
            8 * GB,
            4 * GB,
            [
                "the phase step is planned to take 9.0 GB, and the card has 8.0 GB free; "
                "`simpletuner plan --fit 8GB` proposes options with which it fits"
            ],
        ),
        (None, 3 * GB, ["the phase text is planned to take 4.0 GB of main memory, of which 3.0 GB are free"]),
    ],
)
def test_a_plan_for_more_than_there_is_is_warned_of(on_card, in_main, said):
    assert too_much(CARD, on_card, in_main) == said


def test_a_plan_and_a_measurement_are_said_in_a_line():
    assert planned(CARD) == "planned 9.0 GB on the card (text 3.0, step 9.0) and 4.0 GB of main memory"
    assert planned(replace(CARD, device="cpu")) == "planned 4.0 GB of main memory (text 4.0, step 2.0)"
    measured = "memory of a step: planned 9.1 GB, measured 9.3 GB (-2%)"
    assert compared(9_100_000_000, 9_300_000_000, 0) == measured
    assert compared(9_100_000_000, 9_300_000_000, 9_800_000_000) == f"{measured}; PyTorch holds 9.8 GB of the card"
