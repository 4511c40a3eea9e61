"""What an epoch and the run are made of, when datasets take part for a time only."""

from __future__ import annotations

import pytest

from simpletuner.data.doctor.as_json import as_json
from simpletuner.data.doctor.table import show


@pytest.fixture
def two(draw):
    """Four pictures of cats and two of dogs."""
    for number in range(6):
        draw(f"{'cats' if number < 4 else 'dogs'}/{number}.png", seed=number)

    def entries(**dogs):
        return {"id": "cats", "instance_data_dir": "cats"}, {"id": "dogs", "instance_data_dir": "dogs", **dogs}

    return entries


def figures(report):
    return {one.id: (one.figures["batches"], one.figures["batches_of_run"], round(one.figures["share_of_draws"], 4)) for one in report.datasets}


def test_a_dataset_of_some_epochs_is_counted_in_these(two, check, console, said):
    report = check(*two(start_epoch=3), training={"num_train_epochs": 4, "max_train_steps": 0})

    assert figures(report) == {"cats": (4, 16, 0.8), "dogs": (2, 4, 0.2)}
    assert (report.totals["batches_per_epoch"], report.totals["steps"]) == (4, 20)
    show(report, console)
    assert "4 batches, the first one" in said.getvalue()
    assert "20 steps; dogs in epochs 3 to the end: 4 batches" in said.getvalue()
    assert [one["takes_part"] for one in as_json(report)["backends"]] == ["always", "epochs 3 to the end"]


def test_a_dataset_of_some_steps_is_counted_in_these(two, check):
    report = check(*two(end_step=3), training={"max_train_steps": 10})

    batches, of_run, share = figures(report)["dogs"]
    assert batches == 2 and of_run <= 2 and figures(report)["cats"][1] == 10 - of_run
    assert share == pytest.approx(of_run / 10, abs=1e-4)


def test_a_dataset_that_begins_after_the_run_is_a_warning(two, check, problems):
    report = check(*two(start_step=50), training={"max_train_steps": 10})

    assert [(one.dataset, one.message) for one in problems(report, "never drawn")] == [
        ("dogs", "it takes part in steps 51 to the end alone, and the run ends before, after step 10")
    ]
    assert figures(report)["dogs"] == (2, 0, 0) and report.is_usable


def test_a_step_without_any_dataset_makes_the_run_unusable(draw, check, problems):
    draw("images/a.png")

    report = check({"id": "set", "instance_data_dir": "images", "end_step": 4}, training={"max_train_steps": 10})

    assert [one.message for one in problems(report, "unusable")] == ["no dataset takes part from step 5 on, in epoch 5; the run has 10 steps"]
    assert "start_step" in problems(report, "unusable")[0].hint
    assert not report.is_usable and report.totals["steps"] == 0


def test_without_windows_the_run_is_epochs_of_one_kind(two, check, console, said):
    report = check(*two(), training={"num_train_epochs": 3, "max_train_steps": 0, "train_batch_size": 2})

    assert figures(report) == {"cats": (2, 6, 0.6667), "dogs": (1, 3, 0.3333)}
    assert report.totals["steps"] == 9
    show(report, console)
    assert "(3 batches)" in said.getvalue() and "9 steps" in said.getvalue()
