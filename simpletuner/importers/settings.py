"""Settings of another trainer as they were told: each is looked up by its name, and what nobody asked for is known in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError, nearest
from simpletuner.importers.command_line import TRUTHS
from simpletuner.importers.importer import Imported
from simpletuner.relaxed_json import load_relaxed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Known = Mapping[str, tuple[Any, Any]]
"""Name to type and default; a tuple of a type is a list, `dict` a part with names of its own, `object` anything."""
SECRET = ("token", "api_key")
"""Ends of names whose values are not shown."""
SHOWN_LETTERS = 80
OTHERWISE = "nothing here is equal to it, or it has no effect beside the other settings"
WANTED = {int: "a whole number", float: "a number", bool: "true or false", dict: "a part with names of its own"}


@dataclass(slots=True)
class Settings:
    """What one part of a file, or a command, says."""

    given: Mapping[str, Any]
    known: Known
    place: str = ""
    """Stands before names in messages, such as "train."."""
    problems: list[str] = field(default_factory=list)
    """Values of a wrong kind; parts of one file share the list."""
    asked: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        """The value as its type, or the trainer's own default."""
        kind, default = self.known[name]
        self.asked.add(name)
        value = self.given.get(name)
        if value is None:
            return default
        try:
            return typed(value, kind)
        except (TypeError, ValueError):
            wanted = WANTED.get(kind[0] if isinstance(kind, tuple) else kind, "another kind of value")
            self.problems.append(f"{self.place}{name} {shown(name, value)} is not {wanted}")
            return default

    def positive(self, name: str) -> Any:
        """A number that must be above 0."""
        value = self[name]
        if value <= 0:
            self.problems.append(f"{self.place}{name} {value} is not above 0")
            return self.known[name][1]
        return value

    def says(self, name: str) -> bool:
        """Whether it was told, rather than left at its default."""
        return self.given.get(name) is not None

    def part(self, name: str, known: Known) -> Settings:
        """A part with names of its own; an empty one where it is left out."""
        content = self[name]
        return Settings(content if isinstance(content, Mapping) else {}, known, f"{self.place}{name}.", self.problems)

    def parts(self, name: str, known: Known) -> list[Settings]:
        """A list of such parts."""
        content = self[name] or []
        listed = content if isinstance(content, list) else [content]
        self.problems += [
            f"{self.place}{name}: {shown(name, item)} is no part with names of its own" for item in listed if not isinstance(item, Mapping)
        ]
        return [Settings(item, known, f"{self.place}{name}.", self.problems) for item in listed if isinstance(item, Mapping)]

    def refuse(self, what: str) -> None:
        """Raise all problems at once, if there are any.

        Raises:
            ConfigError: there are.
        """
        if self.problems:
            said = "\n  - ".join([f"{what} cannot be imported", *dict.fromkeys(self.problems)])
            raise ConfigError(said, hint="Correct it and import it again.")

    def leave(self, found: Imported, reasons: Mapping[str, str], silent: Collection[str], sign: str = "") -> None:
        """Name everything that was told and that nothing came of, with the reason, or the nearest right name."""
        for name, value in self.given.items():
            if name in self.asked or name in silent:
                continue
            label = f"{sign}{self.place}{name} {shown(name, value)}"
            if name not in self.known:
                best = nearest(name, self.known)
                found.lose(f"{label}: unknown" + (f"; did you mean {best}?" if best else ""))
            elif not self.is_idle(name, value):
                found.lose(f"{label}: {reasons.get(name, OTHERWISE)}")

    def is_idle(self, name: str, value: Any) -> bool:
        """Whether a value asks for nothing, or for the default."""
        kind, default = self.known[name]
        if value is None or value in ("", [], {}) or (value is False and default is not True):
            return True
        try:
            return bool(typed(value, kind) == default)
        except (TypeError, ValueError):
            return False


def typed(value: Any, kind: Any) -> Any:
    """A value as the type that it should have: numbers may be written as text, and one value stands for a list of one.

    Raises:
        ValueError: it is of another kind.
    """
    if kind is object:
        return value
    if isinstance(kind, tuple):
        return [typed(item, kind[0]) for item in (value if isinstance(value, list) else [value])]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ValueError
        return value
    if kind is bool:
        said = str(value).lower()
        if said not in TRUTHS:
            raise ValueError
        return TRUTHS[said]
    if isinstance(value, (list, dict)) or (kind is not str and isinstance(value, bool)):
        raise ValueError
    if kind is int:
        number = float(value)
        if not number.is_integer():
            raise ValueError
        return int(number)
    return kind(value)


def shown(name: str, value: Any) -> str:
    """A value as it may be printed."""
    if name.endswith(SECRET):
        return "(not shown)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 3] + "..."


def read_settings(path: Path) -> Any:
    """Read a file by its suffix: TOML, YAML, or JSON with comments.

    Raises:
        ConfigError: it cannot be read, or is none; says where.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        return load_relaxed(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Correct the path; the file is UTF-8 text.") from error
    if suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}", hint="Correct that line.") from error
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", hint="Correct that line; blanks at its start count.") from error


def beside(path: str, file: Path | None) -> Path:
    """A file that a config names: as seen from here, else beside that config."""
    place = Path(path).expanduser()
    return file.parent / place if file is not None and not place.exists() and (file.parent / place).exists() else place
