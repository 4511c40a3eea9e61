"""What a run leaves in its output folder besides checkpoints and pictures: its settings and its last files, free of absolute paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError

CONFIG_FILE = "simpletuner_config.json"


def make_writable(folder: Path) -> None:
    """Make the output folder and prove that it can be written to.

    Raises:
        ConfigError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise ConfigError(
            f"output_dir {folder} cannot be written to: {error.strerror}", hint="Choose another output_dir, or change its permissions."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder while the body runs; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another run is there.
    """
    if os.name == "nt":  # has no such lock
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is writing to output_dir {folder}", hint="Wait for it, stop it, or choose another output_dir.") from error
        yield


def without_paths(value: Any) -> Any:
    """Shorten every absolute path inside settings to its last part, so that shared files do not tell where they were made."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and re.match(r"(/|~[\w.-]*/|[A-Za-z]:[\\/])", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the effective settings of a run."""
    text = json.dumps(without_paths(config), indent=2, sort_keys=True, default=str)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
