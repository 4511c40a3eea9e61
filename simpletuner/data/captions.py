"""From an image's name, or a file beside it, to its captions: one function a strategy, in a table."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass
from posixpath import basename, splitext

SEPARATOR = "\x1e"
"""Between the captions of one image where they are kept as one text: a control character that stands for just that."""


@dataclass(frozen=True, slots=True)
class CaptionRule:
    """How the images of one dataset get their captions."""

    strategy: str
    """A name in `STRATEGIES`."""
    instance_prompts: tuple[str, ...] = ()
    prepends_prompt: bool = False
    """Whether each caption begins with an instance prompt."""
    splits_lines: bool = True
    """Whether each line of a caption file is an alternative."""

    def __str__(self) -> str:
        prompts = " | ".join(self.instance_prompts)
        if STRATEGIES[self.strategy].needs_prompt:
            return f"{self.strategy} {prompts!r}"
        return f"{prompts!r} + {self.strategy}" if self.prepends_prompt else self.strategy


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to caption."""

    alternatives: Callable[[CaptionRule, str, str], tuple[str, ...]]
    """From the rule, the image's name and the text beside it, to captions; none is an image without words."""
    sidecar: str | None = None
    """Suffix of the text file beside each image, without which the image is skipped."""
    needs_prompt: bool = False
    is_of_place: bool = False
    """Whether it takes the captions that the place itself knows, joined by `SEPARATOR`; an image without any is skipped."""


def captions_of(rule: CaptionRule, name: str, text: str = "") -> tuple[str, ...]:
    """Give the alternatives of one image, ("",) if it has no words.

    Args:
        rule: of its dataset.
        name: its path inside the dataset.
        text: what stands in its sidecar, if the strategy has one.
    """
    strategy = STRATEGIES[rule.strategy]
    captions = strategy.alternatives(rule, name, text) or ("",)
    if rule.prepends_prompt and not strategy.needs_prompt:
        captions = tuple(f"{prompt} {caption}".strip() for caption in captions for prompt in rule.instance_prompts)
    return captions


def sidecar_of(rule: CaptionRule, name: str) -> str | None:
    """Name the text file that an image needs, or None if its strategy needs none."""
    suffix = STRATEGIES[rule.strategy].sidecar
    return None if suffix is None else splitext(name)[0] + suffix


def from_filename(rule: CaptionRule, name: str, text: str) -> tuple[str, ...]:
    """`a_photo_of_a_cat.png` is "a photo of a cat"; the folder does not matter."""
    caption = splitext(basename(name))[0].replace("_", " ").strip()
    return (caption,) if caption else ()


def from_text(rule: CaptionRule, name: str, text: str) -> tuple[str, ...]:
    """Each line of `cat.txt` is an alternative for `cat.png`; or, with `disable_multiline_split`, all of it is one caption."""
    lines = [line.strip() for line in text.splitlines()]
    if not rule.splits_lines:
        lines = ["\n".join(lines).strip()]
    return tuple(line for line in lines if line)


def from_prompt(rule: CaptionRule, name: str, text: str) -> tuple[str, ...]:
    """`instance_prompt` itself; of a list, each is an alternative."""
    return rule.instance_prompts


def from_place(rule: CaptionRule, name: str, text: str) -> tuple[str, ...]:
    """Each caption that a column, a table or a shard has for the image is an alternative."""
    return tuple(caption for part in text.split(SEPARATOR) if (caption := part.strip()))


STRATEGIES: dict[str, Strategy] = {
    "filename": Strategy(from_filename),
    "textfile": Strategy(from_text, sidecar=".txt"),
    "instanceprompt": Strategy(from_prompt, needs_prompt=True),
    **dict.fromkeys(("parquet", "jsonl", "csv", "huggingface", "webdataset"), Strategy(from_place, is_of_place=True)),
}


def decode(data: bytes) -> tuple[str, str]:
    """Read text as it was most likely meant.

    Returns:
        The text, and its encoding: utf-8 (with or without a mark), utf-16 if marked so, else latin-1.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return data.decode("utf-8-sig" if encoding == "utf-8" else encoding), encoding
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"
