"""What a user writes as `optimizer_config`, read; imports nothing that is heavy."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from simpletuner.errors import ConfigError


def parse_arguments(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Read optimizer_config: a dict, or "key=value,key=value"; values may be numbers, truths, or lists in brackets.

    `beta1` and `beta2` together are `betas`.
    """
    if not isinstance(config, str):
        given = dict(config or {})
    else:
        given = {}
        for part in re.split(r",(?![^(\[]*[)\]])", config):  # commas outside brackets
            key, sign, value = part.partition("=")
            if not part.strip():
                continue
            if not sign:
                raise ConfigError(f"optimizer_config: {part.strip()!r} has no value", hint="Write it as key=value,key=value.")
            given[key.strip()] = value.strip()
    read = {key: _value(value) for key, value in given.items()}
    halves = [read.pop(key, None) for key in ("beta1", "beta2")]
    if any(half is not None for half in halves):
        if None in halves:
            raise ConfigError("optimizer_config sets one of beta1 and beta2", hint="Set both, or betas.")
        read["betas"] = tuple(halves)
    return read


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return _value(ast.literal_eval(value))
    except (ValueError, SyntaxError):  # plain text
        return value
