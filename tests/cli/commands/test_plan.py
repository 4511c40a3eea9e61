"""`simpletuner plan`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from simpletuner.cli.commands.plan import absent
from simpletuner.cli.main import main
from tests.builders.run import write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_run(tmp_path, validation_prompt="a cat", validation_resolution="32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_has_the_phases_and_the_peaks_and_nothing_is_written(folder, capsys):
    before = sorted(folder.rglob("*"))

    assert main(["plan", "--config", "config.json", "--json", "--train_batch_size", "1"]) == 0

    said = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in said["phases"]] == ["text", "vae", "load", "step", "validation", "save"]
    assert said["peak_vram_bytes"] == max(phase["vram_bytes"] for phase in said["phases"])
    assert said["peak_ram_bytes"] == max(phase["ram_bytes"] for phase in said["phases"])
    assert said["card_bytes"] == said["peak_vram_bytes"] + said["cuda_bytes"]
    assert (said["picture"], said["batch_size"]) == ("32x32", 1)
    assert sorted(folder.rglob("*")) == before


def test_the_table_says_what_the_step_is_made_of(folder, capsys):
    assert main(["plan", "--config", "config.json", "--device", "cpu"]) == 0

    said = capsys.readouterr().out
    assert "2 x 32x32" in said and "activations" in said and "CUDA" not in said


def test_what_does_not_fit_ends_with_its_own_exit_code(folder, capsys):
    assert main(["plan", "--config", "config.json", "--fit", "500MB", "--json", "--train_batch_size", "1", "--gradient_checkpointing", "true"]) == 4

    said = json.loads(capsys.readouterr().out)
    assert said["fit"]["fits"] is False
    assert all(change["rule"] for change in said["fit"]["changes"])
    assert said["phases"] == said["fit"]["plan"]["phases"]
    assert said["peak_vram_bytes"] < said["fit"]["before"]["peak_vram_bytes"]


def test_what_fits_is_told_with_lines_to_paste(folder, capsys):
    assert main(["plan", "--config", "config.json", "--fit", "24GB"]) == 0

    said = capsys.readouterr().out
    assert "fits 24GB as it is" in said
    peak, with_cuda = (
        float(next(line for line in said.splitlines() if line.startswith(row)).split()[-count]) for row, count in (("peak", 2), ("with CUDA", 1))
    )
    assert with_cuda - peak == pytest.approx(0.6, abs=0.011)


@pytest.mark.parametrize("arguments", [["--fit", "plenty"], ["--fit", "12"], ["--fit", "12GB", "--device", "cpu"]])
def test_a_size_that_is_none_is_refused(folder, arguments):
    assert main(["plan", "--config", "config.json", *arguments]) == 2


def test_packages_that_a_plan_does_without_are_back_afterwards():
    import scipy

    with absent(("scipy", "a_package_that_is_not_there")):
        assert importlib.util.find_spec("scipy") is not None  # it was imported before
        assert importlib.util.find_spec("a_package_that_is_not_there") is None
        assert "a_package_that_is_not_there" in sys.modules

    assert sys.modules["scipy"] is scipy and "a_package_that_is_not_there" not in sys.modules


@pytest.mark.slow
def test_nothing_but_the_plan_is_said(folder):
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", "plan", "--config", "config.json", "--base_model_precision", "int8-quanto"],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
