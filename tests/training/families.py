"""The tiny models of all families, for tests that hold every family to the same contract."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from PIL import Image

from simpletuner.cli.choices import family_of
from simpletuner.models.family import ModelFamily
from simpletuner.models.flow import pack
from simpletuner.options.models import Models
from simpletuner.types import Size
from tests.builders.auraflow import build_tiny_auraflow
from tests.builders.chroma import build_tiny_chroma
from tests.builders.flux import build_tiny_flux
from tests.builders.flux2 import build_tiny_flux2, build_tiny_flux2_dev
from tests.builders.lumina2 import build_tiny_lumina2
from tests.builders.pixart import build_tiny_pixart
from tests.builders.qwen_image import build_tiny_qwen_image
from tests.builders.sana import INSTRUCTION, build_tiny_sana
from tests.builders.sd3 import build_tiny_sd3
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl, build_tiny_sdxl_refiner
from tests.builders.z_image import build_tiny_z_image


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


def as_they_are(latents: torch.Tensor) -> torch.Tensor:
    return latents


Encoded = dict[str, torch.Tensor]
SMALL = Size(32, 48)


def both_ways(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    """With what the pipeline says before a prompt, and without, as it reads negative ones; empty ones are read so in any case."""
    prompt, mask, negative, negative_mask = pipeline.encode_prompt(list(captions), True, negative_prompt=list(captions), device="cpu", **text)
    for row, caption in enumerate(captions):
        if not caption:
            prompt[row], mask[row] = negative[row], negative_mask[row]
    return {"prompt": prompt, "mask": mask, "negative": negative, "negative_mask": negative_mask}


def instructed(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    return both_ways(pipeline, captions, complex_human_instruction=INSTRUCTION, **text)


def of_several_lengths(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    """The pipeline leaves no padding."""
    states, _ = pipeline.encode_prompt(list(captions), "cpu", do_classifier_free_guidance=False, **text)
    return filled(states, text["max_sequence_length"])


def up_to_the_longest(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    """The pipeline leaves as much padding as the others of a batch need."""
    states, mask = pipeline.encode_prompt(list(captions), "cpu", **text)
    return filled([row[seen.bool()] for row, seen in zip(states, mask)], text["max_sequence_length"])


def with_pooled(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    prompt, _, pooled, _ = pipeline.encode_prompt(list(captions), device="cpu", do_classifier_free_guidance=False, **text)
    return {"prompt": prompt, "pooled": pooled}


def zero_where_padded(pipeline: Any, captions: list[str], **text: Any) -> Encoded:
    """The pipeline leaves states of padding, which the mask hides."""
    prompt, mask, *_ = pipeline.encode_prompt(list(captions), False, device="cpu", **text)
    return {"prompt": prompt * mask[..., None], "mask": mask}


def filled(states: Sequence[torch.Tensor], tokens: int) -> Encoded:
    prompt, mask = torch.zeros(len(states), tokens, states[0].shape[-1]), torch.zeros(len(states), tokens, dtype=torch.long)
    for row, value in enumerate(states):
        prompt[row, : len(value)], mask[row, : len(value)] = value, 1
    return {"prompt": prompt, "mask": mask}


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
    is_reversed: bool = False
    """Whether its own time runs from noise to data."""
    tokenizer_max_length: int | None = None
    family: str | None = None
    """Where the row is not named by it."""
    text: Callable[..., Encoded] | None = None
    """What the pipeline makes of captions, where it is more than the tensor that its encode_prompt gives first."""
    size: Size = SMALL
    """A picture that is no square."""
    unguided: float = 1.0
    """What the pipeline calls no guidance."""
    strength: float | None = None
    """Share of the steps that is made of a picture, of a model that improves pictures."""
    is_brief: bool = False
    """Whether what costs most is left to families that are trained and saved alike."""

    def time(self, told: Any) -> Any:
        """The time that the denoiser is told, as 0 at data and 1 at noise."""
        return 1 - told / self.time_scale if self.is_reversed else told / self.time_scale


TINY = {
    "auraflow": Tiny(build_tiny_auraflow, tokenizer_max_length=24),
    "sd1x": Tiny(build_tiny_sd1, time_scale=1000),
    "sdxl": Tiny(build_tiny_sdxl, time_scale=1000),
    "sdxl-refiner": Tiny(build_tiny_sdxl_refiner, time_scale=1000, family="sdxl", text=with_pooled, strength=0.5),
    "sd3": Tiny(build_tiny_sd3, time_scale=1000, tokenizer_max_length=24),
    "flux": Tiny(build_tiny_flux, one_prompt, pack, tokenizer_max_length=24),
    "flux2": Tiny(build_tiny_flux2, negative_as_embeddings, cells, tokenizer_max_length=24),
    "flux2-dev": Tiny(build_tiny_flux2_dev, one_prompt, cells, tokenizer_max_length=24, family="flux2"),
    "chroma": Tiny(build_tiny_chroma, masks_as_truth_values, pack, tokenizer_max_length=24),
    "sana": Tiny(build_tiny_sana, time_scale=1000, tokenizer_max_length=24, text=instructed, size=Size(32, 64), is_brief=True),
    "lumina2": Tiny(build_tiny_lumina2, is_reversed=True, tokenizer_max_length=24, text=both_ways, is_brief=True),
    "z_image": Tiny(
        build_tiny_z_image, packed=as_they_are, is_reversed=True, tokenizer_max_length=24, text=of_several_lengths, unguided=0.0, is_brief=True
    ),
    "pixart": Tiny(build_tiny_pixart, time_scale=1000, tokenizer_max_length=24, text=zero_where_padded),
    "qwen_image": Tiny(build_tiny_qwen_image, packed=pack, tokenizer_max_length=24, text=up_to_the_longest, is_brief=True),
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
    options = {"model": model(name), "model_family": TINY[name].family or name, "tokenizer_max_length": TINY[name].tokenizer_max_length}
    if TINY[name].strength is None:
        return options
    return {**options, "refiner_training": True, "refiner_training_strength": TINY[name].strength, "validation_start_image": str(start_file(name))}


def start_file(name: str) -> Path:
    """The picture that a model which improves pictures starts from, of the size of its pictures."""
    path, size = model(name).with_suffix(".png"), TINY[name].size
    if not path.is_file():
        pixels = numpy.random.default_rng(3).integers(0, 255, (size.height, size.width, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(path)
    return path


def steps_of(name: str, steps: int) -> dict[str, Any]:
    """Arguments with which the plain pipeline makes so many steps."""
    strength = TINY[name].strength
    if strength is None:
        return {"num_inference_steps": steps}
    return {"num_inference_steps": round(steps / strength), "strength": strength, "image": Image.open(start_file(name))}
