"""The plan of the phases besides the step against the same phases with numbers."""

from __future__ import annotations

import pytest

from benchmarks.memory import phases
from tests.training.families import TINY
from tests.training.test_plan import config_of


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("name", ["auraflow", "sdxl"])
def test_the_other_phases_are_within_five_percent_of_what_they_take(tmp_path, name, precision):
    options = {"base_model_precision": precision, "mixed_precision": "bf16", "validation_prompt": "a cat", "validation_resolution": "64"}
    config = config_of(name, tmp_path, "lora", **options)
    size = type(TINY[name].size)(64, 64)

    found = phases(config, size)

    assert set(found) == {"text", "vae", "load", "validation"}
    for phase, (planned, measured) in found.items():
        assert planned == pytest.approx(measured, rel=0.05), phase
