"""A whole run that tells a real receiver, and trackers, what it does."""

from __future__ import annotations

import json
import time

import pytest

from simpletuner.console import Console
from simpletuner.errors import SimpleTunerError, Stopped
from simpletuner.training import telling
from simpletuner.training.evaluator import Evaluator
from simpletuner.training.signals import StopRequest
from tests.builders.receiver import hangs, receiving
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.options.test_load import FAMILY, load

LOOKING = {
    "validation_prompt": "a picture",
    "validation_step_interval": 3,
    "validation_num_inference_steps": 1,
    "validation_resolution": "32",
}
OWN = """
import json
from simpletuner.reporting.tracker import Tracker

class Mine(Tracker):
    def log(self, step, values):
        (self.folder / "config.txt").write_text(json.dumps(dict(self.config)))
    def images(self, step, images, captions):
        (self.folder / f"captions-{step}.json").write_text(json.dumps([sorted(images), captions]))
    def close(self):
        pass
"""


def test_a_run_tells_discord_and_a_server_what_it_does_in_its_order_and_keeps_secrets(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN)
    with receiving() as discord, receiving() as raw:
        hooks = [
            {"webhook_type": "discord", "webhook_url": discord.url, "message_prefix": "[a]"},
            {"webhook_type": "raw", "callback_url": raw.url, "auth_token": "T0PSECRET"},
        ]
        own = {"report_to": "custom-tracker,jsonl", "custom_tracker": str(tmp_path / "mine.py"), "tracker_run_name": "my run"}
        write_run(tmp_path, webhook_config=hooks, webhook_reporting_interval=2, seed=7, **LOOKING, **own)

        assert train_in_process(tmp_path, "--dry-run") == 0 and raw.asked == discord.asked == 0
        assert train_in_process(tmp_path) == 0

    told = [(one.body["type"], one.body.get("stage") or one.body.get("step")) for one in raw.taken if one.body["type"] != "training.status"]
    assert [what for what in told if what[1] != "checkpoint_save" and what[0] != "training.checkpoint"] == [
        ("lifecycle.stage", "init_text_embed_cache"),
        ("lifecycle.stage", "init_vae_cache"),
        ("lifecycle.stage", "init_load_base_model"),
        ("lifecycle.stage", "init_prepare_models"),
        ("lifecycle.stage", "init_resume_checkpoint"),
        ("lifecycle.stage", "benchmark_base_model"),
        ("validation.image", 0),
        ("lifecycle.stage", "validation"),
        ("validation.image", 3),
        ("lifecycle.stage", "final_validation"),
        ("validation.image", 6),
        ("lifecycle.stage", "model_save"),
        ("lifecycle.stage", "training_complete"),
    ]
    assert [what for what in told if what[1] == "checkpoint_save" or what[0] == "training.checkpoint"] == [
        *(("lifecycle.stage", "checkpoint_save"), ("training.checkpoint", 3)),
        *(("lifecycle.stage", "checkpoint_save"), ("training.checkpoint", 6)),
    ]
    status = [one.body for one in raw.taken if one.body["type"] == "training.status"]
    assert status[-1]["step"] == 6 and status[-1]["total_steps"] == 6
    assert {"train_loss", "learning_rate", "grad_norm", "epoch"} <= status[-1]["figures"].keys()
    assert raw.taken[0].headers["X-API-Key"] == "T0PSECRET" and raw.taken[0].body["run"] == "my run"
    pictures = [one for one in discord.taken if one.files]
    assert len(pictures) == 3 and all("a picture" in one.body["content"] for one in pictures)
    assert discord.taken[-1].body["content"] == "[a] Training is complete"

    logs = tmp_path / "output/logs"
    assert json.loads((logs / "captions-3.json").read_text())[1] == {json.loads((logs / "captions-3.json").read_text())[0][1]: "a picture"}
    kept = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    written = {path: path.read_bytes() for path in kept}
    assert not [path for path, content in written.items() if b"T0PSECRET" in content or b"secret-path" in content]
    assert not [path for path in kept if path.suffix in (".txt", ".json", ".jsonl") and str(tmp_path).encode() in written[path]]
    said = capsys.readouterr().out
    assert "T0PSECRET" not in said and "secret-path" not in said and "webhook_config" in said and "(not shown)" in said


def test_a_receiver_that_hangs_or_is_not_there_changes_nothing_but_a_few_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(telling, "CLOSE_SECONDS", 1.0)
    write_run(tmp_path / "quiet", max_train_steps=2)
    assert train_in_process(tmp_path / "quiet") == 0
    with receiving() as gone:
        pass
    with receiving(always=hangs(20)) as receiver:
        hooks = [{"webhook_type": "raw", "callback_url": url} for url in (receiver.url, gone.url)]
        write_run(tmp_path / "told", max_train_steps=2, webhook_config=hooks)
        began = time.monotonic()
        assert train_in_process(tmp_path / "told") == 0
        seconds = time.monotonic() - began

    assert adapter_bytes(tmp_path / "told") == adapter_bytes(tmp_path / "quiet")
    said = capsys.readouterr().out
    assert seconds < 15 and said.count("warning: webhook raw 127.0.0.1 was not told of") >= 1 and "secret-path" not in said


def test_trackers_are_read_once_and_closed_where_a_run_fails_before_its_first_step(tmp_path, monkeypatch):
    counted = 'from pathlib import Path\nwith Path(__file__).with_name("said").open("a") as said:\n    said.write("read,")\n'
    closes = OWN.replace("        pass", '        with Path(__file__).with_name("said").open("a") as said:\n            said.write("closed")')
    (tmp_path / "mine.py").write_text(counted + closes)
    write_run(tmp_path, report_to="custom-tracker", custom_tracker=str(tmp_path / "mine.py"))

    def fail(self: Evaluator, step: int) -> None:
        raise SimpleTunerError("no")

    monkeypatch.setattr(Evaluator, "before_training", fail)

    assert train_in_process(tmp_path) == 1
    assert (tmp_path / "said").read_text() == "read,closed"


def test_a_run_that_fails_tells_why(tmp_path):
    with receiving() as receiver:
        hook = {"webhook_type": "raw", "callback_url": receiver.url, "log_level": "warning"}
        write_run(tmp_path, webhook_config=hook, learning_rate=1e30, max_train_steps=4)
        code = train_in_process(tmp_path)

    (error,) = [one.body for one in receiver.taken]
    assert (code, error["type"], error["level"], error["exit_code"]) == (1, "error", "error", 1)
    assert "is not a finite number" in error["message"] and str(tmp_path) not in error["message"]


def test_a_stop_and_a_fault_of_the_accelerator_are_told_as_what_they_are(tmp_path):
    with receiving() as receiver:
        hook = {"webhook_type": "raw", "callback_url": receiver.url}
        config = load({**FAMILY, "webhook_config": hook}).config
        for error in (Stopped("stopped at step 3", exit_code=143), RuntimeError("CUDA error: an illegal memory access")):
            with pytest.raises(type(error)), telling.telling(config, Console(), StopRequest()):
                raise error

    stop, fault = [one.body for one in receiver.taken]
    assert (stop["type"], stop["level"], stop["message"]) == ("notification", "warning", "stopped at step 3")
    assert (fault["type"], fault["level"], fault["exit_code"]) == ("gpu.fault", "critical", 1)


def test_another_process_than_the_first_tells_nobody():
    with receiving() as receiver:
        config = load({**FAMILY, "webhook_config": {"webhook_type": "raw", "callback_url": receiver.url}}).config
        with telling.telling(config, Console(is_main=False), StopRequest()) as events:
            events.stage("validation")

    assert receiver.asked == 0
