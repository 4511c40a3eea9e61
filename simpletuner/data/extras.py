"""Packages that only some places need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator


def lacking(package: str, extra: str, what: str) -> Iterator[str]:
    """Say that a package is not installed, and how to get it; nothing if it is. It is not imported.

    Args:
        package: as it is imported.
        extra: of ours, that brings it.
        what: the setting that needs it.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder of this name where the command runs, such as `datasets`, is no package
        yield f"{what} needs the package {package}, which is not installed: pip install 'simpletuner[{extra}]'"
