"""The text cache: one entry a prompt and encoder, made once, and again only when it was harmed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.data.embeds import EmbedCache
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError
from tests.builders.shards import damage_entries

PROMPTS = ["a cat", "a dog", "", "ein Käfer", "a bird\nin two lines"]


class Encoder:
    """Bytes through an embedding table, 16 tokens long; remembers what it was asked."""

    def __init__(self) -> None:
        self.table = torch.randn(257, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        self.asked += prompts
        tokens = torch.full((len(prompts), 16), 256)
        for row, prompt in zip(tokens, prompts):
            spelled = torch.tensor(list(prompt.encode())[:16], dtype=torch.int64)
            row[: len(spelled)] = spelled
        return {"prompt": self.table[tokens], "mask": tokens < 256}


def cache(folder: Path, encoder: Encoder, **others) -> EmbedCache:
    facts = {"fingerprint": "t5", "batch_size": 2, "warn": pytest.fail, **others}
    return EmbedCache(Store(folder), encoder, **facts)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_read_is_what_the_encoders_answer_without_a_batch_axis(tmp_path):
    cache(tmp_path, Encoder()).fill(PROMPTS)
    encoder = Encoder()
    embeds = cache(tmp_path, encoder)

    rows = [embeds.read(prompt) for prompt in PROMPTS]

    assert encoder.asked == []
    for prompt, row in zip(PROMPTS, rows):
        assert row["prompt"].shape == (16, 8) and row["prompt"].dtype == torch.bfloat16
        assert same(row, {name: tensor[0] for name, tensor in encoder([prompt]).items()})


def test_a_prompt_is_kept_in_every_cache_that_it_belongs_to_and_read_from_any(tmp_path):
    stores = {name: Store(tmp_path / name) for name in ("cats", "dogs")}
    belong = {"a cat": ("cats",), "a dog": ("dogs",), "a pet": ("cats", "dogs")}
    encoder = Encoder()
    embeds = EmbedCache(lambda prompt: [stores[name] for name in belong[prompt]], encoder, "t5", 2, warn=pytest.fail)

    embeds.fill(belong)

    assert sorted(encoder.asked) == sorted(belong) and embeds.missing(belong) == []
    assert {name: len(store.keys()) for name, store in stores.items()} == {"cats": 2, "dogs": 2}
    stores["cats"].remove(embeds.key("a pet"))
    assert embeds.missing(belong) == ["a pet"] and same(embeds.read("a pet"), embeds.read("a pet"))
    assert len(encoder.asked) == 3


def test_each_prompt_is_encoded_once_however_often_it_is_asked_for(tmp_path):
    encoder = Encoder()

    cache(tmp_path, encoder).fill(["a cat", "a dog", "a cat", "a cat"])

    assert encoder.asked == ["a cat", "a dog"]


def test_editing_one_caption_encodes_exactly_that(tmp_path):
    encoder = Encoder()
    cache(tmp_path, Encoder()).fill(PROMPTS)

    cache(tmp_path, encoder).fill([*PROMPTS[:2], " ", *PROMPTS[3:]])

    assert encoder.asked == [" "]


def test_other_encoders_have_entries_of_their_own(tmp_path):
    cache(tmp_path, Encoder()).fill(PROMPTS)
    other = cache(tmp_path, Encoder(), fingerprint="t5, 512 tokens")

    assert other.missing(PROMPTS) == PROMPTS
    other.fill(PROMPTS)
    assert cache(tmp_path, Encoder()).missing(PROMPTS) == []


def damage(path: Path) -> None:
    assert damage_entries(path.parent) == 1


@pytest.mark.parametrize(("harm", "word"), [(damage, "damaged"), (Path.unlink, "gone")])
def test_an_entry_that_was_harmed_is_made_again_and_reported(tmp_path, harm, word):
    cache(tmp_path, Encoder()).fill(["a cat"])
    [path] = tmp_path.rglob("*.safetensors")
    harm(path)
    said: list[str] = []

    row = cache(tmp_path, Encoder(), warn=said.append).read("a cat")

    assert len(said) == 1 and word in said[0] and "'a cat'" in said[0]
    assert same(row, cache(tmp_path, Encoder()).read("a cat"))


def test_rows_used_last_are_held_in_memory_up_to_a_number_of_bytes(tmp_path):
    one_row = 16 * 8 * 2 + 16
    embeds = cache(tmp_path, Encoder(), held_bytes=2 * one_row, warn=lambda text: None)
    embeds.fill(["a", "b", "c"])
    first = {prompt: embeds.read(prompt) for prompt in ("a", "b")}
    embeds.read("a")

    embeds.read("c")

    assert embeds.read("a") is first["a"]
    assert embeds.read("b") is not first["b"]


def test_nothing_is_held_where_a_row_is_larger_than_the_limit(tmp_path):
    embeds = cache(tmp_path, Encoder(), held_bytes=10)
    embeds.fill(["a"])

    assert embeds.read("a") is not embeds.read("a")
    assert same(embeds.read("a"), embeds.read("a"))


def test_answers_that_are_not_finite_are_named_at_once_and_all_others_are_cached(tmp_path):
    class Overflowing(Encoder):
        def __call__(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
            encoded = super().__call__(prompts)
            factors = torch.tensor([float("inf") if "!" in prompt else 1.0 for prompt in prompts])
            return {**encoded, "prompt": encoded["prompt"] * factors[:, None, None]}

    embeds = cache(tmp_path, Overflowing())

    with pytest.raises(DatasetError) as refused:
        embeds.fill(["a", "b!", "c", "d!", "e"])

    assert "2 captions" in refused.value.message and "'b!'" in refused.value.message and "'d!'" in refused.value.message
    assert embeds.missing(["a", "b!", "c", "d!", "e"]) == ["b!", "d!"]


def test_too_little_memory_halves_the_batch(tmp_path):
    said: list[str] = []

    class Small(Encoder):
        def __call__(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
            if len(prompts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(prompts)

    embeds = cache(tmp_path, Small(), warn=said.append)

    embeds.fill(PROMPTS)

    assert embeds.missing(PROMPTS) == []
    assert said == ["memory ran out with 2 captions encoded at once; going on with text_encoder_batch_size 1"]


FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_embeds import Encoder, cache

class Talking(Encoder):
    def __call__(self, prompts):
        print("encoding", flush=True)
        return super().__call__(prompts)

cache(Path(sys.argv[1]), Talking()).fill([f"picture {number}" for number in range(400)])
"""


def test_a_fill_that_is_killed_goes_on_where_it_was(tmp_path):
    prompts = [f"picture {number}" for number in range(400)]
    process = subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        assert process.stdout.readline()
    process.kill()
    process.wait()
    encoder = Encoder()
    embeds = cache(tmp_path, encoder)
    left = embeds.missing(prompts)

    embeds.fill(prompts)

    assert 0 < len(left) <= 400 - 2 * 17  # at most the batch in hand and the one behind it were lost
    assert encoder.asked == left
    assert all(same(embeds.read(prompt), {name: tensor[0] for name, tensor in encoder([prompt]).items()}) for prompt in prompts)
