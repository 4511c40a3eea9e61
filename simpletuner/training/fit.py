"""Find the options with which a run fits a card, those that cost least time first.

What an option costs in time follows from rules that are stated with it; they are no measurements of this machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simpletuner.errors import ConfigError
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.options.memory import OFFLOADS
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_family
from simpletuner.training.plan import CUDA_BYTES, Counted, DenoiserBytes, Plan, Planner
from simpletuner.training.plan_pictures import LargestBatch
from simpletuner.training.plan_step import EMA
from simpletuner.training.plan_step import OPTIMIZER as OPTIMIZER_STATE

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the blocks that are tried to wait in main memory."""
SWAP_COST = 0.6
"""Of a step's time, if all blocks wait."""
MOST_PLANS = 4
"""Whole plans that are made before the last one is given."""


@dataclass(frozen=True, slots=True)
class Change:
    """Options that go together, and what they cost."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Option key to value; nothing is as it is."""
    time_factor: float = 1.0
    """Of a step's time, for the same number of pictures."""
    rule: str = ""
    """Why, and what else it costs."""


Changes = tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Options with which a run fits, or comes nearest."""

    changes: Changes
    plan: Plan
    fits: bool

    @property
    def time_factor(self) -> float:
        return math.prod(change.time_factor for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        changes = [{"settings": dict(one.settings), "time_factor": round(one.time_factor, 3), "rule": one.rule} for one in self.changes]
        return {"fits": self.fits, "time_factor": round(self.time_factor, 3), "changes": changes, "plan": self.plan.as_json()}


AS_IT_IS = Change()
CHECKPOINTING = Change({"gradient_checkpointing": True}, 4 / 3, "the forward pass is computed twice: a third more in theory")
INT8 = Change({"base_model_precision": "int8-quanto"}, 1.2, "weights are widened at each use; published steps take 1.2 to 3.6 times as long")
NF4 = Change({"base_model_precision": "nf4-bnb"}, 1.3, "as int8, and through a table (assumed); it shows more in pictures than 8 bits do")
OPTIMIZER = Change({"optimizer": "bnb-adamw8bit"}, 1.0, "AdamW that remembers 2 bytes a weight in place of 8; updates are less exact")
AVERAGE = Change({"ema_device": "cpu"}, 1.05, "each update of the average waits for a copy to main memory (assumed)")
SMALL_BATCHES = (1.1, "as many pictures a step, one after the other; a card computes single ones less well (assumed)")
SWAP = "blocks are copied to the card while others compute; published figures of such swaps: up to 60 % more where all of them wait"
TEXT_PRECISIONS = {"int8-quanto": "a little less exactly", "nf4-bnb": "less exactly"}
ONE_CAPTION = Change({"text_encoder_batch_size": 1}, 1.0, "captions are encoded one by one, once")
ONE_PICTURE = Change({"vae_batch_size": 1}, 1.0, "pictures are encoded one by one, once")
TILES = Change({"vae_enable_tiling": True}, 1.0, "pictures are encoded and decoded in tiles; seams may show")


def fit(config: TrainConfig, batch: LargestBatch, card_bytes: int) -> Proposal:
    """Propose what to change so that a run fits a card; the smallest run there is if none fits.

    Args:
        card_bytes: what is free on it.
    """
    room, search = card_bytes - CUDA_BYTES, _Search(config, batch)
    as_it_is = search.plan(())
    if as_it_is.peak_vram_bytes <= room:
        return Proposal((), as_it_is, fits=True)
    thought_to_fit = [changes for changes in search.combinations if search.step_bytes(changes) <= room]
    smallest = min(search.combinations, key=search.step_bytes)
    found: Proposal | None = None
    for changes in [*thought_to_fit[: MOST_PLANS - 1], smallest]:
        found = search.with_other_phases(changes, room)
        if all(phase.vram_bytes <= room for phase in found.plan.phases if phase.name not in ("text", "vae")):
            return found  # what is too large otherwise, no other combination makes smaller
    assert found is not None
    return found


class _Search:
    """Tries options, and counts once what several of them have in common."""

    def __init__(self, config: TrainConfig, batch: LargestBatch) -> None:
        self._config, self._batch = config, batch
        self._is_full = config.adapters.model_type == "full"
        self._counted_before: Counted = {}
        self._weights: dict[str | None, dict[int, int]] = {}

    @property
    def combinations(self) -> list[Changes]:
        """Of all that can be changed, those that cost least time first."""
        found = [tuple(change for change in changes if change.settings) for changes in itertools.product(*self._levers())]
        return sorted(found, key=lambda changes: (math.prod(one.time_factor for one in changes), len(changes)))

    def plan(self, changes: Changes) -> Plan:
        return self._planner(changes).plan()

    def with_other_phases(self, changes: Changes, room: int) -> Proposal:
        """Add what the other phases need."""
        plan = self.plan(changes)
        for name, ways in self._other_phases().items():
            for way in ways:
                if any(phase.name == name and phase.vram_bytes > room for phase in plan.phases):
                    try:
                        plan = self.plan((*changes, way))
                    except ConfigError:  # an encoder with no layer that can be quantised
                        continue
                    changes = (*changes, way)
        return Proposal(changes, plan, plan.peak_vram_bytes <= room)

    def _other_phases(self) -> Mapping[str, Changes]:
        """What makes the other phases smaller, which costs no time in training."""
        encoders = sum(name.startswith("text_encoder") for name in build_family(self._config).parts)
        keys = [f"text_encoder_{number}_precision" for number in range(1, encoders + 1)]
        quantised = [Change(dict.fromkeys(keys, precision), 1.0, f"captions are encoded {how}, once") for precision, how in TEXT_PRECISIONS.items()]
        return {"text": (ONE_CAPTION, *quantised), "vae": (ONE_PICTURE, TILES), "validation": (TILES,)}

    def step_bytes(self, changes: Changes) -> int:
        """What a step takes: what it works in, which the precision and the place of weights hardly change, and the weights."""
        settings = _settings(changes)
        blocks, precision = settings.pop("blocks_to_swap", 0), settings.pop("base_model_precision", None)
        optimizer, average = settings.pop("optimizer", None), settings.pop("ema_device", None)
        found = self._counted((Change(settings),) if settings else ())
        step = found.step
        if optimizer is not None:
            step = step.with_part(OPTIMIZER_STATE, int(step.trained * find_optimizer(optimizer).state_bytes))
        if average is not None:
            step = step.with_part(EMA, 0)
        return step.peak if self._is_full else step.peak - found.offload.weights + self._weight_bytes(precision)[blocks]

    def _counted(self, changes: Changes) -> DenoiserBytes:
        return self._planner(changes).count_denoiser()

    def _weight_bytes(self, precision: str | None) -> Mapping[int, int]:
        """Bytes of the base on the card, by the number of blocks that wait."""
        if precision not in self._weights:
            counts = [0, *self._swap_counts()]
            options = [self._config.memory.model_copy(update={"blocks_to_swap": count} if count else {}) for count in counts]
            settings = {"base_model_precision": precision} if precision else {}
            found = self._planner((Change(settings),)).weights_with(options)
            self._weights[precision] = dict(zip(counts, (one.resident for one in found)))
        return self._weights[precision]

    def _levers(self) -> list[Sequence[Change]]:
        """For each thing that can be changed, as it is and what it can be changed to."""
        memory, training = self._config.memory, self._config.training
        levers: list[list[Change]] = [[] if memory.gradient_checkpointing else [CHECKPOINTING]]
        if self._batch.count > 1:
            settings = {"train_batch_size": 1, "gradient_accumulation_steps": training.gradient_accumulation_steps * self._batch.count}
            levers.append([Change(settings, *SMALL_BATCHES)])
        if self._is_full:
            levers.append([] if "8bit" in self._config.optim.optimizer else [OPTIMIZER])
            levers.append([AVERAGE] if training.use_ema and training.ema_device != "cpu" else [])
        elif memory.base_model_precision == "no_change":
            levers.append([INT8, NF4])
        count = self._counted(()).blocks
        levers.append([Change({"blocks_to_swap": swapped}, 1 + SWAP_COST * swapped / count, SWAP) for swapped in self._swap_counts()])
        return [[AS_IT_IS, *lever] for lever in levers]

    def _swap_counts(self) -> list[int]:
        """Numbers of blocks that are tried to wait; none where something else says which do, or the base is trained."""
        count = self._counted(()).blocks
        if self._is_full or count < 3 or any(getattr(self._config.memory, key) for key in OFFLOADS):
            return []
        return sorted({max(1, round(share * count)) for share in SHARES})

    def _planner(self, changes: Changes) -> Planner:
        settings = _settings(changes)
        count = settings.get("train_batch_size", self._batch.count)
        batch = replace(self._batch, count=count)
        return Planner(with_settings(self._config, settings), batch.size, batch.count, "cuda", batch.references, self._counted_before)


def _settings(changes: Changes) -> dict[str, Any]:
    return {key: value for change in changes for key, value in change.settings.items()}


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A config with other values of some options, by their keys."""
    sections = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        mine = {key: value for key, value in settings.items() if key in type(section).model_fields}
        if mine:
            sections[name] = section.model_copy(update=mine)
    return config.model_copy(update=sections)
