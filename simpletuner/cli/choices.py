"""The names that open options may take: families, optimizers, precisions, trackers; and what a family prefers."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner import plugins
from simpletuner.errors import ConfigError, choose
from simpletuner.memory.attention import ATTENTIONS
from simpletuner.memory.precision import PRECISIONS
from simpletuner.models.family import ModelFamily
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.options.effects import OF_FEW_FAMILIES, OF_OTHERS
from simpletuner.options.models import Models
from simpletuner.options.reporting import CUSTOM

FAMILIES = "simpletuner.models.families"
TRACKERS = "simpletuner.reporting.trackers"


def known_names() -> dict[str, list[str]]:
    """Every open set by its name, without importing what is in it."""
    return {
        "family": plugins.names(FAMILIES),
        "attention": [row.name for row in ATTENTIONS],
        "optimizer": [row.name for row in OPTIMIZERS],
        "precision": [row.name for row in PRECISIONS],
        "tracker": ["none", "all", *plugins.names(TRACKERS), CUSTOM],
    }


def described() -> dict[str, dict[str, str]]:
    """Every open set by its name, each member with a sentence."""
    return {
        "family": {name: _family_sentence(name) for name in plugins.names(FAMILIES)},
        "optimizer": {row.name: row.summary for row in OPTIMIZERS},
        "precision": {row.name: row.summary for row in PRECISIONS},
        "attention": {row.name: row.summary for row in ATTENTIONS},
        "tracker": {
            "none": "Nothing.",
            "all": "All that are installed.",
            **{name: _first_line(f"{TRACKERS}.{name}") for name in plugins.names(TRACKERS)},
            CUSTOM: "Your own, the file that `custom_tracker` names.",
        },
    }


def family_of(name: str) -> type[ModelFamily]:
    """Import one family.

    Raises:
        ConfigError: no such family.
    """
    return plugins.load(FAMILIES, name, ModelFamily)  # type: ignore[type-abstract]


def family_defaults(name: str, flavour: str | None, location: str | None = None) -> Mapping[str, Any]:
    """Give what a family, and the flavour that is named or that the model's location is, prefers over the general defaults.

    Raises:
        ConfigError: no such family, or it has no such flavour.
    """
    kind = family_of(name)
    if flavour is not None and flavour not in kind.flavours:
        raise ConfigError(f"{name} has no flavour {flavour!r}", hint=choose(flavour, kind.flavours, "flavours"))
    usual = next(iter(kind.flavours)) if location is None else next((name for name, hub_id in kind.flavours.items() if hub_id == location), None)
    return {**kind.defaults, **kind.flavour_defaults.get(flavour or usual or "", {})}


def idle_of(models: Models) -> Mapping[str, str]:
    """The options that have no effect in the model that is chosen, and why."""
    family = family_of(models.model_family)(models)
    unguided = {} if family.takes_real_guidance else {"validation_guidance_real": "validation_guidance is all the guidance that the model takes"}
    of_few = {keys: because for keys, because in OF_FEW_FAMILIES.items() if not set(keys.split()) & set(family.own_options)}
    return {**OF_OTHERS[family.objective], **unguided, **of_few, **family.idle}


def _family_sentence(name: str) -> str:
    flavours = ", ".join(f"`{flavour}` ({source})" for flavour, source in family_of(name).flavours.items())
    return f"{summary_of(name)} Flavours: {flavours}."


def summary_of(family: str) -> str:
    """What a family is, in a sentence."""
    return _first_line(f"{FAMILIES}.{family}")


def _first_line(module: str) -> str:
    """The first line of a module's docstring, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]
