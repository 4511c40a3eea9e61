"""All options of a run together, and the rules between sections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ConfigDict

from simpletuner.options.adapters import Adapters
from simpletuner.options.data import Data
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.memory import OFFLOADS, Memory
from simpletuner.options.models import Models
from simpletuner.options.optim import Optim
from simpletuner.options.option import Option, Problem, Ruled, Section, options_of
from simpletuner.options.reporting import Reporting
from simpletuner.options.training import Training
from simpletuner.options.validation import Validation

SECTIONS: dict[str, type[Section]] = {
    "models": Models,
    "adapters": Adapters,
    "memory": Memory,
    "diffusion": Diffusion,
    "optim": Optim,
    "data": Data,
    "training": Training,
    "validation": Validation,
    "reporting": Reporting,
}


class TrainConfig(Ruled):
    """Everything that a run was asked to do, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Models
    adapters: Adapters
    memory: Memory
    diffusion: Diffusion
    optim: Optim
    data: Data
    training: Training
    validation: Validation
    reporting: Reporting

    def flat(self) -> dict[str, Any]:
        """Every option by its key, in values that JSON knows."""
        return {key: value for section in self.model_dump(mode="json").values() for key, value in section.items()}

    def value(self, key: str) -> Any:
        """The value of one option."""
        return getattr(getattr(self, declared()[key].section), key)

    def problems(self) -> Iterator[Problem]:
        """Name the options of different sections that do not go together."""
        if self.adapters.model_type == "full" and self.memory.base_model_precision != "no_change":
            keys = ("base_model_precision", "model_type")
            yield Problem(keys, "base_model_precision must be no_change with model_type full: quantised weights cannot be trained")
        for key in OFFLOADS if self.adapters.model_type == "full" else ():
            if getattr(self.memory, key):
                yield Problem((key, "model_type"), f"{key} cannot be with model_type full: weights that are trained cannot wait in main memory")


@cache
def declared() -> dict[str, Option]:
    """Every option by its key, section after section."""
    found = {key: option for section in SECTIONS.values() for key, option in options_of(section).items()}
    assert len(found) == sum(len(options_of(section)) for section in SECTIONS.values()), "two sections declare the same key"
    return found


@cache
def spellings() -> dict[str, str]:
    """Every older spelling of a key, to the key."""
    return {old: option.key for option in declared().values() for old in (*option.was, *option.was_opposite)}
