"""What the wizard proposes, and why: one function an answer, of what the machine and the folder have and of the answers before it.

Everything here is pure. The figures of memory are rough, to begin with something that is near; the plan that follows is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from simpletuner.cli.wizard.figures import WORK_BYTES, held_bytes, ram_room, readable, rounded, work_bytes
from simpletuner.cli.wizard.machine import GIGABYTE, Machine
from simpletuner.cli.wizard.model import ModelFacts
from simpletuner.cli.wizard.pictures import Pictures
from simpletuner.data.geometry import Measure
from simpletuner.optim.catalogue import OPTIMIZERS, Row

RATES = {"lora": 1e-4, "lokr": 2e-4, "full": 1e-5}
"""What AdamW usually takes."""
ROOM = 0.92
"""Share of a card that a run may plan to fill."""
STATE_BYTES = 16
"""A weight that is trained whole takes this much with its gradient and AdamW's memory, in float32."""
SMALL_SIDE = 0.5
"""A picture below this share of the resolution is enlarged more than twice."""
SHARE_LEFT_OUT = 0.2
"""More pictures than this are not left out for being small."""
LOOKS, LEAST_LOOKS = 400, 5
"""Looks at pictures in a whole run: this many times the root of their number, and each picture at least so often."""
SAVES = 8


@dataclass(frozen=True, slots=True)
class Proposal:
    """A value, and the reason for it in a line."""

    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a rule may look at."""

    machine: Machine
    pictures: Pictures
    chosen: Mapping[str, Any]
    """What was answered, by key; other answers are as proposed."""
    model_of: Callable[[str, str | None, str | None], ModelFacts]
    flavours_of: Callable[[str], Mapping[str, float]]
    """A family's flavours, to their parameters in billions."""
    found: dict[str, Proposal] = field(default_factory=dict)
    """Proposals so far."""

    def value(self, key: str) -> Any:
        """The answer, or what is proposed; None where neither is."""
        if key in self.chosen:
            return self.chosen[key]
        return self.found[key].value if key in self.found else None

    @property
    def model(self) -> ModelFacts:
        return self.model_of(self.value("model_family"), self.value("model_flavour") or None, self.value("pretrained_model_name_or_path") or None)

    @property
    def captioned(self) -> Pictures:
        """The pictures without those that have no caption where a .txt file is it."""
        return self.pictures.kept(None, needs_text=self.value("caption_strategy") == "textfile")

    @property
    def trained(self) -> Pictures:
        """The pictures that train: of those with a caption the ones that `minimum_image_size` leaves."""
        least = self.value("minimum_image_size")
        return self.captioned.kept(Measure(least, self.value("resolution_type")), needs_text=False) if least else self.captioned

    @property
    def card_bytes(self) -> int:
        """Of the card that the run is for; 0 without."""
        return self.machine.card.free_bytes if self.machine.card else 0

    @property
    def kind(self) -> str:
        """lora, lokr or full."""
        if self.value("model_type") == "full":
            return "full"
        return "lokr" if self.value("lora_type") == "lycoris" else "lora"


Rule = Callable[[Situation], Proposal | None]
"""None: this is no question here."""


def propose(situation: Situation) -> dict[str, Proposal]:
    """Propose everything, each in view of what was answered and proposed before it."""
    for key, rule in RULES.items():
        proposal = rule(situation)
        if proposal is not None:
            situation.found[key] = proposal
    return situation.found


# Pictures and captions.


def caption_strategy(s: Situation) -> Proposal:
    found = s.pictures
    if found.with_text and found.with_text >= found.count / 2:
        without = found.count - found.with_text
        return Proposal(
            "textfile", f"{found.with_text} of {found.count} pictures have one" + (f"; {without} have none and are left out" if without else "")
        )
    if found.telling_names > found.count / 2:
        return Proposal("filename", f"{found.telling_names} of {found.count} names have words: {', '.join(found.captions.get('filename', ())[:1])}")
    return Proposal("instanceprompt", "neither .txt files nor names describe the pictures: one caption for all")


