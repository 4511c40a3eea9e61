"""A whole run keeps its report, goes on with it, and is not stopped by it; `simpletuner watch` shows it while it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

from simpletuner.reporting.report.state import load
from tests.builders.report import content_in
from tests.builders.run import ROOT, adapter_bytes, train_in_process, write_run

REPORTING = {
    "run_report": True,
    "plan_memory": True,
    "validation_prompt": "</script><b>a picture</b>",
    "validation_resolution": "32",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "resume_from_checkpoint": "latest",
}


def test_a_run_writes_its_report_and_a_resumed_one_goes_on_with_it(tmp_path, capsys):
    write_run(tmp_path, **REPORTING)

    assert train_in_process(tmp_path) == 0

    assert "output/report.html" in capsys.readouterr().out
    content = content_in((tmp_path / "output/report.html").read_text(encoding="utf-8"))
    assert content["status"] == "finished" and content["step"] == content["total_steps"] == 4 and content["checkpoints"] == [2, 4]
    assert list(content["samples"]["labels"]) == ["base", "step_00002", "step_00004"]
    assert content["samples"]["rows"][0]["said"]["prompt"] == REPORTING["validation_prompt"]
    assert [(one["id"], one["buckets"]) for one in content["facts"]["datasets"]] == [("pictures", [["32x32", 6]])]
    assert len(content["crops"]) == 6 and all(one["thumbnail"] for one in content["crops"])
    assert {"caching text", "caching images", "loading", "training", "validation", "saving"} <= content["phases"].keys()
    assert len(content["curves"]["loss"]) == 4 and content["facts"]["planned"] and content["changes"] is None
    assert {row["key"]: row["origin"] for row in content["settings"]}["max_train_steps"] == "config.json"
    assert str(tmp_path) not in (tmp_path / "output/report.html").read_text(encoding="utf-8")
    before = adapter_bytes(tmp_path)

    assert train_in_process(tmp_path, "--max_train_steps", "6") == 0

    content = content_in((tmp_path / "output/report.html").read_text(encoding="utf-8"))
    assert [one[0] for one in content["curves"]["loss"]] == [1, 2, 3, 4, 5, 6] and content["starts"] == 2
    assert content["changes"] == [{"key": "max_train_steps", "before": "4", "now": "6"}]
    assert adapter_bytes(tmp_path) != before


def test_a_report_that_cannot_be_written_is_named_once_and_the_run_is_the_same(tmp_path, capsys):
    write_run(tmp_path, **{**REPORTING, "validation_prompt": None, "plan_memory": False, "max_train_steps": 3})
    (tmp_path / "output/report").mkdir(parents=True)
    (tmp_path / "output/report/report.json").mkdir()  # whose place no file can take

    assert train_in_process(tmp_path) == 0

    said = capsys.readouterr().out
    assert said.count("the report of the run cannot be renewed") == 1 and not (tmp_path / "output/report.html").exists()


def test_watch_shows_a_run_and_ends_by_ctrl_c(tmp_path):
    write_run(tmp_path, **{**REPORTING, "validation_prompt": None, "plan_memory": False, "max_train_steps": 2})
    assert train_in_process(tmp_path) == 0
    line = [sys.executable, "-m", "simpletuner", "watch", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    watching = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = watching.stdout.readline()
    url = re.search(r"http://127\.0\.0\.1:\d+/", said)
    assert url, said + watching.stdout.read()
    with urllib.request.urlopen(f"{url[0]}content.json", timeout=10) as answer:
        content = json.load(answer)
    watching.send_signal(signal.SIGINT)

    assert watching.wait(10) == 0 and watching.stdout.read() == ""
    assert content["step"] == 2 and content["live"] is True and load(tmp_path / "output").status == "finished"
