"""The examples for released models: one a family, and one a method. What they have in common is in `rendering.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.errors import ConfigError

CARDS_GB = (8, 12, 16, 24, 48)
"""Cards that settings are kept for."""
USUAL_CARD_GB = 24
SUBJECT, STYLE = "datasets/my-subject", "datasets/my-style"
OF_SUBJECT = ("a photo of ohwx dog on a beach", "an oil painting of ohwx dog", "a photo of a lighthouse at dusk")
OF_STYLE = ("ohwx style, a fox in the snow", "ohwx style, a street at night", "a photo of a lighthouse at dusk")
LORA: Mapping[str, Any] = {"lora_type": "standard"}
LOKR: Mapping[str, Any] = {"lora_type": "lycoris"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """An example that is written when it is copied."""

    family: str
    method: str
    """As the list shows it."""
    summary: str
    answers: Mapping[str, Any] = field(default_factory=dict)
    """What is decided, by key of the wizard; all else is proposed."""
    pictures: str = SUBJECT
    captions: tuple[str, ...] = OF_SUBJECT
    """That its pictures may have, the first is the validation prompt; the last is without what is learned, to see that it stays."""
    of_pictures: Mapping[str, Any] = field(default_factory=dict)
    """Keys of its dataset beyond those that the wizard writes."""
    regularisation: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a second dataset, which shows what is to stay; none without."""


def lora(family: str, model: str) -> Recipe:
    return Recipe(family, "LoRA", f"A LoRA of a subject for {model}, from pictures with captions.", LORA)


def lokr(family: str, model: str) -> Recipe:
    return Recipe(family, "LoKr", f"A LyCORIS LoKr of a subject for {model}, from pictures with captions.", LOKR)


RECIPES: Mapping[str, Recipe] = {
    "auraflow-lokr": lokr("auraflow", "AuraFlow"),
    "chroma-lora": lora("chroma", "Chroma"),
    "flux-lora": lora("flux", "Flux.1"),
    "flux2-lora": lora("flux2", "Flux.2 klein"),
    "lumina2-lora": lora("lumina2", "Lumina Image 2.0"),
    "pixart-lokr": lokr("pixart", "PixArt Sigma"),
    "qwen_image-lora": lora("qwen_image", "Qwen-Image"),
    "sana-lora": lora("sana", "Sana 1.5"),
    "sd1x-lora": lora("sd1x", "Stable Diffusion 1.x"),
    "sd2x-lora": lora("sd2x", "Stable Diffusion 2.x"),
    "sd3-lora": lora("sd3", "Stable Diffusion 3"),
    "sdxl-lora": lora("sdxl", "Stable Diffusion XL"),
    "z_image-lora": lora("z_image", "Z-Image"),
    "flux-lokr": lokr("flux", "Flux.1"),
    "sdxl-lokr": lokr("sdxl", "Stable Diffusion XL"),
    "sd1x-full": Recipe(
        "sd1x",
        "all weights",
        "All weights of Stable Diffusion 1.x, from thousands of captioned pictures.",
        {"model_type": "full"},
        "datasets/my-pictures",
    ),
    "sdxl-subject": Recipe(
        "sdxl",
        "subject",
        "A LoRA of one subject without captions for SDXL: a rare word for it, and pictures of others of its kind that are to stay as they are.",
        {**LORA, "caption_strategy": "instanceprompt", "instance_prompt": "a photo of ohwx dog"},
        regularisation={
            "id": "others-of-its-kind",
            "type": "local",
            "instance_data_dir": "datasets/dogs",
            "caption_strategy": "instanceprompt",
            "instance_prompt": "a photo of a dog",
            "is_regularisation_data": True,
        },
    ),
    "flux-style": Recipe(
        "flux",
        "style",
        "A LoKr of a style for Flux.1, from captioned pictures; a trigger word is put before each caption.",
        LOKR,
        STYLE,
        OF_STYLE,
        {"instance_prompt": "ohwx style,", "prepend_instance_prompt": True},
    ),
}


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the list says of an example that ships with files of its own."""

    method: str
    card: str
    download: str


EMBEDDED: Mapping[str, Embedded] = {
    "digits": Embedded("LoKr", "none: a CPU", "nothing"),
    "digits-base": Embedded("from scratch", "none: a CPU", "nothing; prepare.py first"),
    "lesson35-mnist": Embedded("from scratch", "any; /small: a CPU", "fetch.py first"),
    "text-to-image": Embedded("all weights", "from 24 GB", "model and pictures"),
    "text-to-image-lora": Embedded("LoRA", "from 8 GB", "model and pictures"),
    "text-to-image-lora-sdxl": Embedded("LoRA", "from 12 GB", "model and pictures"),
    "text-to-image-sdxl": Embedded("all weights", "from 48 GB", "model and pictures"),
}


def card_named(text: str) -> int:
    """The gigabytes of a card: the largest of those that settings are kept for and that it holds.

    Raises:
        ConfigError: it is no size, or smaller than all of them.
    """
    from simpletuner.options.memory import size_in_bytes

    try:
        size = size_in_bytes(f"{text}GB" if text.isdigit() else text)
    except ValueError as error:
        raise ConfigError(f"--card {error}", hint="Write --card 12GB.") from error
    fitting = [card for card in CARDS_GB if card * 1e9 <= size]
    if not fitting:
        least = f"settings are kept for cards from {CARDS_GB[0]} GB on"
        raise ConfigError(f"--card {text}: {least}", hint="`simpletuner plan --config config.json --fit SIZE` finds settings for any card.")
    return fitting[-1]