def instance_prompt(s: Situation) -> Proposal | None:
    if s.value("caption_strategy") != "instanceprompt":
        return None
    words = re.sub(r"[\W_]+", " ", PurePath(s.pictures.folder).name).strip() or "my subject"
    return Proposal(f"a photo of {words}", "from the folder's name; a rare word for your subject is better")


# The model.


def model_family(s: Situation) -> Proposal:
    card = s.card_bytes
    if not card:
        return Proposal("sd1x", "the smallest family, since there is no card; a CPU still needs hours")
    size = f"the card has {card / GIGABYTE:.0f} GB"
    if card < 7e9:
        return Proposal("sd1x", f"0.86 billion parameters: {size}")
    if card < 11.5e9:
        return Proposal("sdxl", f"2.6 billion parameters fit: {size}")
    return Proposal("auraflow", f"6.8 billion parameters fit, in 8 bits if need be: {size}")


def model_flavour(s: Situation) -> Proposal:
    flavours = s.flavours_of(s.value("model_family"))
    if s.chosen.get("pretrained_model_name_or_path"):
        return Proposal("", "another model is named")
    first = next(iter(flavours))
    smallest = min(flavours, key=lambda name: flavours[name]) if flavours else first
    if s.card_bytes and flavours[first] * GIGABYTE > s.card_bytes * ROOM - WORK_BYTES and flavours[smallest] < flavours[first]:
        return Proposal(smallest, f"{flavours[smallest]:g} billion parameters; {first} has {flavours[first]:g}, too many for this card in 8 bits")
    return Proposal(first, "the family's first one")


def pretrained(s: Situation) -> Proposal | None:
    return Proposal("", "") if s.value("model_flavour") == "" else None


def model_type(s: Situation) -> Proposal:
    return Proposal("lora", f"{s.trained.count} pictures are enough for an adapter, which is a small file; all weights want thousands")


def lora_type(s: Situation) -> Proposal | None:
    if s.value("model_type") == "full":
        return None
    if not s.model.loads_lora:
        return Proposal("lycoris", "pipelines of this family load no plain LoRA")
    return Proposal("standard", "plain LoRA: every tool loads it; a LoKr learns styles in a smaller file")


def lora_rank(s: Situation) -> Proposal | None:
    if s.kind != "lora":
        return None
    count = s.trained.count
    rank = 16 if count < 50 else 32 if count < 500 else 64
    return Proposal(rank, f"for {count} pictures: more could learn them by heart, less would miss detail")


def lokr_factor(s: Situation) -> Proposal | None:
    if s.kind != "lokr":
        return None
    factor = 16 if s.trained.count < 500 else 8
    return Proposal(factor, f"for {s.trained.count} pictures; feed-forward layers get half of it, so that they can learn more")


def lokr_layers(s: Situation) -> Proposal | None:
    if s.kind != "lokr":
        return None
    if s.model.risky_layers:
        return Proposal("attention", f"feed-forward layers of {s.model.family} are known to end in NaN at times")
    return Proposal("attention+feedforward", "looks are learned in feed-forward layers too")


# Size and memory.


