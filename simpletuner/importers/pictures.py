"""Folders of pictures and sample prompts of other trainers: what can be seen of them, and how they are written here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.importers.importer import Imported

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
READ_SUFFIX = ".txt"
"""Of the caption files that are read here."""


@dataclass(frozen=True, slots=True)
class Look:
    """A sample prompt with its settings; None where it has none of its own."""

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    guidance_real: float | None = None
    """Of a model that is also told a guidance."""
    strength: float | None = None
    """Of the adapter."""


def count_pictures(folder: str) -> int | None:
    """Pictures in a folder and those in it, or None if it is not here."""
    place = Path(folder).expanduser()
    return sum(file.suffix.lower() in PICTURES for file in place.rglob("*")) if place.is_dir() else None


def captions(found: Imported, folder: str, suffix: str, spare: str | None) -> dict[str, Any]:
    """Where captions come from: files beside pictures, or else one caption for all.

    Args:
        suffix: of caption files there.
        spare: the caption of a picture without such a file.
    """
    place = Path(folder).expanduser()
    has_files = any(place.rglob(f"*{suffix}")) if place.is_dir() else None
    if spare and has_files is None:
        found.note(
            f"{folder} is not here: its captions are taken from {READ_SUFFIX} files; without these, set caption_strategy to instanceprompt and "
            f"instance_prompt to {spare!r}"
        )
        return {"caption_strategy": "textfile"}
    if spare and not has_files:
        return {"caption_strategy": "instanceprompt", "instance_prompt": spare}
    if spare:
        found.note(f"{folder}: a picture without a caption file is left out; there its caption is {spare!r}")
    if suffix != READ_SUFFIX:
        found.lose(f"captions in {suffix} files: those in {READ_SUFFIX} files are read; rename them")
    return {"caption_strategy": "textfile"}


def new_name(folder: str, others: Collection[str]) -> str:
    """An id for a dataset, after its folder."""
    stem = re.sub(r"[^\w.-]+", "-", Path(folder.replace("\\", "/")).name).strip("-.") or "pictures"
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(others) + 3)))
    return next(name for name in names if name not in others)


def use_looks(found: Imported, looks: Sequence[Look]) -> None:
    """Write sample prompts: the settings of the first as options, and for the others what is different."""
    if not looks:
        return
    common = settings_of(looks[0])
    found.config |= {f"validation_{name}": value for name, value in common.items()}
    if len(looks) == 1:
        found.config["validation_prompt"] = looks[0].prompt
    else:
        found.prompts = {f"prompt_{number}": entry_of(look, common) for number, look in enumerate(looks, start=1)}


def entry_of(look: Look, common: Mapping[str, Any]) -> str | dict[str, Any]:
    """A prompt as a library holds it, with what the options do not say."""
    own = {name: value for name, value in settings_of(look).items() if common.get(name) != value}
    return {"prompt": look.prompt, **own} if own else look.prompt


def settings_of(look: Look) -> dict[str, Any]:
    """What a prompt says, by the names of a library, which are those of the options without `validation_`."""
    width, height = look.width or look.height, look.height or look.width
    told = {
        "negative_prompt": look.negative or "",
        "resolution": f"{width}x{height}" if width else None,
        "seed": look.seed,
        "guidance": look.guidance,
        "guidance_real": look.guidance_real,
        "num_inference_steps": look.steps,
        "lycoris_strength": look.strength,
    }
    return {name: value for name, value in told.items() if value is not None}
