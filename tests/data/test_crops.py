"""Random crops change from draw to draw, are a function of seed, sample and draw, and lie inside."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simpletuner.data.buckets import Group
from simpletuner.data.crops import drawn_crop, kept_crops
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import Loader
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.types import Crop, Geometry, Sample, Size
from tests.builders.images import MadeImages


def sample(crops: int, number: int = 0, spare: tuple[int, int] = (400, 9)) -> Sample:
    geometry = Geometry(Size(900, 500), Size(64 + spare[0], 64 + spare[1]), Crop(3, 1, 64, 64))
    return Sample("set", f"{number}.png", "", geometry, ("a",), crops=crops)


def test_one_crop_is_the_one_that_the_sample_was_found_with():
    assert [drawn_crop(sample(1), draw, 7) for draw in range(5)] == [sample(1)] * 5
    assert list(kept_crops([sample(1)], 7)) == [sample(1)]


def test_draws_show_each_kept_crop_once_before_any_is_shown_again():
    kept = {one.geometry.crop for one in kept_crops([sample(4)], 7)}

    drawn = [drawn_crop(sample(4), draw, 7).geometry.crop for draw in range(8)]

    assert len(kept) == 4
    assert set(drawn[:4]) == set(drawn[4:]) == kept


def test_samples_begin_with_different_crops():
    begins = Counter(drawn_crop(sample(4, number), 0, 7).geometry.crop == sample(4).geometry.crop for number in range(100))

    assert 10 < begins[True] < 45


def test_fresh_crops_are_new_at_each_draw_and_the_same_for_the_same_draw():
    drawn = [drawn_crop(sample(0), draw, 7).geometry.crop for draw in range(50)]

    assert len(set(drawn)) > 40
    assert drawn == [drawn_crop(sample(0), draw, 7).geometry.crop for draw in range(50)]
    assert drawn[1:] != [drawn_crop(sample(0), draw, 8).geometry.crop for draw in range(1, 50)]


def test_more_crops_keep_those_that_are_there():
    fewer, more = ([one.geometry for one in kept_crops([sample(count)], 7)] for count in (3, 6))

    assert more[:3] == fewer


@given(st.tuples(st.integers(0, 300), st.integers(0, 300)), st.integers(0, 1000), st.integers(0, 2**40))
def test_a_crop_lies_inside_the_resized_image_and_keeps_its_bucket(spare, draw, seed):
    for one in (drawn_crop(sample(crops, spare=spare), draw, seed) for crops in (0, 3)):
        crop, resized = one.geometry.crop, one.geometry.resized
        inside = 0 <= crop.left <= resized.width - crop.width and 0 <= crop.top <= resized.height - crop.height
        assert inside or crop == sample(0).geometry.crop  # crop 0 is the sample's own, which this builder puts anywhere
        assert one.geometry.bucket == Size(64, 64)


def test_batches_carry_the_crop_that_was_used_and_its_latents(tmp_path):
    def read(one: Sample) -> Tensor:
        return torch.full((3, 64, 64), float(one.geometry.crop.left))

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        return {"mean": pixels[:, :, ::8, ::8].clone(), "std": pixels[:, :, ::8, ::8].clone()}

    samples = [replace(sample(3, number), content=f"{number}") for number in range(4)]
    latents = LatentCache(Store(tmp_path / "vae"), encode, "vae", MadeImages(read), 2, warn=pytest.fail)
    latents.fill(list(kept_crops(samples, 7)))
    embeds = EmbedCache(Store(tmp_path / "text"), lambda prompts: {"prompt": torch.zeros(len(prompts), 1)}, "text", 4, warn=pytest.fail)
    embeds.fill(["a"])
    loader = Loader(Sampler([Group("set", samples)], 2, 7), latents, embeds, caption_dropout=0.0, seed=7)

    batches = list(loader.iterate(count=6))

    lefts = [(one.name, one.geometry.crop.left, left) for batch in batches for one, left in zip(batch.samples, batch.latents["mean"][:, 0, 0, 0])]
    assert all(said == left for _, said, left in lefts)
    assert Counter(name for name, _, _ in set(lefts)) == {one.name: 3 for one in samples}
