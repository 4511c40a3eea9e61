"""Makes the recipe of the `digits` example importable: scripts that ship beside the package's data, not modules of it."""

from __future__ import annotations

import sys
from pathlib import Path

import simpletuner

RECIPE = Path(simpletuner.__file__).parent / "examples" / "digits-base"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(RECIPE), str(BENCHMARKS)]
