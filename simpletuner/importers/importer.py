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
    prompts: dict[str, str] = field(default_factory=dict)
    """A library of prompts, where one option does not hold them."""
    lost: list[str] = field(default_factory=list)
    """What could not be carried over, a line each."""
    notes: list[str] = field(default_factory=list)
    """What was carried over and is not quite the same here, a line each."""


class Importer(ABC):
    """Reads how one other trainer was started. The command `simpletuner import` writes what it gives."""

    example: ClassVar[str]
    """What may stand after `simpletuner import NAME`."""

    @abstractmethod
    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        """Translate.

        Args:
            words: a command line in words, or in one word: the line itself, or the file that holds it.
            environ: variables that it may refer to.

        Raises:
            ConfigError: every word that the other trainer would not have understood either, at once.
        """
