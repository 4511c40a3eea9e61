"""Fetch or draw the digits of the `lesson35-mnist` example and its text encoders: everything that is not trained.

    python fetch.py                       # MNIST and google/t5-v1_1-base from the hub, scikit-learn's digits where there is no hub
    python fetch.py --digits sklearn --t5 none

Writes digits.tar and held-out.tar (grey pictures of 32x32, two captions each), t5/ (for config.json) and small-t5/ (for small.json).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE_PX = 32
MNIST = "ylecun/mnist"
T5 = "google/t5-v1_1-base"
"""The lesson's text encoder."""
SMALL_WIDTH, SMALL_SEED = 64, 0
"""Of the text encoder with random weights; joint_attention_dim in small/config.json is its width."""
Digit = tuple[Image.Image, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("datasets/lesson35-mnist"), help="where to write (default: %(default)s)")
    parser.add_argument("--digits", choices=("auto", "mnist", "sklearn"), default="auto", help="auto: MNIST if it can be had (default)")
    parser.add_argument("--t5", default=T5, help="hub id or folder of the T5 that config.json reads, or none (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not reaches_hub():
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's libraries then look into their cache and do not wait; they are imported after this
    for name, digits in find_digits(args.digits).items():
        count = write_tar(args.folder / f"{name}.tar", digits)
        print(f"{args.folder / name}.tar: {count} digits")
    write_small_t5(args.folder / "small-t5")
    print(f"{args.folder / 'small-t5'}: random weights, {SMALL_WIDTH} wide")
    if args.t5 != "none":
        fetch_t5(args.t5, args.folder / "t5")


def reaches_hub() -> bool:
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10).close()
    except urllib.error.HTTPError:
        return True  # it answers
    except OSError:
        return False
    return True


def find_digits(wanted: str) -> dict[str, Iterator[Digit]]:
    """Digits to train on and digits that are held out, from the hub or, if that cannot be and need not, from scikit-learn."""
    if wanted != "sklearn":
        try:
            return mnist()
        except (ImportError, OSError) as error:  # failures of the hub's client are OSErrors
            if wanted == "mnist":
                raise SystemExit(f"MNIST cannot be had: {error}. `pip install simpletuner[datasets]` and a network are needed.") from error
            print(f"MNIST cannot be had ({type(error).__name__}); taking the 1797 digits of scikit-learn")
    return scikit_learn()


def mnist() -> dict[str, Iterator[Digit]]:
    """MNIST from the hub, made 32 pixels a side as the lesson does."""
    from datasets import load_dataset

    found: Any = load_dataset(MNIST)

    def of(split: str) -> Iterator[Digit]:
        return ((row["image"].convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR), row["label"]) for row in found[split])

    return {"digits": of("train"), "held-out": of("test")}


def scikit_learn() -> dict[str, Iterator[Digit]]:
    """The 1797 digits of 8x8 pixels that ship inside scikit-learn, enlarged, with a margin; a third is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    drawn, held_out = train_test_split(np.arange(len(data.target)), test_size=1 / 3, random_state=0, stratify=data.target)

    def of(numbers: Any) -> Iterator[Digit]:
        return ((enlarged(data.images[number]), int(data.target[number])) for number in numbers)

    return {"digits": of(drawn), "held-out": of(held_out)}


def enlarged(cells: Any) -> Image.Image:
    """A digit of 8x8 cells from 0 to 16, white on black, 24 pixels a side in the middle of 32."""
    small = Image.fromarray(np.round(cells * 255 / 16).astype(np.uint8))
    picture = Image.new("L", (SIDE_PX, SIDE_PX))
    picture.paste(small.resize((24, 24), Image.Resampling.BICUBIC), (4, 4))
    return picture


def captions(label: int) -> tuple[str, str]:
    """What a digit is called; at each draw one of both is chosen."""
    return NAMES[label], str(label)


def write_tar(path: Path, digits: Iterator[Digit]) -> int:
    """Write pictures and their captions, one a line, and give how many there are."""
    staged, number = path.with_suffix(".tmp"), 0
    with tarfile.open(staged, "w") as shard:
        for number, (picture, label) in enumerate(digits, start=1):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            add(shard, f"{number:05d}.png", buffer.getvalue())
            add(shard, f"{number:05d}.txt", "\n".join(captions(label)).encode())
    staged.replace(path)
    return number


def add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    shard.addfile(entry, io.BytesIO(data))


def read_tar(path: Path) -> tuple[Any, Any]:
    """What `write_tar` wrote: pictures (N, 32, 32) in [0, 1] and labels (N,)."""
    pictures, labels = [], []
    with tarfile.open(path) as shard:
        for entry in shard:
            data = shard.extractfile(entry).read()  # type: ignore[union-attr]
            if entry.name.endswith(".png"):
                pictures.append(np.asarray(Image.open(io.BytesIO(data))) / 255)
            else:
                labels.append(int(data.decode().splitlines()[1]))
    return np.stack(pictures), np.array(labels)


def write_small_t5(folder: Path) -> None:
    """Write a T5 of random weights that tells the twenty words of the captions apart, with its tokenizer."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ("<pad>", "</s>", "<unk>", *NAMES, *map(str, range(10)))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # some releases of transformers write a class here that others do not know
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    torch.manual_seed(SMALL_SEED)
    config = T5Config(
        vocab_size=len(words),
        d_model=SMALL_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5EncoderModel(config).save_pretrained(folder)


def fetch_t5(source: str, folder: Path) -> None:
    """Write the encoder of a T5 in safetensors; the lesson's own is on the hub with its decoder and as a pickle alone."""
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        encoder: Any = T5EncoderModel.from_pretrained(source)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        print(f"{source} cannot be had ({first}): small.json can be trained, config.json needs it")
        return
    encoder.save_pretrained(folder)
    print(f"{folder}: {source}, {encoder.config.d_model} wide")


if __name__ == "__main__":
    main()
