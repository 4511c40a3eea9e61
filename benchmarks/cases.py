"""What is measured: models, sizes, adapters, precisions, checkpointing and pictures; and in which order, the most wanted first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.product import alignment_of
from simpletuner.memory.precision import PRECISIONS
from simpletuner.types import Size

MODELS = ("auraflow", "sdxl", "flux")
SIZES = ("tiny", "medium", "real")
PIXELS = {"tiny": (64, 32), "medium": (256, 128), "real": (1024, 512)}
"""Sides of the squares that are measured at each size of model, the usual one first."""
MIXED = ((1, 1), (0.8125, 1.1875), (1.1875, 0.8125), (0.875, 1.125), (1.125, 0.875))
"""Sides of a mix of buckets, in those of the square of like area."""
BATCH = {"tiny": 2, "medium": 2, "real": 1}
TOO_COARSE = ("int2-quanto", "int4-quanto", "fp4-bnb")
"""Precisions that nobody takes for their speed."""
WAYS = {"no_change": "bf16"}


@dataclass(frozen=True)
class Case:
    """One thing that is trained, in some way."""

    model: str
    size: str
    adapter: str = "lokr"
    precision: str = "no_change"
    checkpointing: bool = False
    px: int = 1024
    is_mixed: bool = False
    batch: int = 1
    dynamo_mode: str = ""
    """How ours compiles its blocks; it is compared with ours that does not."""

    @property
    def name(self) -> str:
        kept = (" checkpointing" if self.checkpointing else "") + (f" compiled ({self.dynamo_mode})" if self.dynamo_mode else "")
        pictures = f"{self.px} px" + (" mixed" if self.is_mixed else "")
        return f"{self.model} {self.size}, {self.adapter}, {WAYS.get(self.precision, self.precision)}{kept}, {pictures}, batch {self.batch}"

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing special about it."""
        return self.precision == "no_change" and not (self.checkpointing or self.is_mixed or self.dynamo_mode)

    @property
    def pictures(self) -> tuple[Size, ...]:
        """One bucket each."""
        step = alignment_of(Size(self.px, self.px))
        sides = [
            (round(self.px * width / step) * step, round(self.px * height / step) * step) for width, height in (MIXED if self.is_mixed else MIXED[:1])
        ]
        return tuple(Size(*both) for both in dict.fromkeys(sides))

    @property
    def contenders(self) -> Mapping[str, tuple[str, str, bool]]:
        """Ours, and what it is compared with: by its name the kind, the precision and whether activations are computed again."""
        found = {"ours": ("ours", self.precision, self.checkpointing), "floor": ("floor", self.precision, self.checkpointing)}
        if self.dynamo_mode:
            found["ours, not compiled"] = ("ours", self.precision, self.checkpointing)
        elif self.precision == "no_change":
            if self.adapter == "lokr":
                found["library"] = ("library", self.precision, self.checkpointing)
            found["peer"] = ("peer", self.precision, self.checkpointing)
        else:
            found["ours, bf16"] = ("ours", "no_change", self.checkpointing)
        if self.checkpointing:
            found["ours, kept"] = ("ours", self.precision, False)
        return found

    def compiling(self, contender: str) -> Mapping[str, str]:
        """Options of one of our runs by which it compiles."""
        return {"dynamo_backend": "inductor", "dynamo_mode": self.dynamo_mode} if self.dynamo_mode and contender == "ours" else {}


def fast_precisions() -> list[str]:
    return [row.name for row in PRECISIONS if row.library and row.name not in TOO_COARSE]


def wanted(size: str) -> list[Case]:
    """The cases that the goals are about, the most wanted first."""
    large, small = PIXELS[size]
    plain = [Case(model, size, px=large, batch=BATCH[size]) for model in MODELS]
    found = [*plain, *(replace(case, checkpointing=True) for case in plain)]
    for precision in fast_precisions():
        found += [replace(case, precision=precision) for case in plain]
    lora = [replace(case, adapter="lora") for case in plain]
    found += [*lora, *(replace(case, px=small) for case in lora), *(replace(case, px=small, checkpointing=True) for case in lora)]
    found += [replace(case, is_mixed=True) for case in plain]
    found += [replace(case, batch=4 * case.batch, checkpointing=True) for case in plain]
    found += [replace(case, dynamo_mode=mode) for mode in ("default", "reduce-overhead") for case in plain]
    return list(dict.fromkeys(found))


def every(size: str) -> Iterator[Case]:
    """All combinations."""
    precisions = ["no_change", *fast_precisions()]
    for px, adapter, is_mixed, precision, checkpointing, model in itertools.product(
        PIXELS[size], ("lokr", "lora"), (False, True), precisions, (False, True), MODELS
    ):
        yield Case(model, size, adapter, precision, checkpointing, px, is_mixed, BATCH[size])
