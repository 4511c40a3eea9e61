"""The benchmark of the data room runs; its figures at these sizes mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_every_part_gives_its_figures_as_a_table_and_as_json(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), "--quick", "--json", str(tmp_path / "figures.json")]

    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)

    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"machine", "index", "caching", "loading", "scale"}
    for name in ("index", "caching", "loading"):
        assert 0 < figures[name]["least"] <= figures[name]["ratio"] <= figures[name]["most"]
    assert figures["scale"]["samples"] == 2000 and figures["scale"]["seconds"] > 0
    assert len(result.stdout.splitlines()) == 9
