"""Judge the `digits` example by what it draws: does the base heed its prompts, and did the adapter learn neon, and nothing but neon?

    python benchmarks/quality.py                             the base model alone
    python benchmarks/quality.py --adapter output/digits     and what the adapter made of it

Pictures come out of plain diffusers and LyCORIS, without a line of SimpleTuner. The judge of digits is a support vector machine that
was shown real handwriting, of which the generator has seen nothing; the judge of neon is the brightness of a picture's border.
Ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AuraFlowPipeline
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import SVC

EXAMPLES = Path(__file__).resolve().parent.parent / "simpletuner" / "examples"
sys.path.insert(0, str(EXAMPLES / "digits-base"))
import looks  # noqa: E402  (the recipe's drawing: the judge must see real digits as the generator's were drawn)

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SAMPLES, FEW = 200, 40
STEPS, GUIDANCE, TOKENS, BATCH = 16, 4.0, 16, 40
DARK_BORDER = 0.35
"""A border less bright than this is night; paper has 0.9."""
BORDER_PX = 4
Pictures = NDArray[np.floating[Any]]
"""(N, 64, 64, 3) in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Result:
    """One measured share and what it should be."""

    what: str
    share: float
    samples: int
    at_least: float = 0.0
    at_most: float = 1.0

    @property
    def is_met(self) -> bool:
        return self.at_least <= self.share <= self.at_most

    @property
    def goal(self) -> str:
        if self.at_least > 0:
            return f">= {self.at_least:.0%}"
        return f"<= {self.at_most:.0%}" if self.at_most < 1 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "digits" / "model", help="the base, in diffusers layout (default: the example's)")
    parser.add_argument("--adapter", type=Path, help=f"folder with {ADAPTER_FILE}, e.g. output/digits")
    parser.add_argument("--seed", type=int, default=1000, help="of the first picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--grid", type=Path, help="write a picture of the ten digits here: base above, with the adapter below")
    args = parser.parse_args()
    began = time.monotonic()
    judge = Judge()
    pipeline: Any = AuraFlowPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    results, rows = judge_base(pipeline, judge, args.seed)
    if args.adapter:
        more, more_rows = judge_adapter(pipeline, judge, args.adapter / ADAPTER_FILE, args.seed)
        results, rows = [*results, *more], [*rows, *more_rows]
    seconds = time.monotonic() - began
    show([*judge.results, *results], seconds)
    if args.json:
        facts = [{"what": each.what, "share": each.share, "samples": each.samples, "goal": each.goal, "met": each.is_met} for each in results]
        args.json.write_text(json.dumps({"results": facts, "seconds": round(seconds, 1)}, indent=2) + "\n", encoding="utf-8")
    if args.grid:
        grid(rows).save(args.grid)
    return 0 if all(result.is_met for result in results) else 1


class Judge:
    """Reads digits; learned from real ones of the half that the generator was never shown."""

    def __init__(self) -> None:
        digits, labels = looks.digits()
        drawn, kept = looks.halves(labels)
        random = np.random.default_rng(0)
        fields = {number: looks.strokes(digits[number]) for number in (*drawn, *kept)}
        shown = [looks.draw(fields[number], hand) for hand in (None, random) for number in kept]
        self._machine = SVC(C=10).fit([looks.cells(cover.stroke[..., 0]) for cover in shown], [*labels[kept], *labels[kept]])
        others = [looks.draw(fields[number]) for number in drawn]
        ink = np.stack([looks.ink(cover, random) for cover in others])
        neon = np.stack([looks.neon(cover, random.uniform()) for cover in others])
        self.results = [
            Result("judge: reads the other real digits in ink", self.share_read(ink, labels[drawn]), len(drawn)),
            Result("judge: reads the other real digits in neon", self.share_read(neon, labels[drawn]), len(drawn)),
        ]

    def read(self, pictures: Pictures) -> NDArray[np.int64]:
        """Say which digit each picture shows."""
        return self._machine.predict([looks.cells(strokes) for strokes in strokes_of(pictures)])

    def share_read(self, pictures: Pictures, labels: NDArray[np.int64]) -> float:
        return float((self.read(pictures) == labels).mean())


def strokes_of(pictures: Pictures) -> Pictures:
    """How much of each pixel is stroke, (N, 64, 64), in either look: the contrast to the border, stretched to 0 ... 1."""
    night = (border(pictures) < DARK_BORDER)[:, None, None]
    contrast = np.where(night, pictures.max(-1), 1 - pictures.mean(-1))
    flat = contrast.reshape(len(contrast), -1)
    low, high = (np.percentile(flat, q, axis=1)[:, None, None] for q in (50, 97))
    contrast = (contrast - low) / np.maximum(high - low, 1e-6)
    # A tube has a glow around it, which is no stroke.
    return np.clip(np.where(night, (contrast - 0.45) / 0.35, contrast), 0, 1)


