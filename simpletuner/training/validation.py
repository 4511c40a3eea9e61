"""Render the validation prompts as the training stands, without disturbing it, and lay them out in grids."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from PIL import ExifTags, Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from simpletuner.adapters.effect import Effect
from simpletuner.models.family import ModelFamily
from simpletuner.models.samplers import use_sampler
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.validation import Validation
from simpletuner.training.assistant import Assistant
from simpletuner.training.attention import Attention
from simpletuner.training.clock import Clock, clocked
from simpletuner.training.prompts import Picture
from simpletuner.training.step import resting

FORMATS = {".webp": "WEBP", ".jpg": "JPEG"}
"""What Pillow calls the formats of files besides PNG."""
SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
"""Of files, by `validation_image_format`."""
FactsOf = Callable[[Picture], Mapping[str, str]]
BASE_LABEL = "base"
"""Names the pictures of the untouched model; those after n steps are named by `label_of`."""
COLUMNS_SHOWN, THUMBNAIL_PX = 12, 256
"""Steps beside the base in the grid over all steps, and the longest side of its pictures: it stays a few megapixels."""
LABEL_PX = 16
"""Height of the line of text above a grid's pictures."""
TEXT_PX, TEXT_LETTERS, LINE_PX = 112, 17, 13
"""Width of the prompts before a grid's rows, letters that fit it, and height of a line."""


class Watcher(Protocol):
    """Sees pictures while they are being made."""

    def at_step(self, step: int) -> None:
        """Learn how many optimizer steps the pictures that follow have behind them."""

    def begin(self, vae: nn.Module) -> None:
        """Make ready, with the VAE that will decode the pictures."""

    def take(self, picture: Picture, done: int, latents: Tensor) -> None:
        """See what a picture has come to after so many sampling steps; `latents` are as its pipeline holds them."""


