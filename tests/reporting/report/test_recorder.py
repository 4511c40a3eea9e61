"""What the report makes of the events of a run, and what it costs the run."""

from __future__ import annotations

import json
import time

import pytest

from simpletuner.reporting.events import Event, Events
from simpletuner.reporting.report import recorder as recording
from simpletuner.reporting.report.facts import RunFacts
from simpletuner.reporting.report.recorder import Recorder
from simpletuner.reporting.report.state import SPANS, State, load

WORDS = dict.fromkeys(("name", "output", "where", "family", "base", "learns", "device", "start", "metric", "software"), "x")
FACTS = RunFacts(
    **WORDS,
    total_steps=9,
    images_per_step=1,
    steps_per_epoch=3,
    settings={"seed": 1},
    max_grad_norm=0,
    checkpoint_limit=None,
    is_adapter=True,
)


def started(folder, warned=None) -> tuple[Recorder, Events]:
    recorder = Recorder(folder, (warned if warned is not None else []).append, lambda: {"main": 1e9}, {"seed": "flag --seed"})
    return recorder, Events([], recorder)


def step(events: Events, number: int, loss: float = 1.0) -> None:
    events.figures(number, {"train_loss": loss, "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": 1.0})


def run(folder, steps, first=0, warned=None) -> State:
    recorder, events = started(folder, warned)
    events.expect(9)
    events.stage("init_text_embed_cache")
    recorder.begin(FACTS, first)
    for number in steps:
        step(events, number, float(number))
    events.close(10)
    state = load(folder)
    assert state is not None
    return state


def test_a_resumed_run_goes_on_where_it_stands_and_a_fresh_one_begins_anew(tmp_path):
    first = run(tmp_path, range(1, 7))

    resumed = run(tmp_path, range(4, 9), first=3)

    assert [one.first for one in resumed.curves["loss"].bins] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert resumed.starts == 2 and resumed.seconds > first.seconds and resumed.previous == {"seed": 1}
    fresh = run(tmp_path, range(1, 3))
    assert [one.first for one in fresh.curves["loss"].bins] == [1, 2] and fresh.starts == 1 and fresh.previous == {"seed": 1}


def test_the_report_of_a_run_that_is_not_continued_goes_beside_its_checkpoints(tmp_path):
    run(tmp_path, range(1, 7))
    recorder, _ = started(tmp_path)

    recorder.move_later(3, tmp_path / "superseded")

    assert json.loads((tmp_path / "superseded/report/report.json").read_text())["step"] == 6


def test_time_is_counted_for_what_it_was_spent_on(tmp_path):
    recorder, _ = started(tmp_path)
    at = recorder._since

    def learn(kind, seconds, **fields):
        recorder._learn(Event(kind, "info", "", fields, time=at + seconds))

    learn("lifecycle.stage", 1, stage="init_vae_cache")
    learn("lifecycle.stage", 4, stage="init_load_base_model")
    recorder._begin(FACTS, 0, at + 6)
    for number in range(1, 5):
        learn("training.status", 6 + number, step=number, figures={"train_loss": 1.0})
    learn("notification", 13, figures={"loss/val/a": 1.0})
    learn("lifecycle.stage", 13, stage="validation")
    learn("validation.image", 18, step=4)
    learn("notification", 19, figures={"clip/mean": 20.0})
    learn("training.status", 21, step=5, figures={"train_loss": 1.0})
    learn("lifecycle.stage", 22, stage="checkpoint_save")
    learn("lifecycle.stage", 22.5, stage="model_save")
    learn("lifecycle.stage", 23, stage="training_complete")

    phases = recorder._state.phases
    expected = {"starting": 1, "caching images": 3, "loading": 2, "training": 6, "held-out loss": 3, "validation": 6, "saving": 0.5}
    assert recorder._state.status == "finished" and sum(phases.values()) == pytest.approx(23)
    assert {name: pytest.approx(seconds, abs=1.6) for name, seconds in expected.items()} == phases
    assert [one.mean for one in recorder._state.curves["seconds"].bins] == [pytest.approx(1)] * 2  # neither the first nor the one before a look


def test_a_timeline_of_a_thousand_looks_is_bounded():
    state = State(began=0, updated=0)
    for _ in range(1000):
        state.spend("training", 9.0)
        state.spend("validation", 1.0)

    assert len(state.spans) <= SPANS and state.spans[-1][2] == pytest.approx(state.seconds) and state.phases["validation"] == 1000


def test_a_disk_that_is_full_is_named_once_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "PAGE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "TICK_SECONDS", 0.01)
    (tmp_path / "report/report.json").mkdir(parents=True)  # whose place no file can take
    (tmp_path / "report/report.json.tmp").symlink_to("/dev/full")
    warned: list[str] = []
    _, events = started(tmp_path, warned)

    events.stage("init_text_embed_cache")
    for number in range(1, 20):
        step(events, number)
        time.sleep(0.01)
    (tmp_path / "report/report.json").rmdir()  # there is room again
    events.close(10)

    assert warned == ["the report of the run cannot be renewed: No space left on device. The run goes on"]
    assert load(tmp_path).step == 19


def test_a_run_that_never_came_to_its_first_stage_writes_nothing(tmp_path):
    _, events = started(tmp_path)

    events.failed(RuntimeError("another run is there"), 1, is_fault=False)
    events.close(10)

    assert list(tmp_path.iterdir()) == []


def test_an_error_is_the_last_word(tmp_path):
    recorder, events = started(tmp_path)
    events.stage("init_text_embed_cache")
    recorder.begin(FACTS, 0)
    recorder.heard("/home/me/pictures/a.png is odd")

    events.failed(RuntimeError("no memory in /home/me/secret/file"), 4, is_fault=True)
    events.close(10)

    state = load(tmp_path)
    assert state.status == "failed" and state.ended == "RuntimeError: no memory in file" and state.warnings[0][2] == "a.png is odd"
    assert "no memory in file" in (tmp_path / "report.html").read_text()


def test_a_step_waits_for_nothing(tmp_path):
    """Well under a thousandth of a step of 50 ms."""
    _, events = started(tmp_path)
    events.stage("init_text_embed_cache")
    begin = time.thread_time()

    for number in range(1, 2001):
        step(events, number)

    assert (time.thread_time() - begin) / 2000 < 200e-6
    events.close(10)
