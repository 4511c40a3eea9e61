"""The benchmarks of a GPU go through all their parts on a CPU with tiny models, and go on where they stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.page import page

ROOT = Path(__file__).parents[2]


def run(folder: Path, seconds: int = 500, **changes: str) -> subprocess.CompletedProcess[str]:
    given = {"DEVICE": "cpu", "SIZE": "tiny", "FIRST": "1", "ROUNDS": "2", "STEPS": "1", "PARTS": "memory speed", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **given, "RESULTS": str(folder), "PYTHON": sys.executable, **changes}
    return subprocess.run([str(ROOT / "benchmarks" / "gpu.sh"), str(seconds)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a script for bash")
def test_every_part_is_measured_once_and_shown(tmp_path):
    first = run(tmp_path)
    [file] = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    again = run(tmp_path, PARTS="speed", FIRST="1")

    assert first.returncode == 0, first.stderr
    kinds = {case["kind"]: case for case in content["cases"].values()}
    assert set(kinds) == {"memory", "speed"} and not any("left_out" in case for case in kinds.values()), content
    assert set(kinds["speed"]["contenders"]) == {"ours", "floor", "library", "peer"}
    assert kinds["speed"]["contenders"]["ours"]["trainable"] == kinds["speed"]["contenders"]["floor"]["trainable"]
    assert kinds["speed"]["ran_out"] == 0 and 0 < kinds["speed"]["useful"]["of_square"] < 1
    assert {"load", "step"} <= kinds["memory"]["planned"].keys()
    assert "auraflow tiny, lokr, bf16" in first.stdout and page([content]).startswith("# Benchmarks")
    assert again.returncode == 0 and json.loads(file.read_text())["cases"] == content["cases"]


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = run(tmp_path, DEVICE="cuda")

    assert result.returncode == 2 and "DEVICE=cpu" in result.stderr
