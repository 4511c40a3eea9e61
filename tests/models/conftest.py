from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.options.models import Models
from tests.builders.auraflow import build_tiny_auraflow


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny AuraFlow; not to be changed."""
    return build_tiny_auraflow(tmp_path_factory.mktemp("models") / "tiny-auraflow")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A tiny AuraFlow to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def auraflow(tiny: Path) -> Callable[..., AuraFlow]:
    """The family with some options; its model is the tiny one unless they say otherwise."""

    def build(**options: Any) -> AuraFlow:
        return AuraFlow(Models(model_family="auraflow", **{"pretrained_model_name_or_path": str(tiny), "tokenizer_max_length": 24, **options}))

    return build