def resolution(s: Situation) -> Proposal:
    native, edge, step = s.model.native_px, s.captioned.edge_px, s.model.step_px
    if not edge or edge >= native:
        return Proposal(native, f"what {s.model.family} was made for; your pictures are large enough")
    size = max(step, edge // step * step, native // 2 // step * step)
    return Proposal(min(size, native), f"your pictures are about {edge} px square; {native} would only enlarge them")


def minimum_image_size(s: Situation) -> Proposal | None:
    least = int(s.value("resolution") * SMALL_SIDE) if s.value("resolution_type") != "area" else 0
    small = s.captioned.count - s.captioned.kept(Measure(least, s.value("resolution_type")), needs_text=False).count if least else 0
    if not small or small > SHARE_LEFT_OUT * s.captioned.count:
        return Proposal(0, "all are used" if not small else f"all are used, though {small} must be enlarged more than twice")
    return Proposal(least, f"leaves out {small} that would be enlarged more than twice")


def mixed_precision(s: Situation) -> Proposal:
    if not s.card_bytes:
        weights, room = 2 * s.model.weight_bytes / GIGABYTE, ram_room(s) / GIGABYTE
        if weights > room:
            return Proposal(
                "bf16", f"slow on a CPU, but {weights:.1f} GB of weights in float32 are more than the {room:.0f} GB of main memory for them"
            )
        return Proposal("no", "a CPU computes faster in float32 than in bf16")
    card = s.machine.card
    if card and not card.has_bf16:
        return Proposal("fp16", f"{card.name} does not compute in bf16")
    return Proposal("bf16", "half the memory of float32, and steadier than fp16")


def base_model_precision(s: Situation) -> Proposal:
    room, weights = s.card_bytes * ROOM - work_bytes(s), s.model.weight_bytes
    if s.kind == "full":
        return Proposal("no_change", "weights that are trained cannot be quantised")
    if not s.card_bytes:
        room, weights = ram_room(s), weights * (2 if s.value("mixed_precision") == "no" else 1)
        if weights > room:
            less, held = s.model.weight_bytes / 2 / GIGABYTE, weights / GIGABYTE
            return Proposal("int8-quanto", f"{held:.1f} GB of weights become {less:.1f}; main memory has room for {room / GIGABYTE:.0f}")
    if weights <= room:
        return Proposal("no_change", "it fits as it is" if s.card_bytes else f"{weights / GIGABYTE:.1f} GB of weights fit in main memory")
    if weights / 2 <= room:
        return Proposal("int8-quanto", f"{weights / GIGABYTE:.1f} GB of weights become {weights / 2 / GIGABYTE:.1f}, at hardly any loss")
    return Proposal("nf4-bnb", f"{weights / GIGABYTE:.1f} GB of weights become {weights / 4 / GIGABYTE:.1f}; less exact than 8 bits")


def gradient_checkpointing(s: Situation) -> Proposal:
    if not s.card_bytes and s.model.billions < 0.2:
        return Proposal(False, "the model is small")
    return Proposal(True, "much less memory for a third more time")


def blocks_to_swap(s: Situation) -> Proposal | None:
    return None if s.kind == "full" else Proposal(0, "all of the base stays on the card; more costs time, and saves memory")


def train_batch_size(s: Situation) -> Proposal:
    spare = s.card_bytes * ROOM - held_bytes(s) - work_bytes(s)
    if s.kind == "full" or spare <= 0:
        return Proposal(1, "one at a time takes least memory")
    most = max(1, min(4, 1 + int(spare / work_bytes(s)), s.trained.count // 2))
    return Proposal(most, f"there is room for {most} at once; more pictures a step make calmer steps" if most > 1 else "room for one at a time")


# Learning.


def optimizer(s: Situation) -> Proposal:
    if s.kind != "full":
        return Proposal("torch-adamw", "the usual one; an adapter is small, so its memory does not matter")
    if s.value("mixed_precision") != "bf16":
        return Proposal("torch-adamw", "the usual one")
    return Proposal("adamw_bf16", "AdamW in half the memory, without losing small updates")


def row_of(name: Any) -> Row | None:
    return next((row for row in OPTIMIZERS if row.name == name), None)


def learning_rate(s: Situation) -> Proposal:
    row, kind = row_of(s.value("optimizer")), s.kind
    usual, of = RATES[kind], {"lora": "a LoRA", "lokr": "a LoKr", "full": "all weights"}[kind]
    if row is not None and row.rate is not None:
        return Proposal(row.rate, f"{row.name} finds its own rate; {row.rate:g} is where it starts from")
    factor, why = rate_factor(row.name if row else "")
    return Proposal(float(f"{usual * factor:.3g}"), f"usual for {of}" + (f" with AdamW is {usual:g}; {why}" if why else " with AdamW"))


def rate_factor(name: str) -> tuple[float, str]:
    """How an optimizer's rate stands to AdamW's, and why."""
    if "lion" in name:
        return 0.1, f"{name} wants a tenth of it"
    if name == "came":
        return 0.2, "came wants a fifth of it"
    if name == "torch-adadelta":
        return 1 / RATES["lora"], "adadelta wants about 1"
    if "sgd" in name:
        return 100.0, f"{name} wants far more"
    return 1.0, ""


def lr_scheduler(s: Situation) -> Proposal:
    row = row_of(s.value("optimizer"))
    if row is not None and (row.averages or row.rate is not None):
        return Proposal("constant", f"{row.name} is made for a constant rate")
    return Proposal("cosine", "it falls towards the end, so that the result settles")


def max_train_steps(s: Situation) -> Proposal:
    count, batch = max(1, s.trained.count), s.value("train_batch_size") or 1
    looks = max(LOOKS * math.sqrt(count), LEAST_LOOKS * count)
    steps = rounded(looks / batch)
    return Proposal(steps, f"about {steps * batch / count:.0f} looks at each of {count} pictures, {batch} at a time")


def lr_warmup_steps(s: Situation) -> Proposal:
    row = row_of(s.value("optimizer"))
    if row is not None and row.rate is not None:
        return Proposal(0, f"{row.name} warms up by itself")
    steps = min(100, readable((s.value("max_train_steps") or 0) / 20))
    return Proposal(steps, "the first steps are taken carefully")


def use_ema(s: Situation) -> Proposal:
    return Proposal(False, "an adapter gains little by it" if s.kind != "full" else "it takes as much memory again as the weights")


# Saving and looking.


def output_dir(s: Situation) -> Proposal:
    return Proposal(f"output/{s.value('name') or 'run'}", "named as this training")


def checkpoint_step_interval(s: Situation) -> Proposal:
    steps = s.value("max_train_steps") or 0
    interval = max(1, readable(steps / SAVES)) if steps else 500
    return Proposal(interval, f"{math.ceil(steps / interval) or 1} to choose from; checkpoints_total_limit keeps the newest 5")


def validation_prompt(s: Situation) -> Proposal:
    strategy = s.value("caption_strategy")
    if strategy == "instanceprompt":
        return Proposal(s.value("instance_prompt"), "the caption of your pictures")
    found = s.pictures.captions.get(strategy, ())
    return Proposal(found[0][:200], "a caption of yours") if found else Proposal("a photo", "write what you want to see")


def renders_captions(s: Situation) -> Proposal | None:
    more = s.pictures.captions.get(s.value("caption_strategy"), ())[1:]
    return Proposal(True, f"{len(more)} more, to compare with your pictures") if more else None


def validation_resolution(s: Situation) -> Proposal:
    if s.value("resolution_type") == "area":
        return Proposal(str(s.model.native_px), "what the model was made for")
    side = max(s.model.step_px, int(s.value("resolution")) // s.model.step_px * s.model.step_px)
    return Proposal(f"{side}x{side}", "as it is trained")


def validation_step_interval(s: Situation) -> Proposal:
    return Proposal(s.value("checkpoint_step_interval"), "a look at each checkpoint")


def fixed(value: Any, reason: str) -> Rule:
    """A proposal that looks at nothing."""
    return lambda s: Proposal(value, reason)


RULES: dict[str, Rule] = {
    "caption_strategy": caption_strategy,
    "instance_prompt": instance_prompt,
    "model_family": model_family,
    "model_flavour": model_flavour,
    "pretrained_model_name_or_path": pretrained,
    "model_type": model_type,
    "lora_type": lora_type,
    "resolution_type": fixed("pixel_area", "the edge of a square of the same area, whatever a picture's shape"),
    "resolution": resolution,
    "minimum_image_size": minimum_image_size,
    "lora_rank": lora_rank,
    "lokr_factor": lokr_factor,
    "lokr_layers": lokr_layers,
    "mixed_precision": mixed_precision,
    "base_model_precision": base_model_precision,
    "gradient_checkpointing": gradient_checkpointing,
    "blocks_to_swap": blocks_to_swap,
    "train_batch_size": train_batch_size,
    "optimizer": optimizer,
    "learning_rate": learning_rate,
    "lr_scheduler": lr_scheduler,
    "max_train_steps": max_train_steps,
    "lr_warmup_steps": lr_warmup_steps,
    "use_ema": use_ema,
    "output_dir": output_dir,
    "checkpoint_step_interval": checkpoint_step_interval,
    "validation_prompt": validation_prompt,
    "renders_captions": renders_captions,
    "validation_resolution": validation_resolution,
    "validation_step_interval": validation_step_interval,
    "report_to": fixed("tensorboard", "files in output_dir; nothing leaves this machine"),
}
"""In the order in which one may look at another."""
