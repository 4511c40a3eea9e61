"""The diffusers layout of a whole model: check a folder of it before anything is loaded, write one when training is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError
from simpletuner.models.files import STEMS, path_hint, read_json
from simpletuner.models.loading import load_network, without_bars
from simpletuner.models.single_file import is_single_file, read_header
from simpletuner.models.source import INDEX_FILE, Source, is_local

FAMILY_OF_PIPELINE = {
    "AuraFlow": "auraflow",
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "StableDiffusion": "sd1x",
    "Flux2": "flux2",
    "Flux": "flux",
    "Chroma": "chroma",
    "PixArt": "pixart",
    "Sana": "sana",
    "Lumina2": "lumina2",
    "Kolors": "kolors",
    "HiDream": "hidream",
    "QwenImage": "qwen_image",
    "ZImage": "z_image",
}
"""How the pipeline classes of diffusers begin, to the family that a user would set; the first that fits."""
ORIGIN_KEYS = ("_name_or_path", "name_or_path")
"""Where the libraries note the folder from which a part was read. It is nobody's business in a file that is shared."""


def check_model(source: Source, pipeline_class: str, parts: Sequence[str], config_only: Sequence[str] = ()) -> None:
    """Refuse a local model that is of another family, or lacks a part or a file of it. What is on the hub is not asked for.

    Args:
        parts: names of the parts that training needs.
        config_only: those of them of which the configuration is enough.

    Raises:
        ConfigError: says everything that is wrong at once.
    """
    problems = _problems(partial(_check_index, source, pipeline_class))
    if not problems:  # a model of another kind has other parts; to list those as missing would only confuse
        problems = _problems(*(partial(_check_part, source, name, name in config_only) for name in parts))
    if problems:
        hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
        messages = dict.fromkeys(problem.message for problem in problems)  # two parts may be amiss for one reason
        raise ConfigError("; ".join(messages), hint=" ".join(hints) or None)


def save_model(source: Source, networks: Mapping[str, Any], folder: Path) -> None:
    """Write a whole model: some parts from memory, by their folders; every other file by file from where it was read.

    The folder appears complete or not at all, takes the place of an earlier one, and names no path of this machine.
    """
    staged = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    index = {key: value for key, value in source.index_of_result().items() if key not in ORIGIN_KEYS}
    _write_json(staged / INDEX_FILE, index)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if name in networks:
            with without_bars():
                networks[name].save_pretrained(staged / name, safe_serialization=True)
        else:
            _copy_part(source, name, staged / name)
    for path in staged.glob("*/*.json"):
        _forget_origin(path)
    earlier = folder.with_name(folder.name + ".old")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    staged.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _problems(*checks: Callable[[], None]) -> list[ConfigError]:
    found = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(error)
    return found


def _check_index(source: Source, pipeline_class: str) -> None:
    location = source.location
    named = f"{'pretrained_model_name_or_path ' if source.options.pretrained_model_name_or_path else ''}{location}"
    if is_single_file(location):
        if not source.knows(""):
            return
        assert source.checkpoint is not None  # read, or refused
        location = source.base
        named = f"single_file_base_model {location}"
    if not is_local(location):
        return
    root = Path(location).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{named} is not a folder", hint=path_hint(location))
    if not (root / INDEX_FILE).is_file() and (root / "config.json").is_file():
        kind = read_json(root / "config.json").get("_class_name", "network")
        raise ConfigError(
            f"{named} is a single {kind}, not a whole model: it has no {INDEX_FILE}",
            hint=f"To replace one part of a model, set pretrained_{source.denoiser}_model_name_or_path or pretrained_vae_model_name_or_path.",
        )
    found = str(source.index.get("_class_name"))
    if found != pipeline_class:
        family = next((family for start, family in FAMILY_OF_PIPELINE.items() if found.startswith(start)), None)
        raise ConfigError(
            f"{named} is a {found}, and model_family {source.options.model_family} needs a {pipeline_class}",
            hint=_family_hint(family, source.options.model_family),
        )


def _family_hint(looks_like: str | None, asked: str) -> str:
    if looks_like is None:
        return "Set the model_family that it belongs to."
    if looks_like == asked:
        return "It is of that family, but makes pictures from more than text (inpainting, ...): set the text-to-image model beside it."
    return f"It looks like model_family {looks_like}. Set that, or the path of a model of {asked}."


def _check_part(source: Source, name: str, config_only: bool) -> None:
    if not source.knows(name):
        return
    part = source.part(name)
    if not is_local(part.location):
        return
    if not Path(part.location).expanduser().exists():
        raise ConfigError(f"{part.location}, where the {part.name} should be, does not exist", hint=path_hint(part.location))
    if config_only:
        part.config()
        return
    for file, path in part.files().items():
        if file.endswith(".safetensors") and part.checkpoint is None:
            read_header(path)


def _copy_part(source: Source, name: str, folder: Path) -> None:
    """Copy a part; files of a variant lose its name, so that the model as a whole has none."""
    part = source.part(name)
    if part.checkpoint is not None:
        with without_bars():
            load_network(source.class_of(name), part, None).save_pretrained(folder, safe_serialization=True)
        return
    folder.mkdir()
    variant = part.weights()[0] if part.has_weights else None
    dot = f".{variant}" if variant else ""
    for file, path in part.files().items():
        is_weights = bool(dot) and file.startswith(STEMS)
        copy = folder / (file.replace(dot, "", 1) if is_weights else file)
        shutil.copyfile(path, copy)
        if is_weights and file.endswith(".json"):
            index = read_json(copy)
            index["weight_map"] = {key: shard.replace(dot, "", 1) for key, shard in index["weight_map"].items()}
            _write_json(copy, index)
    if part.changes:
        _write_json(folder / part.config_name, part.config())


def _forget_origin(path: Path) -> None:
    content = read_json(path)
    if any(key in content for key in ORIGIN_KEYS):
        _write_json(path, {key: value for key, value in content.items() if key not in ORIGIN_KEYS})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
