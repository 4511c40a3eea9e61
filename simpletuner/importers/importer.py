"""The contract of an importer: what one other trainer was told, as options and datasets of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(slots=True)
class Imported:
    """What came of it, filled line by line."""

    config: dict[str, Any] = field(default_factory=dict)
    """Options by their keys; all that follow from what was read, the other trainer's own defaults among them."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """Entries of multidatabackend.json."""
    prompts: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    """A library of prompts, where one option does not hold them; an object holds a prompt and what is different for it."""
    lycoris: dict[str, Any] = field(default_factory=dict)
    """Content of lycoris_config.json, for an adapter that needs it."""
    lost: list[str] = field(default_factory=list)
    """What could not be carried over, a line each."""
    notes: list[str] = field(default_factory=list)
    """What was carried over and is not quite the same here, a line each."""

    def lose(self, line: str) -> None:
        """Say once that something could not be carried over."""
        if line not in self.lost:
            self.lost.append(line)

    def note(self, line: str) -> None:
        """Say once that something is not quite the same."""
        if line not in self.notes:
            self.notes.append(line)


class Importer(ABC):
    """Reads how one other trainer was started. The command `simpletuner import` writes what it gives."""

    example: ClassVar[str]
    """What may stand after `simpletuner import NAME`: a file, or behind `--` a command."""
    takes_file: ClassVar[bool] = True
    """Whether it reads a file of settings."""

    @abstractmethod
    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        """Translate.

        Args:
            words: the file of settings; or a command line in words, or in one word: the line itself, or the file that holds it.
            environ: variables that it may refer to.

        Raises:
            ConfigError: every word that the other trainer would not have understood either, at once.
        """
