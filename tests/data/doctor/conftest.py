"""A doctor for the datasets that a test makes, and looks at images without files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data.doctor.examine import examine
from simpletuner.data.doctor.findings import ModelFacts, Problem, Report
from simpletuner.data.plan import load_plan
from simpletuner.options.data import Data
from simpletuner.options.training import Training
from tests.builders.demonstration import MODEL, landscape


@pytest.fixture
def draw(workplace: Path) -> Callable[..., Path]:
    """Save a landscape into a folder of the workplace."""

    def write(name: str, width: int = 96, height: int = 64, seed: int = 0, **arguments: Any) -> Path:
        path = workplace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        landscape(width, height, seed).save(path, **arguments)
        return path

    return write


@pytest.fixture
def check(workplace: Path, console: Any) -> Callable[..., Report]:
    """Examine datasets given as entries; those named in `evals` are for evaluation."""

    def run(
        *entries: dict[str, Any],
        evals: Sequence[str] = (),
        model: ModelFacts = MODEL,
        training: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Report:
        entries = entries or ({"id": "set", "instance_data_dir": "images", "caption_strategy": "filename"},)
        path = workplace / "multidatabackend.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        data = Data(resolution=32, cache_dir=Path("cache"), **(options or {}))
        plan = load_plan(path, data, {"model_family": "auraflow", "output_dir": "output"}, alignment_px=8, checks_places=False)
        datasets = tuple(
            replace(one, options=one.options.model_copy(update={"dataset_type": "eval"})) if one.id in evals else one for one in plan.datasets
        )
        return examine(replace(plan, datasets=datasets), "the test", data, Training(**(training or {})), model, console, **arguments)

    return run


@pytest.fixture
def problems() -> Callable[..., list[Problem]]:
    """The problems of one kind."""

    def of(report: Report, kind: str) -> list[Problem]:
        return [problem for problem in report.problems if problem.kind == kind]

    return of
