"""Known pitfalls of what was answered, each in a sentence that says what to do. Pure: nothing is asked and nothing is read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator

from simpletuner.cli.wizard.figures import RAM_ROOM, held_bytes
from simpletuner.cli.wizard.machine import GIGABYTE
from simpletuner.cli.wizard.proposals import ROOM, SMALL_SIDE, STATE_BYTES, Situation, learning_rate, row_of

FAR_RATE = 8
"""A rate this many times above or below the usual one is likely to be a slip."""
FEED_FORWARD = "blocks.0.ff.net.0.proj"
"""What a feed-forward layer is called in the families that name risky ones."""
SMALL_DATASET = 2000
"""Pictures under which all weights are rather learned by heart."""
FILE_FACTOR = 1.6
"""What a download takes as a whole, for each byte of the denoiser: text encoders and VAE come with it."""
CLEARLY = 0.8
"""Pictures under this share of the resolution are enlarged so far that it shows."""

Pitfall = Callable[[Situation], Iterator[str]]


def pitfalls(s: Situation) -> list[str]:
    """Name the pitfalls."""
    return [text for look in ALL for text in look(s)]


def batch(s: Situation) -> Iterator[str]:
    size, count = s.value("train_batch_size"), s.trained.count
    if count and size > count:
        yield f"train_batch_size {size} is more than your {count} pictures; set it to {max(1, count // 2)} or less"


def rate(s: Situation) -> Iterator[str]:
    name, chosen, usual = s.value("optimizer"), s.value("learning_rate"), learning_rate(s)
    row = row_of(name)
    if row is None or not chosen:
        return
    if row.rate is not None:
        if chosen != row.rate:
            yield f"learning_rate {chosen:g} has no effect: {name} finds its own, from {row.rate:g}"
    elif not 1 / FAR_RATE <= chosen / usual.value <= FAR_RATE:
        yield f"learning_rate {chosen:g} is far from {usual.value:g}, which is {usual.reason}"


def feed_forward(s: Situation) -> Iterator[str]:
    if s.kind == "lokr" and s.value("lokr_layers") == "attention+feedforward":
        yield from dict.fromkeys(known for glob, known in s.model.risky_layers.items() if fnmatch.fnmatch(FEED_FORWARD, glob))


def sage(s: Situation) -> Iterator[str]:
    if str(s.value("attention_mechanism")).startswith("sageattention") and "training" in str(s.value("sageattention_usage")):
        yield "SageAttention in training computes in 8 bits, which is known to ruin runs; set sageattention_usage to inference"


def full(s: Situation) -> Iterator[str]:
    if s.kind != "full":
        return
    needed = s.model.billions * GIGABYTE * (STATE_BYTES if s.value("optimizer") == "torch-adamw" else 8)
    if s.card_bytes and needed > s.card_bytes * ROOM:
        card = f"the card has {s.card_bytes / GIGABYTE:.0f} GB"
        yield f"all weights with their gradients and AdamW's memory take about {needed / GIGABYTE:.0f} GB, and {card}; model_type lora needs far less"
    if 0 < s.trained.count < SMALL_DATASET:
        yield f"{s.trained.count} pictures are few for all weights: the model forgets what they do not show; model_type lora keeps it"


def size(s: Situation) -> Iterator[str]:
    side, native = s.value("resolution"), s.model.native_px
    if s.value("resolution_type") == "area" or not side:
        return
    if side > native * 1.3:
        yield f"{s.model.family} was made for {native} px: at {side:g} it repeats and doubles things; set resolution to {native}"
    elif side < native * SMALL_SIDE:
        yield f"{s.model.family} was made for {native} px: at {side:g} it knows little; use larger pictures, or a smaller model"
    small = s.trained.smaller_than(side * CLEARLY)
    if small:
        yield f"{small} of {s.trained.count} pictures are clearly smaller than resolution {side:g} and are enlarged, which makes results soft"


def precision(s: Situation) -> Iterator[str]:
    if s.value("mixed_precision") == "fp16" and not s.card_bytes:
        yield "mixed_precision fp16 needs a card; set it to no"
    card = s.machine.card
    if s.value("mixed_precision") == "bf16" and card and not card.has_bf16:
        yield f"{card.name} does not compute in bf16, or very slowly; set mixed_precision to fp16"
    if s.kind == "full" and s.value("base_model_precision") not in (None, "no_change"):
        yield "weights that are trained cannot be quantised; set base_model_precision to no_change"


def machine(s: Situation) -> Iterator[str]:
    if not s.card_bytes and s.model.billions > 0.2:
        yield f"without a card, a step of {s.model.billions:g} billion parameters takes minutes"
    ram = s.machine.ram_bytes
    if not s.card_bytes and ram and held_bytes(s) > ram * RAM_ROOM:
        sizes = f"{held_bytes(s) / GIGABYTE:.1f} GB, and main memory has {ram / GIGABYTE:.0f} GB"
        yield f"the weights alone take {sizes}: it is likely not to fit; take a smaller model, or base_model_precision int8-quanto"
    disk, needed = s.machine.disk_bytes, s.model.weight_bytes * FILE_FACTOR
    if not s.model.is_here and disk is not None:
        if needed > disk:
            yield f"{s.model.name} is a download of some {needed / GIGABYTE:.0f} GB, and {disk / GIGABYTE:.0f} GB of disk are free"
        yield f"{s.model.name} is not on this machine: it is fetched from the hub. If its page asks to accept a licence, do so, and set HF_TOKEN"


def pictures(s: Situation) -> Iterator[str]:
    found = s.pictures
    if found.copies:
        yield f"{found.copies} pictures are there twice, and are learned twice as hard; `simpletuner dataset check` names them"
    if s.value("caption_strategy") == "textfile" and found.with_text < found.count:
        yield f"{found.count - found.with_text} pictures have no .txt file beside them, and are left out"
    if s.value("caption_strategy") == "filename" and found.telling_names < found.count / 2:
        yield "most file names say nothing of the picture, and would be captions; instanceprompt gives all one caption"
    if 0 < s.trained.count < 5:
        yield f"{s.trained.count} pictures are few: ten to thirty, from several sides, are usual for a subject"


ALL: tuple[Pitfall, ...] = (pictures, batch, rate, feed_forward, sage, full, size, precision, machine)
