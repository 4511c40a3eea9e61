"""All options of a run together, and the rules between sections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ConfigDict

from simpletuner.options.adapters import Adapters
from simpletuner.options.compiling import Compiling, compiling_problems
from simpletuner.options.data import Data
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.hub import Hub
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
    "compiling": Compiling,
    "diffusion": Diffusion,
    "optim": Optim,
    "data": Data,
    "training": Training,
    "validation": Validation,
    "reporting": Reporting,
    "hub": Hub,
}


class TrainConfig(Ruled):
    """Everything that a run was asked to do, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Models
    adapters: Adapters
    memory: Memory
    compiling: Compiling
    diffusion: Diffusion
    optim: Optim
    data: Data
    training: Training
    validation: Validation
    reporting: Reporting
    hub: Hub

    def flat(self) -> dict[str, Any]:
        """Every option by its key, in values that JSON knows; secret ones as if they were not set."""
        values = {key: value for section in self.model_dump(mode="json").values() for key, value in section.items()}
        return {key: None if declared()[key].is_secret else value for key, value in values.items()}

    def value(self, key: str) -> Any:
        """The value of one option."""
        return getattr(getattr(self, declared()[key].section), key)

    def problems(self) -> Iterator[Problem]:
        """Name the options of different sections that do not go together."""
        if self.adapters.model_type == "full" and self.memory.base_model_precision != "no_change":
            keys = ("base_model_precision", "model_type")
            yield Problem(keys, "base_model_precision must be no_change with model_type full: quantised weights cannot be trained")
        yield from self._schedule_problems()
        yield from compiling_problems(self)
        if self.adapters.model_type == "full" and self.optim.optimizer_release_gradients:
            yield from self._release_problems()
        for key in OFFLOADS if self.adapters.model_type == "full" else ():
            if getattr(self.memory, key):
                yield Problem((key, "model_type"), f"{key} cannot be with model_type full: weights that are trained cannot wait in main memory")

    def _schedule_problems(self) -> Iterator[Problem]:
        optim, images = self.optim, self.training.images_per_step
        rate = optim.learning_rate * optim.rate_factor(images)
        if optim.lr_scheduler not in ("constant", "constant_with_warmup") and optim.lr_end > rate:
            scaled = f", which is {rate:g} with {images} pictures a step" if optim.lr_scale or optim.lr_scale_sqrt else ""
            said = f"lr_end {optim.lr_end:g} is above learning_rate{scaled}, from which lr_scheduler {optim.lr_scheduler} falls"
            yield Problem(("lr_end", "learning_rate"), said)

    def _release_problems(self) -> Iterator[Problem]:
        key, optim = "optimizer_release_gradients", self.optim
        rules = (
            (
                "gradient_accumulation_steps",
                self.training.gradient_accumulation_steps > 1,
                "a gradient that waits for further batches has to stay",
            ),
            ("num_processes", self.training.num_processes > 1, "a gradient is gone before processes could average it"),
            ("mixed_precision", self.memory.mixed_precision == "fp16", "whether fp16 overflowed is known only when most weights are updated"),
            (
                "grad_clip_method",
                optim.grad_clip_method == "norm" and optim.max_grad_norm > 0,
                "the length of the whole gradient is known only when most of it is gone; take tensor or value, or set max_grad_norm to 0",
            ),
        )
        for other, is_broken, because in rules:
            if is_broken:
                yield Problem((other, key), f"{other} {self.value(other)} cannot be with {key}: {because}")


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
