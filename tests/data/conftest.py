"""Real files and a plan around them, for the tests of this room."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.console import Console
from simpletuner.data.plan import DataPlan, ImageDataset, load_plan
from simpletuner.options.data import Data


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said() -> io.StringIO:
    """What the console printed."""
    return io.StringIO()


@pytest.fixture
def console(said: io.StringIO) -> Console:
    return Console(stream=said)


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Make a picture of noise that differs by seed, of which no format loses everything."""

    def make(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
        low = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def save(workplace: Path, picture: Callable[..., Image.Image]) -> Callable[..., Path]:
    """Save a picture into the dataset's folder `images`, in the format of its suffix."""

    def write(name: str, width: int = 48, height: int = 32, seed: int = 0, **arguments: Any) -> Path:
        path = workplace / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height, seed).save(path, **arguments)
        return path

    return write


@pytest.fixture
def plan_of(workplace: Path) -> Callable[..., DataPlan]:
    """Write entries to multidatabackend.json and load it; keywords are options of config.json."""

    def load(*entries: Any, variables: dict[str, str] | None = None, alignment_px: int = 8, **options: Any) -> DataPlan:
        path = workplace / "multidatabackend.json"
        path.write_text(json.dumps(list(entries)), encoding="utf-8")
        options = {"resolution": 32, **options}
        return load_plan(path, Data(**options), {"model_family": "auraflow", "output_dir": "output", **(variables or {})}, alignment_px=alignment_px)

    return load


@pytest.fixture
def dataset_of(workplace: Path, plan_of: Callable[..., DataPlan]) -> Callable[..., ImageDataset]:
    """Plan one dataset over the folder `images`."""

    def make(**keys: Any) -> ImageDataset:
        (workplace / "images").mkdir(exist_ok=True)
        return plan_of({"id": "set", "instance_data_dir": "images", **keys}).datasets[0]

    return make
