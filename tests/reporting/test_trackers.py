from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from simpletuner import plugins
from simpletuner.errors import ConfigError
from simpletuner.reporting.tracker import Tracker, Trackers, kinds_of, start_trackers
from simpletuner.training.evaluator import Losses
from simpletuner.training.meter import Figures


def start(tmp_path, report_to: str, said: list[str] | None = None) -> Trackers:
    warn = (said if said is not None else []).append
    return start_trackers(kinds_of(report_to, None), tmp_path, "project", "run", {"learning_rate": 1e-4}, warn)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 10})
    accumulator.Reload()
    return accumulator


def test_tensorboard_files_hold_the_figures_and_pictures(tmp_path):
    trackers = start(tmp_path, "tensorboard")
    for step in (1, 2):
        trackers.log(step, {"train_loss": step / 2})
    trackers.images(2, {"cat": Image.new("RGB", (8, 6), "red")}, {"cat": "a red cat"})
    trackers.close()

    written = events(tmp_path / "run")

    assert [(event.step, event.value) for event in written.Scalars("train_loss")] == [(1, 0.5), (2, 1.0)]
    image = written.Images("validation/cat")[0]
    assert (image.width, image.height, image.step) == (8, 6, 2)
    assert b"a red cat" in written.Tensors("validation/cat/prompt/text_summary")[0].tensor_proto.string_val[0]
    assert b"learning_rate = 0.0001" in written.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path):
    for first, value in ((1, 0.5), (3, 0.25)):
        trackers = start(tmp_path, "tensorboard")
        for step in range(first, first + 4):
            trackers.log(step, {"train_loss": value})
        trackers.close()
        time.sleep(1.1)  # the names of event files, in whose order they are read, tell seconds

    found = [(event.step, event.value) for event in events(tmp_path / "run").Scalars("train_loss")]

    assert found == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25), (6, 0.25)]


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


def test_the_page_on_tracking_names_every_tracker_and_metric_and_its_example_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    metrics = {*Figures(1, 0.5, 0.5, 0.1, 0, (), 1.0).values(), *Losses(0.5, (0.5,)).values("<dataset>")}

    assert {"jsonl", "tensorboard", "wandb", "custom-tracker"} <= names
    assert {name.replace("noise_0-25", "noise_<a>-<b>") for name in metrics} <= names

    (tmp_path / "own.py").write_text(page.split("```python\n")[1].split("```")[0])
    trackers = start_trackers(kinds_of("custom-tracker", tmp_path / "own.py"), tmp_path, "project", "run", {}, pytest.fail)
    trackers.log(2, {"train_loss": 0.5})
    trackers.images(2, {"cat": Image.new("RGB", (8, 6))})
    trackers.close()
    assert (tmp_path / "figures.csv").read_text() == "2,0.5\n" and (tmp_path / "2-cat.png").is_file()


OWN = """
from simpletuner.reporting.tracker import Tracker

class Mine(Tracker):
    def log(self, step, values):
        (self.folder / "mine.txt").write_text(f"{self.run} {step} {sorted(values)}")
    def images(self, step, images, captions):
        pass
    def close(self):
        pass
"""


def test_a_tracker_of_ones_own_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom-trackers").mkdir()
    (tmp_path / "custom-trackers" / "mine.py").write_text(OWN)

    for named in ("mine", "mine.py", tmp_path / "custom-trackers/mine.py"):
        kinds = kinds_of("custom-tracker, jsonl", Path(named))
        trackers = start_trackers(kinds, tmp_path, "project", "run", {}, print)
        trackers.log(3, {"train_loss": 0.5})
        trackers.close()
        assert (tmp_path / "mine.txt").read_text() == "run 3 ['train_loss']"
        (tmp_path / "mine.txt").unlink()


def test_a_tracker_of_ones_own_may_hold_dataclasses_whose_annotations_are_texts(tmp_path):
    row = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Row:\n    step: int\n"
    (tmp_path / "json.py").write_text(row + OWN)  # and be called as another module is

    assert kinds_of("custom-tracker", tmp_path / "json.py")["custom-tracker"].__name__ == "Mine"
    assert sys.modules["json"] is json


def test_closing_twice_is_closing_once(tmp_path):
    slow = Slow(tmp_path, "p", "r", {})
    trackers = Trackers([slow], print)
    trackers.close()
    trackers.close()

    assert slow.taken == ["closed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no file, neither here nor in custom-trackers"),
        ("class Mine(:", "line 1 is no Python"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("x = 1", "it holds none"),
        (OWN + OWN.replace("Mine", "Other"), "it holds Mine, Other"),
        (OWN.replace("def close", "def end"), "Mine lacks close"),
    ],
)
def test_what_is_wrong_with_a_tracker_of_ones_own_is_said(tmp_path, text, said):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)

    with pytest.raises(ConfigError, match=said):
        kinds_of("custom-tracker", tmp_path / "mine.py")


def test_all_are_those_that_are_installed_and_a_missing_package_is_named_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks a package that cannot be imported
    (tmp_path / "mine.py").write_text(OWN)
    said: list[str] = []

    kinds = kinds_of("all", tmp_path / "mine.py")
    trackers = start_trackers(kinds, tmp_path / "logs", "project", "run", {}, said.append)
    trackers.log(1, {"train_loss": 0.5})
    trackers.close()

    assert list(kinds) == ["jsonl", "tensorboard", "wandb", "custom-tracker"]
    assert len(said) == 1 and said[0].startswith("tracker 'wandb' did not start and is off for this run: ") and "\n" not in said[0]
    assert (
        (tmp_path / "logs/mine.txt").is_file() and (tmp_path / "logs/metrics.jsonl").is_file() and events(tmp_path / "logs/run").Scalars("train_loss")
    )


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
