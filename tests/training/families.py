"""The tiny models of all families, for tests that hold every family to the same contract."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from simpletuner.cli.choices import family_of
from simpletuner.models.family import ModelFamily
from simpletuner.options.models import Models
from tests.builders.auraflow import build_tiny_auraflow
from tests.builders.flux import build_tiny_flux
from tests.builders.sd3 import build_tiny_sd3
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family, and how the plain pipeline is called as validation calls it."""

    build: Callable[..., Path]
    takes_negative: bool = True
    tokenizer_max_length: int | None = None


TINY = {
    "auraflow": Tiny(build_tiny_auraflow, tokenizer_max_length=24),
    "sd1x": Tiny(build_tiny_sd1),
    "sdxl": Tiny(build_tiny_sdxl),
    "sd3": Tiny(build_tiny_sd3, tokenizer_max_length=24),
    "flux": Tiny(build_tiny_flux, takes_negative=False, tokenizer_max_length=24),
}


@functools.cache
def model(name: str, **options: Any) -> Path:
    """One tiny model a test process."""
    return TINY[name].build(Path(tempfile.mkdtemp(prefix=f"tiny-{name}-")), **options)


def family(name: str, folder: Path | None = None) -> ModelFamily:
    options = Models(
        model_family=name, pretrained_model_name_or_path=str(folder or model(name)), tokenizer_max_length=TINY[name].tokenizer_max_length
    )
    return family_of(name)(options)


def pipeline_of(name: str, folder: Path | None = None) -> Any:
    """The pipeline as a user of diffusers loads it."""
    extra = {"safety_checker": None} if name == "sd1x" else {}
    pipeline = getattr(diffusers, family_of(name).pipeline_class).from_pretrained(folder or model(name), **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def options_of(name: str) -> dict[str, Any]:
    """What a run of this family has in its config.json."""
    return {"model": model(name), "model_family": name, "tokenizer_max_length": TINY[name].tokenizer_max_length}
