from __future__ import annotations

import json
import threading
import time

import pytest
from PIL import Image

from simpletuner import plugins
from simpletuner.errors import ConfigError
from simpletuner.reporting.tracker import Tracker, Trackers, start_trackers


def start(tmp_path, report_to: str, said: list[str] | None = None) -> Trackers:
    return start_trackers(report_to, tmp_path, "project", "run", {"learning_rate": 1e-4}, (said if said is not None else []).append)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 10})
    accumulator.Reload()
    return accumulator


def test_tensorboard_files_hold_the_figures_and_pictures(tmp_path):
    trackers = start(tmp_path, "tensorboard")
    for step in (1, 2):
        trackers.log(step, {"train_loss": step / 2})
    trackers.images(2, {"cat": Image.new("RGB", (8, 6), "red")})
    trackers.close()

    written = events(tmp_path / "run")

    assert [(event.step, event.value) for event in written.Scalars("train_loss")] == [(1, 0.5), (2, 1.0)]
    image = written.Images("validation/cat")[0]
    assert (image.width, image.height, image.step) == (8, 6, 2)


def test_jsonl_is_one_object_a_line_and_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        trackers = start(tmp_path, "jsonl")
        trackers.log(step, {"train_loss": 0.5})
        trackers.close()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert lines == [{"step": 1, "train_loss": 0.5}, {"step": 2, "train_loss": 0.5}]


def test_several_trackers_take_the_same_figures(tmp_path):
    trackers = start(tmp_path, "jsonl, tensorboard")
    trackers.log(7, {"train_loss": 0.25})
    trackers.close()

    assert '"step": 7' in (tmp_path / "metrics.jsonl").read_text()
    assert events(tmp_path / "run").Scalars("train_loss")[0].step == 7


def test_none_is_silent_and_an_unknown_name_offers_the_nearest(tmp_path):
    start(tmp_path, "none").log(1, {"train_loss": 1.0})
    assert not list(tmp_path.iterdir())

    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        start(tmp_path, "tensorbord")


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(tmp_path):
    class Broken(Tracker):
        def log(self, step, values):
            raise OSError("no space")

        images = close = log

    said: list[str] = []
    healthy = plugins.load("simpletuner.reporting.trackers", "jsonl", Tracker)(tmp_path, "p", "r", {})
    trackers = Trackers([Broken(tmp_path, "p", "r", {}), healthy], said.append)
    trackers.log(1, {"a": 1.0})
    trackers.log(2, {"a": 2.0})
    trackers.close()

    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(said) == 1 and "no space" in said[0]


def test_a_tracker_that_cannot_start_is_left_out(tmp_path):
    (tmp_path / "file").write_text("")
    said: list[str] = []

    trackers = start(tmp_path / "file", "jsonl", said)
    trackers.log(1, {"a": 1.0})

    assert len(said) == 1 and "jsonl" in said[0]


class Slow(Tracker):
    """Takes nothing until it is let."""

    def __init__(self, *facts):
        super().__init__(*facts)
        self.may_go, self.taken = threading.Event(), []

    def log(self, step, values):
        self.may_go.wait(10)
        self.taken.append(step)

    images = log

    def close(self):
        self.taken.append("closed")


def test_a_slow_tracker_holds_up_nobody_and_a_flush_waits_for_it(tmp_path):
    slow, said = Slow(tmp_path, "p", "r", {}), []
    trackers = Trackers([slow], said.append)

    began = time.monotonic()
    for step in range(100):
        trackers.log(step, {"a": 1.0})
    seconds = time.monotonic() - began
    before = list(slow.taken)
    slow.may_go.set()
    trackers.flush()

    assert seconds < 5 and before == [] and slow.taken == list(range(100)) and said == []
    trackers.close()
    assert slow.taken[-1] == "closed"


def test_what_is_too_much_for_a_tracker_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("simpletuner.reporting.tracker.HELD", 3)
    monkeypatch.setattr("simpletuner.reporting.tracker.FLUSH_SECONDS", 0.05)
    slow, said = Slow(tmp_path, "p", "r", {}), []
    trackers = Trackers([slow], said.append)

    for step in range(100):
        trackers.log(step, {"a": 1.0})
    began = time.monotonic()
    for _ in range(100):
        trackers.flush()

    assert time.monotonic() - began < 3  # what hangs is waited for once
    assert said == ["tracker 'test_trackers' is too slow: figures are left out", "tracker 'test_trackers' does not answer: figures may be missing"]
    slow.may_go.set()
    trackers.close()
    assert 3 <= len(slow.taken) - 1 <= 4 and slow.taken[-1] == "closed"
    assert said[2:] == [f"tracker 'test_trackers' lacks {101 - len(slow.taken)} of its figures: it was too slow"]


def test_figures_are_those_of_when_they_were_handed_on(tmp_path):
    trackers = start(tmp_path, "jsonl")
    values = {"a": 1.0}
    trackers.log(1, values)
    values["a"] = 2.0
    trackers.close()

    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0}
