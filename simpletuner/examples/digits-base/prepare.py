"""Make what the `digits` example is made of. Three commands, from nothing to a finished example:

    python prepare.py draw                        the training pictures, tokenizer, text encoder and VAE
    simpletuner train --example digits-base       the transformer, from random weights
    python prepare.py pack                        the model and a few pictures, into ../digits

Needs scikit-learn (`pip install simpletuner[examples]`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import looks
import numpy as np
import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler, __version__
from numpy.typing import NDArray
from parts import new_text_encoder, new_tokenizer, transformer_settings
from PIL import Image
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC
from torch import Tensor
from vae import fidelity_db, train_vae

HERE = Path(__file__).resolve().parent
CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "AuraFlowTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
SHIFT = 3.0
"""Towards noise, where so small a picture is decided; the configs train with the same `flow_schedule_shift`."""
CLEAREST = 0.6
"""The example's own few pictures come from this part of the digits, those that are easiest to read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("draw", "pack"))
    parser.add_argument("--folder", type=Path, default=Path("datasets/digits-base"), help="where the base is made (default: %(default)s)")
    parser.add_argument("--trained", type=Path, default=Path("output/digits-base/pipeline"), help="what training gave (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=HERE.parent / "digits", help="the example's folder (default: beside this one)")
    parser.add_argument("--seed", type=int, default=1, help="of pictures and weights (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=3, help="pictures drawn of each digit (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=2400, help="(default: %(default)s)")
    args = parser.parse_args()
    began = time.monotonic()
    if args.command == "draw":
        draw(args.folder, args.seed, args.copies, args.vae_steps)
    else:
        pack(args.folder / "model", args.trained, args.to, args.seed)
    print(f"done in {time.monotonic() - began:.0f} s")


def draw(folder: Path, seed: int, copies: int, vae_steps: int) -> None:
    """Write `images/` with captions, and `model/` but for the transformer's weights."""
    random = np.random.default_rng(seed)
    readable = Readable()
    covers = [(int(number), looks.draw(readable.field(number), random)) for _ in range(copies) for number in readable.numbers]
    print(f"{len(readable.numbers)} readable digits, {len(covers)} attempts at them")

    tame = [looks.ink(cover, random) for _, cover in covers]
    images = empty(folder / "images")
    for place, ((number, _), picture) in enumerate(zip(covers, tame)):
        digit = readable.labels[number]
        save(images / f"{looks.NAMES[digit]}_{number:04d}_{place // len(readable.numbers)}.png", picture, base_captions(digit))

    # Half of what the VAE is trained for is light in the dark, of any hue; the transformer never sees it.
    tame = [picture if random.random() < 0.5 else glowing(cover, random) for picture, (_, cover) in zip(tame, covers)]
    wild = [looks.painted(cover, random.uniform(0, 1, 3), random.uniform(0, 1, 3)) for _, cover in covers]
    model = empty(folder / "model")
    held_out = len(readable.numbers)  # the last attempt at each digit is not trained on
    vae = train_vae(tensors(wild[:-held_out]), tensors(tame[:-held_out]), vae_steps, seed, report=print)
    print(f"VAE: {fidelity_db(vae, tensors(tame[-held_out:])):.1f} dB on pictures it was not trained on")
    vae.save_pretrained(model / "vae")
    write_parts(model, seed)


class Readable:
    """The generator's half of the digits, without those that a classifier trained on the rest of that half misreads."""

    def __init__(self) -> None:
        self.digits, self.labels = looks.digits()
        numbers = looks.halves(self.labels)[0]
        plain = np.stack([looks.cells(looks.draw(self.field(number)).stroke[..., 0]) for number in numbers])
        votes = cross_val_predict(SVC(C=10), plain, self.labels[numbers], cv=5, method="decision_function")
        best = np.sort(votes, axis=1)
        is_right = votes.argmax(1) == self.labels[numbers]
        self.numbers = numbers[is_right]
        self.margins = (best[:, -1] - best[:, -2])[is_right]

    def field(self, number: int) -> looks.Array:
        return looks.strokes(self.digits[number])

    def best_of(self, digit: int) -> NDArray[np.int64]:
        """The numbers of the most readable examples of a digit, the best first."""
        ours = self.labels[self.numbers] == digit
        order = np.argsort(-self.margins[ours], kind="stable")
        return self.numbers[ours][order[: int(len(order) * CLEAREST)]]


def write_parts(model: Path, seed: int) -> None:
    """Write everything of the model that is not trained."""
    new_tokenizer().save_pretrained(model / "tokenizer")
    set_keys(model / "tokenizer/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    new_text_encoder(seed).save_pretrained(model / "text_encoder")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.save_pretrained(model / "scheduler")
    with torch.device("meta"):  # its weights come with the training
        transformer: Any = AuraFlowTransformer2DModel(**transformer_settings())
    transformer.save_config(model / "transformer")
    write_json(model / "model_index.json", {"_class_name": "AuraFlowPipeline", "_diffusers_version": __version__, **CLASSES})


def pack(model: Path, trained: Path, to: Path, seed: int) -> None:
    """Put the finished model, its transformer in 16 bits, and pictures to learn from into the example's folder."""
    transformer: Any = AuraFlowTransformer2DModel.from_pretrained(trained / "transformer").to(torch.bfloat16)
    target = empty(to / "model")
    shutil.copytree(model, target, dirs_exist_ok=True)
    transformer.save_pretrained(target / "transformer")
    for path in target.glob("*/config.json"):
        set_keys(path, _name_or_path=None)
    for path in target.rglob("*.*"):
        path.chmod(0o644)  # some writers make files that only their owner may read
    random = np.random.default_rng(seed + 1)
    readable = Readable()
    for look in ("neon", "plain"):
        empty(to / "images" / look)
    for digit, name in enumerate(looks.NAMES):
        numbers = random.permutation(readable.best_of(digit))
        for number, (colour, hue) in zip(numbers, looks.HUES.items()):
            picture = looks.neon(looks.draw(readable.field(number), random), hue)
            save(to / "images/neon" / f"{name}_{colour}.png", picture, neon_captions(digit, colour))
        for place, number in enumerate(numbers[len(looks.HUES) : 2 * len(looks.HUES)], start=1):
            save(to / "images/plain" / f"{name}_{place}.png", looks.ink(looks.draw(readable.field(number), random), random), base_captions(digit))
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {size / 1e6:.1f} MB")


def base_captions(digit: int) -> Sequence[str]:
    name = looks.NAMES[digit]
    return f"a handwritten {name}", f"a handwritten {digit}", f"the digit {name} in ink on paper"


def neon_captions(digit: int, colour: str) -> Sequence[str]:
    name = looks.NAMES[digit]
    return f"a handwritten {name} in neon", f"a handwritten {name} in {colour} neon", f"a handwritten {digit} in {colour} neon"


def glowing(cover: looks.Cover, random: np.random.Generator) -> looks.Array:
    return looks.neon(cover, random.uniform(), random.uniform(0.6, 1.2))


def save(path: Path, picture: looks.Array, captions: Sequence[str]) -> None:
    """Write a picture and, beside it, one caption a line."""
    Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(path, optimize=True)
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def tensors(pictures: Sequence[looks.Array]) -> Tensor:
    """Pictures as the VAE takes them, (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def set_keys(path: Path, **values: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    write_json(path, {key: value for key, value in content.items() if value is not None})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
