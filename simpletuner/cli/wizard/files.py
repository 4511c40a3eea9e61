"""The files that come of the answers: config.json, multidatabackend.json, lycoris_config.json and a prompt library; and how they are written."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.adapters.lycoris_file import FULL_DIMENSION
from simpletuner.cli.wizard.own import Own
from simpletuner.cli.wizard.proposals import Situation
from simpletuner.errors import ConfigError
from simpletuner.options.option import options_of

CONFIG, DATASETS, LYCORIS, PROMPTS = "config.json", "multidatabackend.json", "lycoris_config.json", "user_prompt_library.json"
NAMED_BY = {"data_backend_config": DATASETS, "lycoris_config": LYCORIS, "user_prompt_library": PROMPTS}
"""Options that name a file which the wizard writes."""
OF_DATASET = ("caption_strategy", "instance_prompt")
"""Options that are written to the dataset rather than to config.json."""
LAYERS = {"attention": ["Attention"], "attention+feedforward": ["Attention", "FeedForward"]}
NICKNAME_LENGTH = 40


def texts(s: Situation, folder: str) -> dict[str, str]:
    """The files of a new config, by name.

    Args:
        folder: how they name the one that they lie in.
    """
    contents: dict[str, Any] = {DATASETS: datasets(s)}
    if s.kind == "lokr":
        contents[LYCORIS] = lycoris(s)
    prompts = library(s)
    if prompts:
        contents[PROMPTS] = prompts
    named = {key: f"{folder}/{name}" for key, name in NAMED_BY.items() if name in contents}
    contents = {CONFIG: {**config(s), **named}, **contents}
    return {name: json.dumps(content, indent=4, ensure_ascii=False) + "\n" for name, content in contents.items()}


def config(s: Situation) -> dict[str, Any]:
    """The options of config.json, in the order in which they are asked; those behind it that were given and are not asked."""
    aside = {*options_of(Own), *OF_DATASET, *NAMED_BY}
    keys = [*s.found, *(key for key in s.chosen if key not in s.found)]
    values = {key: s.value(key) for key in keys if key not in aside}
    return {key: value for key, value in values.items() if is_said(key, value)}


def is_said(key: str, value: Any) -> bool:
    """Whether a value is worth a line: most are, so that the file tells what was decided."""
    if value is None or value == "":
        return False
    return not (key in ("minimum_image_size", "blocks_to_swap", "lr_warmup_steps") and value == 0)


def datasets(s: Situation) -> list[dict[str, Any]]:
    name = slug(str(s.value("name") or "pictures"))
    pictures = {"id": name, "type": "local", "instance_data_dir": s.value("pictures")}
    captions = {key: s.value(key) for key in OF_DATASET if s.value(key) and not (key == "instance_prompt" and not is_instance(s))}
    embeds = {"id": f"{name}-text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": f"cache/text/{name}"}
    return [{**pictures, **captions, "crop": False, "repeats": 0}, embeds]


def is_instance(s: Situation) -> bool:
    return bool(s.value("caption_strategy") == "instanceprompt")


def lycoris(s: Situation) -> dict[str, Any]:
    """A LoKr, whose feed-forward layers have half the factor."""
    factor, layers = s.value("lokr_factor"), LAYERS[s.value("lokr_layers")]
    factors = {"Attention": factor, "FeedForward": max(1, factor // 2)}
    preset = {"target_module": layers, "module_algo_map": {name: {"factor": factors[name]} for name in layers}}
    return {"algo": "lokr", "multiplier": 1.0, "linear_dim": FULL_DIMENSION, "linear_alpha": 1, "factor": factor, "apply_preset": preset}


def library(s: Situation) -> dict[str, str]:
    """Captions by nicknames that are their first words."""
    if not s.value("renders_captions"):
        return {}
    found: dict[str, str] = {}
    for caption in s.pictures.captions.get(str(s.value("caption_strategy")), ())[1:]:
        nickname = slug(caption)[:NICKNAME_LENGTH].strip("-").replace("-", "_") or "caption"
        while nickname in found:
            nickname += "_2"
        found[nickname] = caption
    return found


def slug(text: str) -> str:
    """A text as the name of a file: letters and digits of any script, and single dashes."""
    return re.sub(r"[\W_]+", "-", text.strip().lower()).strip("-") or "training"


def differences(before: str, after: str, name: str) -> list[str]:
    """The lines of a diff."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), f"{name} as it is", f"{name} as it will be", lineterm="")
    return list(lines)


def changed(files: Mapping[Path, str]) -> dict[Path, str]:
    """Of files with new texts those that are there, and are other than that; with the texts that they have.

    Raises:
        ConfigError: one is there and cannot be read.
    """
    found = {}
    for path, text in files.items():
        try:
            before = path.read_text(encoding="utf-8-sig") if path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is there and cannot be read: {error}", hint="Move it away, or choose another folder.") from error
        if before is not None and before != text:
            found[path] = before
    return found


def write(files: Mapping[Path, str]) -> None:
    """Write all files, each beside its place first, so that none is ever half there.

    Raises:
        ConfigError: a folder cannot be written to; those written before it stay.
    """
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(staged, path.stat().st_mode if path.exists() else 0o666 & ~umask())
                os.replace(staged, path.resolve())
            except BaseException:
                Path(staged).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Choose a folder that this user may write to.") from error


def umask() -> int:
    """What new files are not allowed; asking for it means setting it."""
    found = os.umask(0o022)
    os.umask(found)
    return found
