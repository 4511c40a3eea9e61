"""Which pictures validation renders: prompts with names, sizes and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.validation import Validation
from simpletuner.relaxed_json import load_relaxed
from simpletuner.types import Size

MAIN_NAME = "validation"
"""The short name of `validation_prompt`."""
LONGEST_NAME = 80
"""Bytes of a prompt's part of a file name; file systems allow 255 for the whole."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to render at every validation."""

    name: str
    """Short, unique, fit for a file name."""
    prompt: str
    negative_prompt: str
    size: Size
    seed: int
    start: Image.Image | None = field(default=None, compare=False, repr=False)
    """What a model that improves pictures starts from, of that size."""

    @property
    def file_stem(self) -> str:
        return f"{self.name}_{self.seed}_{self.size}"


def pictures(options: Validation, seed: int, family: ModelFamily) -> list[Picture]:
    """List what to render: every prompt at every resolution, `num_validation_images` seeds each.

    Raises:
        ConfigError: the library cannot be read, or a resolution cannot be used.
    """
    return pictures_of({} if options.validation_disable else named_prompts(options), options, seed, family)


def pictures_of(prompts: Mapping[str, str], options: Validation, seed: int, family: ModelFamily) -> list[Picture]:
    """The same for these prompts, by names that are fit for files."""
    if not prompts:
        return []
    sizes = [parse_size(text, family.alignment_px) for text in options.validation_resolution.split(",")]
    for size in sizes:
        family.check_size(size)
    first = seed if options.validation_seed is None else options.validation_seed
    return [
        Picture(name, prompt, options.validation_negative_prompt or "", size, first + number)
        for name, prompt in prompts.items()
        for size in sizes
        for number in range(options.num_validation_images)
    ]


def prompts_to_show(shown: Sequence[Picture]) -> list[str]:
    """Every text that has to be encoded for these pictures."""
    return [text for picture in shown for text in (picture.prompt, picture.negative_prompt)]


def named_prompts(options: Validation) -> dict[str, str]:
    """The main prompt and those of the library by file-safe names, in order."""
    found: dict[str, str] = {}
    if options.validation_prompt:
        found[MAIN_NAME] = options.validation_prompt
    if options.user_prompt_library:
        for nickname, prompt in read_library(Path(options.user_prompt_library)).items():
            name = file_name_of(nickname)
            while name in found:
                name += "_"
            found[name] = prompt
    return found


def read_library(path: Path) -> dict[str, str]:
    """Read `{nickname: prompt}` or `{nickname: {"prompt": ...}}`."""
    library = load_relaxed(path)
    if not isinstance(library, dict):
        raise ConfigError(f"user_prompt_library {path} is not an object of nicknames and prompts", hint='Write {"nickname": "the prompt"}.')
    prompts: dict[str, str] = {}
    for nickname, entry in library.items():
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise ConfigError(f"user_prompt_library {path}: {nickname!r} has no prompt", hint='Write "nickname": "the prompt".')
        prompts[nickname] = prompt
    return prompts


def file_name_of(nickname: str) -> str:
    """Turn a nickname into a short file name in any script: path and shell characters become underscores."""
    name = re.sub(r"[^\w.+-]+", "_", nickname).strip("._")
    return name.encode()[:LONGEST_NAME].decode(errors="ignore") or "prompt"


def rounded_sizes(options: Validation, alignment_px: int) -> list[str]:
    """Sizes in pixels that are not rendered as they were asked for, a sentence each."""
    found = []
    for text in options.validation_resolution.lower().split(","):
        exact, size = parse_size(text, 1), parse_size(text, alignment_px)
        is_megapixels = "x" not in text and float(text) < 5
        if size != exact and not is_megapixels:
            found.append(f"size {text.strip()} becomes {size}: sides are multiples of {alignment_px}")
    return found


def parse_size(text: str, alignment_px: int) -> Size:
    """Read "1024x768", "1024" (a square's edge) or "1.0" (megapixels below 5), rounded to the model's alignment."""
    text = text.strip().lower()
    match = re.fullmatch(r"(\d+)x(\d+)|(\d+(?:\.\d+)?)", text)
    if not match:
        raise ConfigError(f"validation_resolution {text!r} is not a size", hint='Write "1024x768", "1024", or several with commas.')
    if match[1]:
        width, height = int(match[1]), int(match[2])
    else:
        number = float(match[3])
        width = height = round((number * 1e6) ** 0.5 if number < 5 else number)
    if not width or not height:
        raise ConfigError(f"validation_resolution {text!r} has no pixels", hint='Write "1024x768", "1024", or several with commas.')
    return Size(*(max(alignment_px, round(side / alignment_px) * alignment_px) for side in (width, height)))
