"""Find the options with which a run fits a card, those that cost least time first.

What an option costs in time follows from rules that are stated with it; they are no measurements of this machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simpletuner.errors import ConfigError
from simpletuner.memory.precision import PRECISIONS
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.optim.rules import check_release, trains_in
from simpletuner.options.memory import OFFLOADS
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.building import build_family
from simpletuner.training.plan import CUDA_BYTES, Counted, Plan, Planner
from simpletuner.training.plan_networks import DenoiserBytes
from simpletuner.training.plan_pictures import LargestBatch
from simpletuner.training.plan_step import EMA

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
    order: int = 0
    """Of changes that cost the same time, those with the lower sum come first."""


Changes = tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Options with which a run fits, or comes nearest."""

    changes: Changes
    plan: Plan
    fits: bool
    before: Plan
    """Without the changes."""

    @property
    def time_factor(self) -> float:
        return math.prod(change.time_factor for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        changes = [{"settings": dict(one.settings), "time_factor": round(one.time_factor, 3), "rule": one.rule} for one in self.changes]
        return {
            "fits": self.fits,
            "time_factor": round(self.time_factor, 3),
            "changes": changes,
            "plan": self.plan.as_json(),
            "before": self.before.as_json(),
        }


AS_IT_IS = Change()
CHECKPOINTING = Change({"gradient_checkpointing": True}, 4 / 3, "the forward pass is computed twice: a third more in theory")
INT8 = Change({"base_model_precision": "int8-quanto"}, 1.2, "weights are widened at each use; published steps take 1.2 to 3.6 times as long")
NF4 = Change({"base_model_precision": "nf4-bnb"}, 1.3, "as int8, and through a table (assumed); it shows more in pictures than 8 bits do")
NF4_AFTER_8_BITS = Change(NF4.settings, 1.1, "weights are widened through a table (assumed); it shows more in pictures than 8 bits do")
OFFLOADED = (1.05, "inputs of blocks wait in main memory for the backward pass; the copies go beside the computing (assumed)")
BNB = Change({"optimizer": "bnb-adamw8bit"}, 1.0, "AdamW that remembers 2 bytes of each float32 weight; updates are less exact", 4)
BF16 = Change({"optimizer": "adamw_bf16"}, 1.0, "AdamW of bf16 weights that remembers 4 bytes of each; updates are rounded by chance", 1)
BF16_IN_8_BITS = Change(
    {"optimizer": "ao-adamw8bit"}, 1.0, "AdamW of bf16 weights that remembers 2 bytes of each: less exact; it is compiled at the first step", 4
)
RELEASED = "each gradient goes as soon as its weight is updated; a step in which memory runs out cannot be tried again"
CLIPPED = "; max_grad_norm limits each tensor's gradient, not the whole"
AVERAGE = Change({"ema_device": "cpu"}, 1.05, "each update of the average waits for a copy to main memory (assumed)")
SMALL_BATCHES = (1.1, "as many pictures a step, one after the other; a card computes single ones less well (assumed)")
SWAP = "blocks are copied to the card while others compute; published figures of such swaps: up to 60 % more where all of them wait"
TEXT_PRECISIONS = {"int8-quanto": "a little less exactly", "nf4-bnb": "less exactly"}
ONE_CAPTION = Change({"text_encoder_batch_size": 1}, 1.0, "captions are encoded one by one, once")
PICTURES = "fewer pictures are encoded at a time, once: the cache takes somewhat longer to fill, latents stay the same"
TILES = Change({"vae_enable_tiling": True}, 1.0, "pictures are encoded and decoded in tiles, which takes up to half as long again; seams may show")


def fit(config: TrainConfig, batch: LargestBatch, card_bytes: int) -> Proposal:
    """Propose what to change so that a run fits a card; the smallest run there is if none fits.

    Args:
        card_bytes: what is free on it.
    """
    room, search = card_bytes - CUDA_BYTES, _Search(config, batch)
    before = search.plan(())
    if before.peak_vram_bytes <= room:
        return Proposal((), before, True, before)
    nearest = Proposal((), before, False, before)
    for changes in search.candidates(room):
        found = search.with_other_phases(changes, room, before)
        nearest = min(nearest, found, key=lambda proposal: proposal.plan.peak_vram_bytes)
        if all(phase.vram_bytes <= room for phase in found.plan.phases if phase.name not in ("text", "vae")):
            break  # what is too large otherwise, no other combination makes smaller
    if nearest.fits or not nearest.changes:
        return nearest
    reached = nearest.plan.peak_vram_bytes
    leaner = replace(search.with_other_phases(next(search.thought_to_fit(reached), nearest.changes), reached, before), fits=False)
    return min(leaner, nearest, key=lambda proposal: proposal.plan.peak_vram_bytes)  # which gets as near by less, or is the nearest


class _Search:
    """Tries options, and counts once what several of them have in common."""

    def __init__(self, config: TrainConfig, batch: LargestBatch) -> None:
        self._config, self._batch = config, batch
        self._is_full = config.adapters.model_type == "full"
        self._counted_before: Counted = {}
        self._weights: dict[str | None, dict[int, int]] = {}
        self._combinations: list[Changes] = []

    @property
    def combinations(self) -> list[Changes]:
        """Of all that can be changed and goes together, those that cost least time first."""
        if not self._combinations:
            tried = (tuple(change for change in changes if change.settings) for changes in itertools.product(*self._levers()))
            self._combinations = sorted(filter(self._goes_together, tried), key=_cost)
        return self._combinations

    def thought_to_fit(self, room: int) -> Iterator[Changes]:
        """Combinations of which a step fits."""
        return (changes for changes in self.combinations if self.step_bytes(changes) <= room)

    def candidates(self, room: int) -> Iterator[Changes]:
        """Combinations to plan as a whole: the first that are thought to fit, and the smallest."""
        yield from itertools.islice(self.thought_to_fit(room), MOST_PLANS - 1)
        yield min(self.combinations, key=self.step_bytes)

    def plan(self, changes: Changes) -> Plan:
        return self._planner(changes).plan()

    def with_other_phases(self, changes: Changes, room: int, before: Plan) -> Proposal:
        """Add what the other phases need."""
        plan = self.plan(changes)
        for name, ways in self._other_phases().items():
            for way in ways:
                if any(phase.name == name and phase.vram_bytes > room for phase in plan.phases):
                    replaced = tuple(one for one in changes if one.settings.keys() != way.settings.keys())
                    try:
                        tried = self.plan((*replaced, way))
                    except ConfigError:  # an encoder with no layer that can be quantised
                        continue
                    if tried.phase(name).vram_bytes < plan.phase(name).vram_bytes:
                        plan, changes = tried, (*replaced, way)
        return Proposal(changes, plan, plan.peak_vram_bytes <= room, before)

    def _other_phases(self) -> Mapping[str, Changes]:
        """What makes the other phases smaller, which costs no time in training."""
        encoders = sum(name.startswith("text_encoder") for name in build_family(self._config).parts)
        keys = [f"text_encoder_{number}_precision" for number in range(1, encoders + 1)]
        quantised = [Change(dict.fromkeys(keys, precision), 1.0, f"captions are encoded {how}, once") for precision, how in TEXT_PRECISIONS.items()]
        most = self._config.data.vae_batch_size
        fewer = [Change({"vae_batch_size": count}, 1.0, PICTURES) for count in dict.fromkeys((most // 2, 1)) if 0 < count < most]
        return {"text": (ONE_CAPTION, *quantised), "vae": (*fewer, TILES), "validation": (TILES,)}

    def step_bytes(self, changes: Changes) -> int:
        """What a step takes: what it works in, which the precision and the place of weights hardly change, and the weights."""
        settings = _settings(changes)
        blocks, precision = settings.pop("blocks_to_swap", 0), settings.pop("base_model_precision", None)
        average = settings.pop("ema_device", None)
        found = self._counted((Change(settings),) if settings else ())
        step = found.step if average is None else found.step.with_part(EMA, 0)
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
        levers = [self._checkpointing()]
        if self._batch.count > 1:
            settings = {"train_batch_size": 1, "gradient_accumulation_steps": training.gradient_accumulation_steps * self._batch.count}
            levers.append([Change(settings, *SMALL_BATCHES)])
        if self._is_full:
            levers += [self._optimizers(), self._release()]
            levers.append([AVERAGE] if training.use_ema and training.ema_device != "cpu" else [])
        elif memory.base_model_precision == "no_change":
            levers.append([INT8, NF4])
        elif any(row.name == memory.base_model_precision and row.bits >= 8 for row in PRECISIONS):
            levers.append([NF4_AFTER_8_BITS])
        count = self._counted(()).blocks
        levers.append([Change({"blocks_to_swap": swapped}, 1 + SWAP_COST * swapped / count, SWAP) for swapped in self._swap_counts()])
        return [[AS_IT_IS, *lever] for lever in levers]

    def _checkpointing(self) -> list[Change]:
        """What can be kept in less room, or not at all, for the backward pass."""
        memory, (factor, rule) = self._config.memory, OFFLOADED
        if memory.gradient_checkpointing_backend == "offload":
            return [] if memory.gradient_checkpointing else [CHECKPOINTING]
        offloaded = {"gradient_checkpointing_backend": "offload"}
        if memory.gradient_checkpointing:
            return [Change(offloaded, factor, rule)]
        both = Change({**CHECKPOINTING.settings, **offloaded}, CHECKPOINTING.time_factor * factor, f"{CHECKPOINTING.rule}, and {rule}")
        return [CHECKPOINTING, both]

    def _optimizers(self) -> list[Change]:
        """Other optimizers that are installed: those of bf16 weights where these are allowed, which 8 bits of state for float32 do not come near."""
        here = {row.name for row in OPTIMIZERS if row.is_installed} - {self._config.optim.optimizer}
        in_bf16 = with_settings(self._config, {**BF16.settings, "optimizer_config": ""})
        offered = [BF16, BF16_IN_8_BITS] if trains_in(in_bf16.optim, in_bf16.memory) == "bf16" else [BNB]
        return [change for change in offered if change.settings["optimizer"] in here]

    def _release(self) -> list[Change]:
        optim = self._config.optim
        if optim.optimizer_release_gradients:
            return []
        clips = optim.max_grad_norm > 0 and optim.grad_clip_method == "norm"
        settings = {"optimizer_release_gradients": True, **({"grad_clip_method": "tensor"} if clips else {})}
        return [Change(settings, 1.0, RELEASED + (CLIPPED if clips else ""), 2)]

    def _goes_together(self, changes: Changes) -> bool:
        config = with_settings(self._config, _settings(changes))
        try:
            check_release(config.optim)
        except ConfigError:  # an optimizer that needs all gradients at once
            return False
        return next(config.problems(), None) is None

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


def _cost(changes: Changes) -> tuple[float, int, int]:
    """What to sort by: time, then what else it costs, then the number of changes."""
    return round(math.prod(one.time_factor for one in changes), 6), sum(one.order for one in changes), len(changes)


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
