"""The tiny models of all families, for tests that hold every family to the same contract."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from simpletuner.cli.choices import family_of
from simpletuner.models.family import ModelFamily
from simpletuner.models.flow import pack
from simpletuner.options.models import Models
from tests.builders.auraflow import build_tiny_auraflow
from tests.builders.chroma import build_tiny_chroma
from tests.builders.flux import build_tiny_flux
from tests.builders.flux2 import build_tiny_flux2, build_tiny_flux2_dev
from tests.builders.sd3 import build_tiny_sd3
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl


def both_prompts(pipeline: Any, **text: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "negative_prompt": "blurry"}


def one_prompt(pipeline: Any, **text: Any) -> dict[str, Any]:
    """Of a model distilled from guidance."""
    return {"prompt": "a cat"}


def negative_as_embeddings(pipeline: Any, **text: Any) -> dict[str, Any]:
    """The pipeline takes no words here."""
    return {"prompt": "a cat", "negative_prompt_embeds": pipeline.encode_prompt("blurry", **text)[0]}


def masks_as_truth_values(pipeline: Any, **text: Any) -> dict[str, Any]:
    """ChromaPipeline (to diffusers 0.42 at least) makes numbers of its own masks, which attention adds to its scores."""
    prompt, _, mask, negative, _, negative_mask = pipeline.encode_prompt("a cat", "blurry", **text)
    embeddings = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    return {**embeddings, "prompt_attention_mask": mask.bool(), "negative_prompt_attention_mask": negative_mask.bool()}


def cells(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to cells of 2 x 2, (B, 4 C, h/2, w/2)."""
    return diffusers.Flux2Pipeline._patchify_latents(latents)


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family, and how the plain pipeline is called as validation calls it."""

    build: Callable[..., Path]
    prompts: Callable[..., dict[str, Any]] = both_prompts
    """The pipeline's arguments for the prompt "a cat" and the negative prompt "blurry"."""
    packed: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Latents (B, C, h, w) to the form in which the pipeline takes them, where that is another."""
    time_scale: int = 1
    """What the denoiser is told at pure noise."""
    tokenizer_max_length: int | None = None
    family: str | None = None
    """Where the row is not named by it."""


TINY = {
    "auraflow": Tiny(build_tiny_auraflow, tokenizer_max_length=24),
    "sd1x": Tiny(build_tiny_sd1, time_scale=1000),
    "sdxl": Tiny(build_tiny_sdxl, time_scale=1000),
    "sd3": Tiny(build_tiny_sd3, time_scale=1000, tokenizer_max_length=24),
    "flux": Tiny(build_tiny_flux, one_prompt, pack, tokenizer_max_length=24),
    "flux2": Tiny(build_tiny_flux2, negative_as_embeddings, cells, tokenizer_max_length=24),
    "flux2-dev": Tiny(build_tiny_flux2_dev, one_prompt, cells, tokenizer_max_length=24, family="flux2"),
    "chroma": Tiny(build_tiny_chroma, masks_as_truth_values, pack, tokenizer_max_length=24),
}


@functools.cache
def model(name: str, **options: Any) -> Path:
    """One tiny model a test process."""
    return TINY[name].build(Path(tempfile.mkdtemp(prefix=f"tiny-{name}-")), **options)


def family(name: str, folder: Path | None = None) -> ModelFamily:
    kind, length = TINY[name].family or name, TINY[name].tokenizer_max_length
    return family_of(kind)(Models(model_family=kind, pretrained_model_name_or_path=str(folder or model(name)), tokenizer_max_length=length))


def pipeline_of(name: str, folder: Path | None = None) -> Any:
    """The pipeline as a user of diffusers loads it."""
    extra = {"safety_checker": None} if name == "sd1x" else {}
    pipeline = getattr(diffusers, family(name).pipeline_class).from_pretrained(folder or model(name), **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def options_of(name: str) -> dict[str, Any]:
    """What a run of this family has in its config.json."""
    return {"model": model(name), "model_family": TINY[name].family or name, "tokenizer_max_length": TINY[name].tokenizer_max_length}
