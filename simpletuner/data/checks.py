"""The keys of one entry of `multidatabackend.json`, typed; what is wrong with them is said in a user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError

from simpletuner.data.backend import EntryOptions
from simpletuner.data.entries import Findings
from simpletuner.data.keys import SECRET, Idle, set_aside

EXPECTED = {"float": "a number", "finite": "a number", "int": "a whole number", "bool": "true or false", "string": "a text", "tuple": "a list"}
"""First word of a pydantic error's type, to what the value should have been."""
Options = TypeVar("Options", bound=EntryOptions)


def validate(kind: type[Options], label: str, entry: dict[str, Any], idle: Idle, findings: Findings) -> Options | None:
    """Type the keys of an entry, reporting all that is wrong with them.

    Returns:
        The keys as far as they can be read, the others as if they were not there; None if nothing can be made of the rest.
    """
    entry = dict(entry)
    notes, problems = set_aside(entry, frozenset(kind.model_fields), idle)
    wrong: dict[str, str] = {}
    checked: Options | None = None
    try:
        checked = kind.model_validate(entry)
    except ValidationError as error:
        for fault in error.errors():
            key, value = locate(entry, fault["loc"])
            wrong.setdefault(key, f"{key} is needed" if fault["type"] == "missing" else f"{key}{shown(key, value)}{rule_of(fault)}")
        unreadable = {str(fault["loc"][0]) for fault in error.errors()}
        with suppress(ValidationError):  # so that the rules between keys are checked too, as far as these can be read
            checked = kind.model_validate({key: value for key, value in entry.items() if key not in unreadable})
    findings.notes += [f"{label}: {note}" for note in notes]
    findings.problems += [f"{label}: {problem}" for problem in (*problems, *wrong.values())]
    return checked


def locate(entry: Mapping[str, Any], place: Sequence[int | str]) -> tuple[str, Any]:
    """The key at fault, with dots inside a block, and what was written there."""
    keys, value = [str(place[0])], entry.get(str(place[0]))
    for part in place[1:]:
        if not isinstance(value, dict):
            break
        keys.append(str(part))
        value = value.get(part)
    return ".".join(keys), value


def shown(key: str, value: Any) -> str:
    """What was written, unless it is a secret or a whole block."""
    return ": " if isinstance(value, dict) else " is wrong: " if key in SECRET else f" is {value!r}; "


def rule_of(fault: Any) -> str:
    """Say pydantic's rule in a user's words."""
    kind = str(fault["type"]).split("_")[0]
    if kind in EXPECTED:
        return f"it must be {EXPECTED[kind]}"
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    return "it must be " + str(fault["msg"]).removeprefix("Input should be ")
