"""A folder is a registry: one file a plugin, found by its name, imported when chosen."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

from simpletuner.errors import ConfigError, choose

T = TypeVar("T")


def names(folder: str) -> list[str]:
    """List the plugins of a package folder such as "simpletuner.models.families", importing none of them."""
    package = importlib.import_module(folder)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load(folder: str, name: str, contract: type[T]) -> type[T]:
    """Import one plugin and give its class.

    Args:
        folder: dotted package, e.g. "simpletuner.adapters.kinds".
        name: the file's name without `.py`.
        contract: the base class; the file must define exactly one subclass of it.

    Raises:
        ConfigError: no such plugin; the nearest right name is offered.
    """
    known = names(folder)
    if name not in known:
        what = folder.rsplit(".", 1)[-1]
        raise ConfigError(f"{name!r} is not among the {what}", hint=choose(name, known, what))
    module = importlib.import_module(f"{folder}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, contract) and value is not contract and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {contract.__name__}, not {len(found)}"
    return found[0]
