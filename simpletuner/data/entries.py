"""`multidatabackend.json` to its entries: today's spelling, placeholders filled in, a label for messages on each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.data.keys import SECRET, tidy
from simpletuner.errors import ConfigError, choose
from simpletuner.relaxed_json import load_relaxed

KINDS = ("image", "eval", "conditioning", "text_embeds", "image_embeds")
KINDS_LATER = ("video", "audio", "conditioning_image_embeds", "distillation_cache", "caption", "grounding")
PLACEHOLDER = re.compile(r"\{(env:)?(\w+)\}")


@dataclass
class Findings:
    """What was found wrong, or worth saying, so far."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_entries(path: Path, variables: Mapping[str, str], findings: Findings) -> tuple[list[tuple[str, str, dict[str, Any]]], list[str]]:
    """Give id, kind and keys of each enabled entry, with placeholders filled in, and the ids of the disabled ones."""
    entries = load_relaxed(path)
    if not isinstance(entries, list):
        found = "one object" if isinstance(entries, dict) else type(entries).__name__
        raise ConfigError(f"{path} must hold a list of datasets, not {found}", hint="Put [ before the first dataset and ] behind the last.")
    enabled: list[tuple[str, str, dict[str, Any]]] = []
    disabled: list[str] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(entries, start=1):
        if not isinstance(raw, dict):
            findings.problems.append(f"entry {number} is {raw!r}; a dataset is an object in braces")
            continue
        entry = tidy(raw)
        name = str(entry.get("id", ""))
        label = f"dataset {name!r}" if name else f"entry {number}"
        if is_on(entry.get("disabled", False)):
            disabled.append(name or f"entry {number}")
            continue
        if fault := id_fault(name):
            findings.problems.append(f"{label}: {fault}")
        if name in seen and name:
            findings.problems.append(f"{label}: entries {seen[name]} and {number} have the same id; each needs its own")
        seen.setdefault(name, number)
        kind = str(entry.get("dataset_type", "image"))
        if kind in KINDS:
            entry = {key: fill(value, {**variables, "id": name}, f"{label}: {key}", findings) for key, value in entry.items()}
            enabled.append((label, kind, {**entry, "id": name}))
        elif kind in KINDS_LATER:
            findings.problems.append(f"{label}: dataset_type {kind!r} is not available yet; disable the entry to train without it")
        else:
            findings.problems.append(f"{label}: dataset_type {kind!r}; {choose(kind, KINDS, 'kinds of datasets')}")
    return enabled, disabled


def is_on(value: object) -> bool:
    """Read `disabled` before its entry is checked."""
    return str(value).strip().lower() in ("true", "1", "yes", "on", "y", "t")


def id_fault(name: str) -> str | None:
    """Refuse an id that cannot be a folder's name, or that makes sample ids ambiguous."""
    if not name:
        return "an 'id' is needed: a name of your choice, different for each dataset"
    if name in (".", "..") or not name.isprintable() or any(letter in name for letter in "/\\"):
        return "an id is also a folder's name, so it holds no slash and is not '.' or '..'"
    return None


def fill(value: Any, variables: Mapping[str, str], where: str, findings: Findings) -> Any:
    """Replace `{model_family}`, `{output_dir}`, `{id}`, `{example}` and `{env:NAME}` in strings; other braces stay as they are."""
    if isinstance(value, list) and where.endswith("caption_filter_list"):  # braces in a regular expression count
        return value
    if isinstance(value, list):
        return [fill(each, variables, where, findings) for each in value]
    if isinstance(value, dict):
        return {key: fill(each, variables, f"{where}.{key}", findings) for key, each in value.items()}
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        is_environment, name = match.groups()
        found = os.environ.get(name) if is_environment else variables.get(name)
        if found is not None:
            return found
        if is_environment:
            written = match.group() if where.endswith(tuple(SECRET)) else value
            findings.problems.append(f"{where} is {written!r}, but the environment has no variable {name}")
        elif not where.endswith("instance_prompt"):  # braces in a prompt are the user's own
            findings.problems.append(f"{where} is {value!r}; {choose(name, [*variables, 'env:NAME'], 'placeholders')}")
        return match.group()

    return PLACEHOLDER.sub(replaced, value)
