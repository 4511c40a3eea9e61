"""All options as a JSON Schema, so that editors complete and check config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simpletuner.options.option import Option
from simpletuner.options.retired import known_elsewhere
from simpletuner.options.train_config import declared

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TRUTHS = [True, False, "true", "false", "yes", "no", "on", "off"]
NUMBER = r"^\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)?\s*$"
BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def schema(choices: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Describe config.json: every option with its help, default and values; numbers and truth values may be quoted.

    Args:
        choices: the open sets that options name in `choices_from`, to their members and what they are.
    """
    elsewhere = "|".join(re.escape(name).replace(r"\*", ".*") for name in known_elsewhere())
    return {
        "$schema": DIALECT,
        "title": "SimpleTuner config.json",
        "type": "object",
        "properties": {key: _property(option, choices) for key, option in declared().items()},
        "patternProperties": {
            "^_": {"description": "A comment."},
            "^--": {"description": "An option may be written with leading dashes."},
            "^\\$schema$": {"type": "string"},
            f"^({elsewhere}|{'|'.join(old for option in declared().values() for old in (*option.was, *option.was_opposite))})$": {
                "deprecated": True,
                "description": "An older key: renamed, or without an effect here.",
            },
        },
        "additionalProperties": False,
        "anyOf": [{"required": [prefix + option.key]} for option in declared().values() if option.is_required for prefix in ("", "--")],
    }


def _property(option: Option, choices: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": option.help, **_values(option, choices)}
    if not option.is_required and option.default is not None:
        found["default"] = option.default if isinstance(option.default, (bool, int, float, str)) else str(option.default)
    return found


def _values(option: Option, choices: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    if option.choices:
        return {"enum": [*option.choices, *option.spellings, None]}
    if option.kind == "bool":
        return {"enum": [*TRUTHS, None]}
    if option.kind in ("int", "float"):
        limits = {BOUNDS[name]: limit for name, limit in option.limits.items()}
        return {"type": ["integer" if option.kind == "int" else "number", "string", "null"], "pattern": NUMBER, **limits}
    if option.kind in ("list", "numbers"):
        return {"type": ["array", "string", "null"], "items": {"type": "string" if option.kind == "list" else ["number", "string"]}}
    if option.kind == "object":
        return {"type": ["object", "string", "null"]}
    if option.kind == "objects":
        return {"type": ["object", "array", "string", "null"]}
    known = choices.get(option.choices_from or "")
    return {"type": ["string", "number", "null"], **({"examples": list(known)} if known else {})}