def border(pictures: Pictures) -> Pictures:
    """Mean brightness of each picture's border."""
    is_border = np.ones(pictures.shape[1:3], dtype=bool)
    is_border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    return pictures.mean(-1)[:, is_border].mean(1)


def is_neon(pictures: Pictures) -> NDArray[np.bool_]:
    """Night at the border, and light in the middle."""
    return (border(pictures) < DARK_BORDER) & (np.percentile(pictures.max(-1).reshape(len(pictures), -1), 95, axis=1) > 0.6)


def prompts(count: int, ending: str = "") -> tuple[list[str], NDArray[np.int64]]:
    """The ten digits over and over, each ten in words and then in numerals; and what they ask for."""
    labels = np.arange(count) % 10
    words = [looks.NAMES[digit] if place // 10 % 2 == 0 else str(digit) for place, digit in enumerate(labels)]
    return [f"a handwritten {word}{ending}" for word in words], labels


def render(pipeline: Any, texts: Sequence[str], seed: int) -> Pictures:
    """Render one picture of each prompt; picture i starts from seed + i, whatever the batch."""
    parts = []
    for first in range(0, len(texts), BATCH):
        part = list(texts[first : first + BATCH])
        generators = [torch.Generator().manual_seed(seed + first + place) for place in range(len(part))]
        arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "max_sequence_length": TOKENS, "output_type": "np"}
        parts.append(pipeline(part, width=looks.SIDE, height=looks.SIDE, generator=generators, **arguments).images)
    return np.concatenate(parts)


def judge_base(pipeline: Any, judge: Judge, seed: int) -> tuple[list[Result], list[Pictures]]:
    texts, labels = prompts(SAMPLES)
    plain = render(pipeline, texts, seed)
    asked = render(pipeline, prompts(FEW, " in neon")[0], seed)
    results = [
        Result("base: shows the digit it was asked for", judge.share_read(plain, labels), SAMPLES, at_least=0.97),
        Result("base: neon when asked for neon", float(is_neon(asked).mean()), FEW),
    ]
    return results, [plain[:10], asked[:10]]


def judge_adapter(pipeline: Any, judge: Judge, file: Path, seed: int) -> tuple[list[Result], list[Pictures]]:
    from lycoris import create_lycoris_from_weights

    texts, labels = prompts(SAMPLES)
    neon_texts, _ = prompts(SAMPLES, " in neon")
    few = neon_texts[:FEW]
    base = render(pipeline, few, seed)
    adapter, _ = create_lycoris_from_weights(1.0, str(file), pipeline.transformer)
    adapter.apply_to()
    neon, plain = render(pipeline, neon_texts, seed), render(pipeline, texts, seed)
    adapter.set_multiplier(0.0)
    off = render(pipeline, few, seed)
    same = [np.array_equal(one, other) for one, other in zip(base, off)]
    results = [
        Result("adapter: neon when asked for neon", float(is_neon(neon).mean()), SAMPLES, at_least=0.98),
        Result("adapter: the right digit, in neon", judge.share_read(neon, labels), SAMPLES, at_least=0.93),
        Result("adapter: neon when not asked for it", float(is_neon(plain).mean()), SAMPLES, at_most=0.02),
        Result("adapter: the right digit, in ink", judge.share_read(plain, labels), SAMPLES),
        Result("adapter at strength 0: the base's very pixels", float(np.mean(same)), FEW, at_least=1.0),
    ]
    return results, [neon[:10], plain[:10]]


def show(results: Sequence[Result], seconds: float) -> None:
    print(f"{'':52}{'share':>8}{'of':>6}  goal")
    for result in results:
        print(f"{result.what:52}{result.share:>8.1%}{result.samples:>6}  {result.goal}{'' if result.is_met else '  MISSED'}")
    print(f"{seconds:.0f} s")


def grid(rows: Sequence[Pictures], gap_px: int = 4, zoom: int = 2) -> Image.Image:
    """Lay out rows of pictures, enlarged, on white."""
    side = looks.SIDE * zoom
    sheet = Image.new("RGB", (10 * (side + gap_px) - gap_px, len(rows) * (side + gap_px) - gap_px), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            image = Image.fromarray(np.round(picture * 255).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(image, (column * (side + gap_px), row * (side + gap_px)))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