class Interrupted(Exception):
    """Rendering was given up because the run is to stop."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """What it takes to render a picture with the denoiser in hand."""

    family: ModelFamily
    denoiser: nn.Module
    adapter: Effect
    load_vae: Callable[[], nn.Module]
    """Gives the VAE on the accelerator, loading it if it is not there."""
    text: Callable[[str], Mapping[str, Tensor]]
    """A prompt's cached embeddings, without a batch axis."""
    options: Validation
    diffusion: Diffusion
    device: torch.device
    assistant: Assistant
    attention: Attention
    is_stopped: Callable[[], bool]
    """Asked between sampling steps; once it says yes, rendering ends with `Interrupted`."""
    after_step: Callable[[int], None] | None = None
    """Told how many sampling steps of a picture are done."""
    previews: Watcher | None = None
    """Is shown pictures while they are being made."""

    def render(self, pictures: Sequence[Picture], strength: float, done: Callable[[], None]) -> list[Image.Image]:
        """Render pictures one by one, each from its own seed.

        Raises:
            Interrupted: somebody asked the run to stop.

        Args:
            strength: of the adapter; 0 is the base model.
            done: called after each picture.
        """
        images = []
        with self.at(strength) as render:
            for picture in pictures:
                images.append(render(picture))
                done()
        return images

    @contextmanager
    def at(self, strength: float) -> Iterator[Callable[[Picture], Image.Image]]:
        """Have everything ready to render pictures with the adapter at a strength, and give what renders one; see `render`."""
        self.adapter.set_strength(strength)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            # The pipelines get generators of their own; forking also covers samplers that draw from torch's.
            with (
                torch.random.fork_rng(devices=devices),
                torch.no_grad(),
                resting(self.denoiser, self.adapter),
                self.assistant.in_pictures(),
                self.attention.in_pictures(),
            ):
                vae = self.load_vae()
                if self.previews is not None:
                    self.previews.begin(vae)
                pipeline = self.family.pipeline(self.denoiser, vae, self.diffusion)
                pipeline.set_progress_bar_config(disable=True)
                if self.options.validation_noise_scheduler and self.family.objective == "denoising":
                    use_sampler(pipeline, self.options.validation_noise_scheduler)
                yield partial(self._render_one, pipeline, strength)
        finally:
            self.adapter.set_strength(1.0)

    def _render_one(self, pipeline: Callable[..., object], strength: float, picture: Picture) -> Image.Image:
        if strength and not self.adapter.trains_base:  # that of a picture of its own is no business of the untouched model
            self.adapter.set_strength(picture.changes.get("validation_lycoris_strength", strength))
        options = picture.options(self.options)
        inputs = self.family.pipeline_inputs(self._batched(picture.prompt), self._batched(picture.negative_prompt))
        start = {} if picture.start is None else {"image": picture.start, "strength": self.family.start_strength(self.diffusion)}
        with clocked(pipeline, self.denoiser, self.adapter) as clock:
            result = pipeline(
                **inputs,
                **start,
                width=picture.size.width,
                height=picture.size.height,
                num_inference_steps=options.validation_num_inference_steps,
                **self.family.guidance_arguments(options),
                generator=torch.Generator().manual_seed(picture.seed),
                **self.family.pipeline_callback(partial(self._after_sampling_step, clock, picture)),
            )
        return result.images[0]  # type: ignore[attr-defined]

    def _after_sampling_step(self, clock: Clock, picture: Picture, index: int, latents: Tensor) -> None:
        if self.is_stopped():
            raise Interrupted
        clock.after_step(index)
        if self.after_step is not None:
            self.after_step(index + 1)
        if self.previews is not None:
            self.previews.take(picture, index + 1, latents)

    def _batched(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings in the denoiser's precision, which is another than the text encoders' where all weights are trained."""
        dtype = next(self.denoiser.parameters()).dtype
        return {name: value[None].to(self.device, dtype if value.is_floating_point() else None) for name, value in self.text(prompt).items()}


@dataclass(frozen=True, slots=True)
class Gallery:
    """The pictures of a run on disk: one file each, a grid per step, and one grid over all steps."""

    folder: Path
    suffix: str = ".png"
    """Of single pictures; grids are always PNG."""
    quality: int = 90
    """Of formats that lose something."""

    @property
    def grid(self) -> Path:
        """Where the grid over all steps is, once there is one: a row a picture, a column a step."""
        return self.folder / "grid.png"

    def add(self, step: int, label: str, pictures: Sequence[Picture], images: Sequence[Image.Image], facts: FactsOf) -> Image.Image:
        """Write the pictures of one validation, renew the grids, and give the one over all steps."""
        self.write(step, label, pictures, images, facts)
        own = grid([list(images)], [label], [picture.prompt for picture in pictures])
        write_picture(self.folder / f"{label}_grid.png", own, {"step": str(step)})
        table = self._all_steps(step, pictures)
        write_picture(self.grid, table, {"step": str(step)})
        return table

    def write(self, step: int, label: str, pictures: Sequence[Picture], images: Sequence[Image.Image], facts: FactsOf) -> None:
        """Write pictures alone, as where some of a validation are missing.

        Args:
            facts: gives what the file of a picture says of it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for picture, image in zip(pictures, images):
            write_picture(self._file(label, picture), image, {**facts(picture), "step": str(step)}, self.quality)

    def has(self, label: str, pictures: Sequence[Picture]) -> bool:
        """Whether the pictures of a validation are all there; the grid of their step is written after them."""
        files = [self._file(label, picture) for picture in pictures]
        return all(file.is_file() for file in (*files, self.folder / f"{label}_grid.png"))

    def _file(self, label: str, picture: Picture) -> Path:
        return self.folder / f"{label}_{picture.file_stem}{self.suffix}"

    def move_later(self, step: int, aside: Path) -> None:
        """Move the pictures after `step` to another folder, so that those of a run given up do not stand among this one's."""
        for path in sorted(self.folder.glob("step_*")):
            if step_of(path.name) > step:
                aside.mkdir(parents=True, exist_ok=True)
                path.replace(aside / path.name)

    def _all_steps(self, step: int, pictures: Sequence[Picture]) -> Image.Image:
        """Every label up to `step` that has all its pictures: the base first, then the newest, in small."""
        ending = f"_{pictures[0].file_stem}{self.suffix}"
        labels = [path.name[: -len(ending)] for path in self.folder.iterdir() if path.name.endswith(ending)]
        kept = [label for label in sorted(labels, key=lambda label: (step_of(label), label)) if step_of(label) <= step and self.has(label, pictures)]
        kept = kept[:1] + kept[1:][-COLUMNS_SHOWN:]
        columns = [[_small(self._file(label, picture)) for picture in pictures] for label in kept]
        return grid(columns, kept, [picture.prompt for picture in pictures])


def facts_of(picture: Picture, model_family: str, common: Validation, strength: float) -> dict[str, str]:
    """What a picture's file says of it.

    Args:
        strength: of the adapter, for pictures that have none of their own; 0 is the base model.
    """
    options = picture.options(common)
    real = options.validation_guidance_real
    strength = picture.changes.get("validation_lycoris_strength", strength) if strength else strength
    return {
        "prompt": picture.prompt,
        "negative_prompt": picture.negative_prompt,
        "seed": str(picture.seed),
        "model": model_family,
        **({} if options.validation_guidance is None else {"guidance": f"{options.validation_guidance:g}"}),
        **({"real_guidance": f"{real:g}"} if real != 1 else {}),
        **({"guidance_rescale": f"{options.validation_guidance_rescale:g}"} if options.validation_guidance_rescale else {}),
        **({"sampler": options.validation_noise_scheduler} if options.validation_noise_scheduler else {}),
        "inference_steps": str(options.validation_num_inference_steps),
        "strength": f"{strength:g}",
    }


def write_picture(path: Path, image: Image.Image, facts: Mapping[str, str], quality: int = 90) -> None:
    """Write a picture with text in it, in the format of its suffix; the file is there whole or not at all.

    A PNG has a text for each fact. Other formats have them as JSON in the description of Exif, in ASCII, which is all that it is made for.
    """
    staged = path.with_name(path.name + ".tmp")
    if path.suffix == ".png":
        info = PngInfo()
        for key, value in facts.items():
            info.add_itxt(key, value)
        image.save(staged, format="PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(facts)
        image.save(staged, format=FORMATS[path.suffix], quality=quality, exif=exif)
    staged.replace(path)


def _small(file: Path) -> Image.Image:
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return small


def label_of(step: int) -> str:
    """The first part of a picture's file name, e.g. `step_00200`."""
    return f"step_{step:05d}"


def step_of(name: str) -> int:
    """The step in a label or a file name that begins with one; -1 for the base model's."""
    match = re.match(r"step_(\d+)", name)
    return int(match[1]) if match else -1


def grid(columns: Sequence[Sequence[Image.Image]], labels: Sequence[str], rows: Sequence[str], gap_px: int = 4) -> Image.Image:
    """Lay out labelled columns of pictures on white, the text of each row before it; small pictures are enlarged so that text can be read."""
    scale = max(1, 128 // max(image.width for column in columns for image in column))
    width = max(image.width for column in columns for image in column) * scale
    heights = [max(column[row].height for column in columns) * scale for row in range(len(columns[0]))]
    size = (TEXT_PX + (width + gap_px) * len(columns), LABEL_PX + sum(heights) + gap_px * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (column, label) in enumerate(zip(columns, labels)):
        left, top = TEXT_PX + (width + gap_px) * number, LABEL_PX + gap_px
        draw.text((left, 2), label, fill="black")
        for image, height in zip(column, heights):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image
            sheet.paste(enlarged, (left, top))
            top += height + gap_px
    top = LABEL_PX + gap_px
    for text, height in zip(rows, heights):
        lines = textwrap.wrap(text, TEXT_LETTERS)[: max(1, height // LINE_PX)]
        draw.multiline_text((gap_px, top), "\n".join(lines), fill="black", spacing=2)
        top += height + gap_px
    return sheet
