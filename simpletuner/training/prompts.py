"""Which pictures validation renders: prompts with names, sizes and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.errors import ConfigError, choose
from simpletuner.models.family import ModelFamily
from simpletuner.options.option import checked, options_of
from simpletuner.options.validation import Validation
from simpletuner.relaxed_json import load_relaxed
from simpletuner.types import Size

MAIN_NAME = "validation"
"""The short name of `validation_prompt`."""
LONGEST_NAME = 80
"""Bytes of a prompt's part of a file name; file systems allow 255 for the whole."""
AVERAGED = "ema_"
"""What stands before the names of pictures of averaged weights."""
UNCONDITIONAL = "unconditional"
"""The short name of the empty prompt."""
CHANGES = {
    "num_images": "num_validation_images",
    **{name: f"validation_{name}" for name in ("negative_prompt", "resolution", "seed", "guidance", "guidance_real", "guidance_rescale")},
    **{name: f"validation_{name}" for name in ("num_inference_steps", "lycoris_strength")},
}
"""What a library may say of one prompt, to the option that it takes the place of."""
LIBRARY = {
    "portrait": "a portrait of an old fisherman in a yellow raincoat, soft light from a window",
    "landscape": "a wide valley in autumn with a river, mist between the hills, early morning",
    "animal": "a red fox that sleeps in fresh snow",
    "street": "a busy street market at night in the rain, paper lanterns, reflections on the pavement",
    "interior": "a small kitchen with blue tiles, a bowl of lemons on a wooden table",
    "lettering": 'a shop window with a hand-painted sign that says "OPEN LATE"',
    "drawing": "a pencil drawing of a bicycle that leans on a brick wall",
    "many_things": "a cat, a teapot and three books on a carpet, seen from above",
    "hands": "two hands that knit a green scarf, close up",
}
"""Prompts for `validation_prompt_library`: what models are good and bad at, a subject each."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and what is different for it."""

    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options of validation by their keys, checked."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to render at every validation."""

    name: str
    """Short, unique, fit for a file name."""
    prompt: str
    negative_prompt: str
    size: Size
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options of validation that are others for this picture."""
    start: Image.Image | None = field(default=None, compare=False, repr=False)
    """What a model that improves pictures starts from, of that size."""

    @property
    def file_stem(self) -> str:
        return f"{self.name}_{self.seed}_{self.size}"

    def without(self, key: str) -> Picture:
        """The same picture with an option as it commonly is."""
        return replace(self, changes={name: value for name, value in self.changes.items() if name != key})

    def options(self, common: Validation) -> Validation:
        """The options of this picture."""
        return common.model_copy(update=dict(self.changes))


def pictures(options: Validation, seed: int, family: ModelFamily) -> list[Picture]:
    """List what to render: every prompt at every resolution, `num_validation_images` seeds each.

    Raises:
        ConfigError: the library cannot be read, or a resolution cannot be used.
    """
    return pictures_of({} if options.validation_disable else named_prompts(options), options, seed, family)


def pictures_of(prompts: Mapping[str, Prompt], options: Validation, seed: int, family: ModelFamily) -> list[Picture]:
    """The same for these prompts, by names that are fit for files."""
    return [picture for name, prompt in prompts.items() for picture in _pictures_of(name, prompt, options, seed, family)]


def _pictures_of(name: str, prompt: Prompt, common: Validation, seed: int, family: ModelFamily) -> list[Picture]:
    options = common.model_copy(update=dict(prompt.changes))
    sizes = [parse_size(text, family.alignment_px) for text in options.validation_resolution.split(",")]
    for size in sizes:
        family.check_size(size)
    first = seed if options.validation_seed is None else options.validation_seed
    return [
        Picture(name, prompt.text, options.validation_negative_prompt or "", size, first + number, prompt.changes)
        for size in sizes
        for number in range(options.num_validation_images)
    ]


def prompts_to_show(shown: Sequence[Picture]) -> list[str]:
    """Every text that has to be encoded for these pictures."""
    return [text for picture in shown for text in (picture.prompt, picture.negative_prompt)]


def named_prompts(options: Validation) -> dict[str, Prompt]:
    """The main prompt, those of the libraries, and the empty one, by file-safe names, in order."""
    found: dict[str, Prompt] = {}
    if options.validation_prompt:
        found[MAIN_NAME] = Prompt(options.validation_prompt)
    libraries = {name: Prompt(text) for name, text in LIBRARY.items()} if options.validation_prompt_library else {}
    if options.user_prompt_library:
        libraries |= read_library(Path(options.user_prompt_library))
    if options.validation_unconditional:
        libraries |= {UNCONDITIONAL: Prompt("")}
    for nickname, prompt in libraries.items():
        name = file_name_of(nickname)
        name = f"prompt_{name}" if name.startswith(AVERAGED) else name  # else its files would look like those of averaged weights
        found[free_name(name, found)] = prompt
    return found


def free_name(name: str, taken: Mapping[str, object]) -> str:
    """The name, or one like it that is not taken yet."""
    while name in taken:
        name += "_"
    return name


def read_library(path: Path) -> dict[str, Prompt]:
    """Read `{nickname: prompt}` or `{nickname: {"prompt": ..., and what is different for it}}`.

    Raises:
        ConfigError: it is something else, or says what is not known or not allowed; all of that at once.
    """
    library = load_relaxed(path)
    if not isinstance(library, dict):
        raise ConfigError(f"user_prompt_library {path} is not an object of nicknames and prompts", hint='Write {"nickname": "the prompt"}.')
    problems: list[str] = []
    found = {nickname: _read_prompt(nickname, entry, problems) for nickname, entry in library.items()}
    if problems:
        hint = 'Write "nickname": "the prompt", or an object with "prompt" in it.'
        raise ConfigError(f"user_prompt_library {path}: {'; '.join(problems)}", hint=hint)
    return found


def _read_prompt(nickname: str, entry: object, problems: list[str]) -> Prompt:
    """Read one entry; what is wrong with it goes into `problems`."""
    given = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    text = given.pop("prompt", None)
    if not isinstance(text, str):
        problems.append(f"{nickname!r} has no prompt")
        return Prompt("")
    given = {name: value for name, value in given.items() if value is not None}
    for name in [name for name in given if name not in CHANGES]:
        problems.append(f"{nickname!r} says {name!r}, which is unknown. {choose(name, CHANGES, 'settings of a prompt')}")
        del given[name]
    changes, wrong = checked(Validation, {CHANGES[name]: value for name, value in given.items()})
    names = {key: name for name, key in CHANGES.items()}
    problems += [f"{nickname!r} says {names[key]} {given[names[key]]!r}, which is not {options_of(Validation)[key].rule}" for key in wrong]
    return Prompt(text, changes)


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
