"""The files of one part of a model in a folder of this machine: settings in JSON, weights in safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError, nearest

STEMS = ("diffusion_pytorch_model", "model")
"""What weight files are called: by diffusers, by transformers."""


def find_weights(folder: Path, variant: str | None) -> tuple[str | None, list[str]] | None:
    """Find a part's weights: one file, or an index and its shards; of the variant if there is one, plain otherwise.

    Returns:
        The variant found and the names of its files; None if there are none, or a shard is missing.
    """
    for found in dict.fromkeys((variant, None)):
        dot = f".{found}" if found else ""
        for stem in STEMS:
            single, index = f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"
            if (folder / single).is_file():
                return found, [single]
            if (folder / index).is_file():
                shards = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
                if shards and all((folder / shard).is_file() for shard in shards):
                    return found, [index, *shards]
    return None


def nearest_path(location: str) -> str | None:
    """The existing path whose spelling is closest to one that does not exist, part by part; None if nothing is close."""
    asked = Path(location).expanduser()
    found = Path(asked.anchor)
    for part in asked.parts[len(found.parts) :]:
        if (found / part).exists():
            found /= part
            continue
        try:
            best = nearest(part, [path.name for path in found.iterdir()])
        except OSError:  # it is a file, or may not be looked into
            return None
        if best is None:
            return None
        found /= best
    return None if found == asked else f"./{found}" if location.startswith("./") else str(found)


def path_hint(location: str) -> str:
    """The way out where a path does not exist."""
    near = nearest_path(location)
    return f"Did you mean {near}?" if near else "Check the path; it starts from the folder in which the command runs."


def weights_hint(folder: Path) -> str:
    """The way out where `find_weights` finds none."""
    names = [path.name for path in folder.iterdir()]
    variants = sorted({match[1] for name in names if (match := re.fullmatch(rf"(?:{'|'.join(STEMS)})\.(\w+)(?:-\d.*)?\.safetensors", name))})
    if variants:
        return f"Set variant to {' or '.join(variants)}."
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in names):
        return "Pickled weights run code when they are read; save the model again with safe_serialization=True."
    return f"Download the whole folder; it should hold {STEMS[0]}.safetensors or {STEMS[1]}.safetensors."


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a model's file of settings."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", hint="Download the model again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object", hint="Download the model again.")
    return value


def contents(folder: Path) -> str:
    """What there is in a folder, for messages."""
    names: Sequence[str] = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:20]) or "nothing in it"
