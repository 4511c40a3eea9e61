"""How long a run is, and when what is due, all in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from simpletuner.options.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Rhythm:
    """When one thing is due."""

    steps: int = 0
    """Steps between; 0 is never by steps."""
    epochs: float = 0
    """Epochs between; 0 is never by epochs."""
    epoch_steps: Fraction = Fraction(1)
    """Steps of an epoch, which need not be whole."""
    first: int = 0
    """The first step at which it may be due."""

    @property
    def is_ever(self) -> bool:
        return bool(self.steps or self.epochs)

    def is_due(self, step: int) -> bool:
        """Whether it is due after a step: by steps, or since an interval of epochs is over by it."""
        if step < self.first:
            return False
        return bool(self.steps and step % self.steps == 0) or (bool(self.epochs) and self._over(step) > self._over(step - 1))

    def _over(self, step: int) -> int:
        return math.floor(step / (self.epoch_steps * Fraction(str(self.epochs))))

    def __str__(self) -> str:
        """In words, without what it is that is due."""
        by_steps = f"every {self.steps} steps" if self.steps else ""
        many = f"{self.epochs:g} epochs" if self.epochs != 1 else "epoch"
        by_epochs = f"every {many}" if self.epochs else ""
        return " and ".join(filter(None, (by_steps, by_epochs))) + (f" from step {self.first}" if self.first else "")


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a run is and when what is due."""

    total_steps: int
    accumulation: int
    save: Rhythm = Rhythm()
    """The last step is always one."""
    validate: Rhythm = Rhythm()
    """The last step is one too, unless it is never due."""
    evaluate: Rhythm | None = None
    """The last step is always one; None not even that."""


def pace_of(config: TrainConfig, steps: int, batches_per_epoch: int, has_pictures: bool, evaluates: bool) -> Pace:
    """Settle when what is due.

    Args:
        batches_per_epoch: of all processes together.
    """
    training, looks = config.training, config.validation
    epoch = Fraction(batches_per_epoch, training.gradient_accumulation_steps * training.num_processes)
    first = max(looks.validate_after_step, math.ceil(looks.validate_after_epoch * epoch))
    return Pace(
        total_steps=steps,
        accumulation=training.gradient_accumulation_steps,
        save=Rhythm(training.checkpoint_step_interval, training.checkpoint_epoch_interval or 0, epoch),
        validate=Rhythm(looks.validation_step_interval, looks.validation_epoch_interval or 0, epoch, first) if has_pictures else Rhythm(),
        evaluate=Rhythm(looks.eval_steps_interval, looks.eval_epoch_interval or 0, epoch) if evaluates else None,
    )
