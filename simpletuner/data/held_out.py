"""Which held-out pictures a run is evaluated with, and which options of masks and evaluation do nothing in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simpletuner.data.plan import DataPlan
from simpletuner.errors import ConfigError, choose
from simpletuner.options.validation import Validation
from simpletuner.randomness import seed_from

if TYPE_CHECKING:
    from simpletuner.data.discover import Discovery
    from simpletuner.options.data import Data


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which pictures are evaluated with."""

    datasets: tuple[str, ...]
    """Ids."""
    images: int
    """Of each dataset, at most."""

    def of(self, discovery: Discovery) -> Discovery:
        """A dataset's pictures as far as they are looked at: those whose names hash lowest, so that most stay when others are added."""
        chosen = sorted(discovery.samples, key=lambda sample: seed_from("evaluated", sample.id))[: self.images]
        if len(chosen) == len(discovery.samples):
            return discovery
        backend, count = chosen[0].backend, len(discovery.samples)
        note = f"dataset {backend!r}: {len(chosen)} of its {count} images are evaluated with, as num_eval_images says"
        return replace(discovery, samples=tuple(chosen), notes=(*discovery.notes, note))


def held_out_of(options: Validation, plan: DataPlan) -> HeldOut:
    """Settle what is evaluated with.

    Raises:
        ConfigError: `eval_dataset_id` names no held-out dataset.
    """
    known = tuple(dataset.id for dataset in plan.held_out)
    if options.eval_dataset_id is not None and options.eval_dataset_id not in known:
        named = choose(options.eval_dataset_id, known, "datasets of dataset_type eval") if known else "no dataset has dataset_type eval"
        raise ConfigError(f"eval_dataset_id {options.eval_dataset_id!r} is not there", hint=named)
    chosen = known if options.eval_dataset_id is None else (options.eval_dataset_id,)
    return HeldOut(() if options.eval_loss_disable else chosen, options.num_eval_images)


def idle_notes(options: Validation, data: Data, plan: DataPlan) -> list[str]:
    """Name options that were set and have nothing to work on."""
    usual, notes = Validation(), []
    keys = ("num_eval_images", "eval_steps_interval", "eval_epoch_interval", "eval_timesteps")
    by_loss = (*keys, "early_stop_patience") if options.best_checkpoint == "loss" else keys
    asked = [key for key in by_loss if getattr(options, key) != getattr(usual, key)]
    if asked and not plan.held_out:
        notes.append(f"{', '.join(asked)} without effect: no dataset has dataset_type eval")
    if data.masked_loss_probability != 1 and not any(one.is_mask for one in plan.conditioning):
        notes.append("masked_loss_probability without effect: no dataset has masks")
    return notes
