"""Quantised bases among what `simpletuner cache` lists, verifies and clears out."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from simpletuner.memory.quantisers.quanto import Quanto
from simpletuner.memory.weight_store import ABOUT
from tests.builders.run import train_in_process, write_run
from tests.cli.commands.test_cache import cache

OPTIONS = {"base_model_precision": "int8-quanto", "max_train_steps": 1, "mixed_precision": "bf16"}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """A run on a quantised base that has ended."""
    folder = tmp_path_factory.mktemp("quantised")
    write_run(folder, **OPTIONS)
    assert train_in_process(folder) == 0
    return folder


@pytest.fixture
def run(quantised, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which one stands; gives the folder of its weights."""
    shutil.copytree(quantised, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    (folder,) = Path("cache/weights").iterdir()
    return folder


def weights_in(shown: str) -> list[dict]:
    return [row for row in json.loads(shown) if row["folder"].startswith("cache/weights/")]


def test_ls_tells_the_base_the_precision_the_bytes_and_when_it_was_read_last(run, capsys):
    (row,) = weights_in(cache(capsys, "ls", "--json", "--config", "config.json")[1])

    assert row["folder"] == str(run) and row["entries"] == 24
    assert row["about"] == {"kind": "weights", "base": "transformer of model", "precision": "int8-quanto", "dtype": "bfloat16", "device": "cpu"}
    assert row["bytes"] == sum(path.stat().st_size for path in run.iterdir())
    assert abs(row["last_used"] - time.time()) < 600
    shown = cache(capsys, "ls", "cache/weights")[1]
    assert "weights transformer of model, int8-quanto," in " ".join(shown.split()) and "bfloat16, on cpu" in shown


def test_a_run_that_reads_them_is_noted(run):
    for path in run.iterdir():
        os.utime(path, (1e9, 1e9))

    assert train_in_process(Path(), "--max_train_steps", "2") == 0

    assert time.time() - (run / "complete.json").stat().st_mtime < 600


def test_verify_finds_a_single_changed_byte_and_what_a_run_makes_of_a_dropped_base_is_the_same(run, capsys):
    code, shown, _ = cache(capsys, "verify", "cache/weights")
    assert code == 0 and f"{run}: 24 entries, all whole" in " ".join(shown.split())
    shard = next(run.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    code, shown, _ = cache(capsys, "verify", "--config", "config.json")
    assert code == 3 and f"{shard.name}: its bytes are not those that were written" in " ".join(shown.split())
    assert cache(capsys, "verify", "cache/weights", "--delete")[0] == 3 and not run.exists()

    assert train_in_process(Path(), "--max_train_steps", "2") == 0
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("harm", ["a missing file", "a missing seal", "no digest, cut short", "no digest"])
def test_verify_tells_what_is_no_whole_base(run, capsys, harm):
    shard = next(run.glob("*.safetensors"))
    if harm.startswith("no digest"):  # as an earlier release kept them
        (run / ABOUT).unlink()
    if harm.endswith("cut short"):
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm != "no digest":
        (shard if harm == "a missing file" else run / "complete.json").unlink()

    assert cache(capsys, "verify", "cache/weights")[0] == (0 if harm == "no digest" else 3)
    assert cache(capsys, "ls", "cache/weights")[0] == 0


def test_gc_keeps_the_base_that_a_run_uses_and_drops_that_of_another_precision(run, capsys, monkeypatch):
    other = run.with_name("int8-quanto-of-another-base")
    shutil.copytree(run, other)
    shutil.copytree(run, run.with_name(f"{run.name}.999999999.tmp"))  # of a run that was killed

    code, shown, _ = cache(capsys, "gc", "--config", "config.json", "--dry-run", "--json")
    rows = {row["folder"]: (row["kept"], row["dropped"]) for row in weights_in(shown)}
    assert code == 0 and rows == {str(run): (24, 0), str(other): (0, 24)} and other.is_dir()
    assert cache(capsys, "gc", "--config", "config.json")[0] == 0

    assert list(Path("cache/weights").iterdir()) == [run]
    monkeypatch.setattr(Quanto, "quantise", None)
    assert train_in_process(Path(), "--max_train_steps", "2") == 0


def test_gc_keeps_what_another_config_uses_and_drops_all_for_one_that_quantises_nothing(run, capsys):
    options = json.loads(Path("config.json").read_text())
    Path("plain.json").write_text(json.dumps({**options, "base_model_precision": "no_change"}))
    Path("fp8.json").write_text(json.dumps({**options, "base_model_precision": "fp8-quanto"}))

    code, _, said = cache(capsys, "gc", "--config", "fp8.json", "--json")
    assert code == 0 and "so none is dropped" in " ".join(said.split()) and run.is_dir()
    assert cache(capsys, "gc", "--config", "plain.json", "--also", "config.json")[0] == 0 and run.is_dir()
    assert cache(capsys, "gc", "cache/weights", "--config", "plain.json")[0] == 0

    assert not run.exists() and Path("cache/text").is_dir()


def test_gc_by_age_alone_needs_no_config(run, capsys):
    os.utime(run / "complete.json", (time.time() - 40 * 86400,) * 2)

    assert cache(capsys, "gc", "cache/weights", "--older-than", "50")[0] == 0 and run.is_dir()
    assert cache(capsys, "gc", "cache/weights", "--older-than", "30")[0] == 0 and not run.exists()


def test_gc_touches_no_base_of_another_config(run, capsys):
    shutil.copytree("cache/weights", "elsewhere/weights")

    code, _, said = cache(capsys, "gc", "elsewhere/weights", "--config", "config.json")

    assert code == 2 and "elsewhere/weights holds quantised bases that are not of this config" in " ".join(said.split())
    assert (Path("elsewhere/weights") / run.name).is_dir()
