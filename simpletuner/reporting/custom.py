"""A tracker of the user's own: one Python file with one class."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

from simpletuner.errors import ConfigError

T = TypeVar("T")
FOLDER = Path("custom-trackers")
PACKAGE = "simpletuner.custom_trackers"
"""Before the module's name, so that no other module is in its way."""


def find_custom(path: Path) -> Path:
    """Find the file, by its path or by its name in `custom-trackers/`, and prove that it is Python.

    Raises:
        ConfigError: there is none, or it is no Python.
    """
    asked = [place for one in (path, FOLDER / path) for place in (one, one.with_name(f"{one.name}.py"))]
    found = next((place for place in asked if place.is_file()), None)
    if found is None:
        raise ConfigError(f"custom_tracker {path} is no file, neither here nor in {FOLDER}/", hint="docs/tracking.md shows one.")
    try:
        compile(found.read_bytes(), str(found), "exec")
    except (SyntaxError, ValueError, OSError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"custom_tracker {found}{where} is no Python: {error}", hint="docs/tracking.md shows a tracker.") from error
    return found


def load_custom(path: Path, contract: type[T]) -> type[T]:
    """Run the user's file and give its one class.

    Args:
        contract: the base class.

    Raises:
        ConfigError: it is not there, fails, or holds no Tracker or several.
    """
    file = find_custom(path)
    name = f"{PACKAGE}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for what a name in an annotation means
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises is named
        sys.modules.pop(name, None)
        raise ConfigError(f"custom_tracker {file} fails when it is read: {type(error).__name__}: {error}", hint="Mend it, or drop it.") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, contract) and value is not contract and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise ConfigError(f"custom_tracker {file} must hold one subclass of {contract.__module__}.{contract.__name__}; it holds {names}")
    missing = sorted(getattr(found[0], "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"custom_tracker {file}: {found[0].__name__} lacks {', '.join(missing)}", hint="docs/tracking.md shows a tracker.")
    return found[0]
