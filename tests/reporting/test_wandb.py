"""wandb for real, offline: what it keeps on disk is read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.reporting.tracker import Tracker, kinds_of, start_trackers

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "none"))
    wandb.teardown()
    yield
    wandb.teardown()


def records(folder: Path) -> list[list[Any]]:
    """What each offline run under a folder wrote, in the order of their beginnings."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes the end a moment later, as at the end of a program
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [[Record.FromString(data) for data in entries(file.read_bytes())] for file in files]


def entries(log: bytes) -> Iterator[bytes]:
    """The entries of a log in LevelDB's format: blocks of 32 kB that hold parts, each behind its check sum, length and kind."""
    at, whole = 7, b""  # behind wandb's own head
    while at + 7 <= len(log):
        left = 32768 - at % 32768
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        if left < 7 or not kind:
            at += left
            continue
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def history(of_run: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in of_run:
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def started(folder: Path, said: list[str], **config: Any):
    return start_trackers(kinds_of("wandb", None), folder, "my project", "my run", {"learning_rate": 1e-4, **config}, said.append)


def test_offline_runs_keep_figures_pictures_and_settings_and_a_resumed_one_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    for first in (1, 3):  # the second goes on from an earlier step than the first came to
        trackers = started(tmp_path / "logs", said)
        for step in range(first, first + 4):
            trackers.log(step, {"train_loss": step / 8})
        trackers.images(first + 3, {"cat": Image.new("RGB", (8, 6), "red")}, {"cat": "a red cat"})
        trackers.log(first + 3, {"loss/val/held": 0.5})
        trackers.close()
    first_run, second_run = records(tmp_path / "logs")
    begun = [next(record.run for record in one if record.WhichOneof("record_type") == "run") for one in (first_run, second_run)]

    assert said == [] and begun[0].run_id == begun[1].run_id == json.loads((tmp_path / "logs/wandb-run.json").read_text())["id"]
    assert (begun[0].project, begun[0].display_name) == ("my project", "my run")
    settings = {item.key: json.loads(item.value_json) for item in begun[0].config.update if item.key != "_wandb"}
    assert settings == {"learning_rate": 1e-4}
    assert [row["global_step"] for row in history(first_run)] == [1, 2, 3, 4]
    assert [row["global_step"] for row in history(second_run)] == [3, 4, 5, 6]
    last = history(second_run)[-1]
    assert last["train_loss"] == 0.75 and last["loss/val/held"] == 0.5 and last["validation/cat/caption"] == "a red cat"
    steps = [one for record in first_run if record.WhichOneof("record_type") == "metric" for one in [record.metric] if one.glob_name == "*"]
    assert steps[0].step_metric == "global_step"


def test_a_run_that_begins_anew_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = []
    for _ in range(2):
        trackers = started(tmp_path, [])
        trackers.log(1, {"train_loss": 1.0})
        trackers.close()
        names.append(json.loads((tmp_path / "wandb-run.json").read_text())["id"])

    assert names[0] != names[1]


def test_lower_steps_within_one_run_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = started(tmp_path, [])
    for step in (5, 6, 3, 4):
        trackers.log(step, {"train_loss": step / 8})
    trackers.close()

    assert [(row["global_step"], row["train_loss"]) for row in history(records(tmp_path)[0])] == [(5, 0.625), (6, 0.75), (3, 0.375), (4, 0.5)]


def test_pictures_may_be_rows_of_a_table_with_their_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    trackers = started(tmp_path, said, tracker_image_layout="table")
    trackers.images(2, {"cat": Image.new("RGB", (8, 6), "red")}, {"cat": "a red cat"})
    trackers.close()

    wandb.teardown()
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/validation/pictures*.json")
    content = json.loads(table.read_text())
    assert said == [] and content["columns"] == ["step", "name", "picture", "prompt"]
    assert content["data"][0][:2] == [2, "cat"] and content["data"][0][3] == "a red cat"


def test_what_was_typed_and_where_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["/home/somebody/simpletuner", "--webhook_config=T0PSECRET"])
    trackers = started(tmp_path, [])
    trackers.log(1, {"train_loss": 1.0})
    trackers.close()

    wandb.teardown()
    written = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/**/*") if path.suffix in (".wandb", ".json", ".yaml", ".txt"))
    assert b"train_loss" in written and b"T0PSECRET" not in written and b"/home/somebody" not in written


def test_one_who_is_not_logged_in_is_told_so_in_a_line_and_asked_nothing(tmp_path):
    said: list[str] = []
    trackers = started(tmp_path, said)
    trackers.log(1, {"train_loss": 1.0})
    trackers.close()

    assert len(said) == 1 and "it is not logged in: run `wandb login`, or set WANDB_MODE=offline" in said[0]


def test_every_tracker_closes_though_nothing_was_logged(tmp_path):
    for name, kind in kinds_of("jsonl,tensorboard,wandb", None).items():
        tracker: Tracker = kind(tmp_path / name, "project", "run", {})
        tracker.close()
