"""What PEFT and diffusers say of an adapter beside its tensors: alphas, ranks and how they scale, in `adapter_config.json` or the file's header."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simpletuner.adapters.changes import Changes, Parts, rank_of
from simpletuner.adapters.weights import metadata_of
from simpletuner.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
KINDS = ("LORA", "LOHA", "LOKR")
"""Kinds of PEFT's adapters that are read here; the last two have an `alpha`, where a LoRA has a `lora_alpha`."""
AGAIN = "Copy it again from where the adapter came from, or correct it: it says how much the adapter counts."
SHOWN = 60
"""Letters of what is not understood, in an error."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts for which PEFT takes a part out of the base."""


def with_settings(changes: Changes, file: Path, folder: str) -> Changes:
    """Give changes the scale that is said beside their tensors, as an alpha; one that has an alpha already keeps it.

    Args:
        file: the adapter's, in whose header diffusers writes the settings, and beside which PEFT does.
        folder: the denoiser's name, by which a header tells its settings from those of text encoders.

    Raises:
        ConfigError: the settings are not readable, or of an adapter that would not be read rightly.
    """
    settings, place = _of_header(file, folder), file
    if not settings:
        settings, place = _of_file(file.with_name(CONFIG_FILE)), file.with_name(CONFIG_FILE)
    kind = settings.get("peft_type") or "LORA"
    named = "lora_alpha" if kind == "LORA" else "alpha"
    alpha = settings.get(named)
    if not alpha:
        return changes
    _check(settings, {named: "alpha_pattern", **({"r": "rank_pattern"} if kind == "LOKR" else {})}, place)
    alphas, ranks = settings.get("alpha_pattern") or {}, settings.get("rank_pattern") or {}
    is_by_root = bool(settings.get("use_rslora"))
    found: Changes = {}
    for layer, parts in changes.items():
        own, rank = float(_matching(alphas, layer, alpha)), rank_of(parts)
        if "alpha" in parts:
            found[layer] = parts
        elif kind == "LOKR":  # scaled by the rank that was asked for, also where a factor is whole
            found[layer] = _scaled(parts, own / float(_matching(ranks, layer, settings["r"])))
        else:
            found[layer] = {**parts, "alpha": torch.tensor(own * math.sqrt(rank) if is_by_root and rank else own)}
    return found


def _of_header(file: Path, folder: str) -> dict[str, Any]:
    try:
        said = json.loads(metadata_of(file).get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    return {key.removeprefix(f"{folder}."): value for key, value in said.items() if key.startswith(f"{folder}.")} if isinstance(said, dict) else {}


def _of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint=AGAIN) from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} holds no settings, but {_shown(said)}", hint=AGAIN)
    kind, start = said.get("peft_type") or "LORA", said.get("init_lora_weights")
    if kind not in KINDS:
        raise ConfigError(f"{path} is of a PEFT adapter of kind {kind}; those that are read here are {', '.join(KINDS)}")
    if isinstance(start, str) and start.startswith(MOVES_BASE):
        raise ConfigError(
            f"{path}: init_lora_weights {start} took a part out of the base, so the adapter is for no base that others have",
            hint="Save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    return dict(said)


def _check(settings: Mapping[str, Any], used: Mapping[str, str], place: Path) -> None:
    """Refuse what is no number and patterns that are no regular expressions, all at once.

    Args:
        used: a setting to the one by which some layers have another value of it.
    """
    problems = []
    for name, patterns in used.items():
        pattern = settings.get(patterns) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{patterns} is {_shown(pattern)}, not numbers by layers' names")
            pattern = {}
        for label, value in [(name, settings.get(name)), *((f"{patterns} of {key!r}", value) for key, value in pattern.items())]:
            if value is None:
                problems.append(f"{label} is missing")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                problems.append(f"{label} is {_shown(value)}, not a number")
            elif name == "r" and value <= 0:
                problems.append(f"{label} is {_shown(value)}, not above 0")
        for key in pattern:
            try:
                re.compile(_end_of_name(key))
            except re.error as error:
                problems.append(f"{patterns} of {key!r} is by no regular expression: {error}")
    if problems:
        raise ConfigError(f"the adapter's settings in {place} cannot be used: {'; '.join(problems)}", hint=AGAIN)


def _shown(value: Any) -> str:
    return json.dumps(value)[:SHOWN]


def _matching(pattern: Mapping[str, Any], layer: str, usual: Any) -> Any:
    """A layer's own value by PEFT's rule: a key is a regular expression for the end of the name."""
    return next((value for key, value in pattern.items() if re.match(_end_of_name(key), layer)), usual)


def _end_of_name(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _scaled(parts: Parts, scale: float) -> Parts:
    factor = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
    return {**parts, factor: parts[factor].float() * scale}
