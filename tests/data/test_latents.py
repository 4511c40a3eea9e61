"""The VAE cache: made once, by content, resumable; whatever goes wrong is named and costs as little as it can."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.data.latents import LatentCache, UnusableImages
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError, MemoryLimitError
from simpletuner.types import Crop, Geometry, Sample, Size
from tests.builders.images import MadeImages
from tests.builders.shards import damage_entries
from tests.builders.syncs import replace_fsync

WIDE, TALL = Size(24, 16), Size(16, 24)


def sample(number: int, bucket: Size = WIDE, backend: str = "cats", left: int = 0) -> Sample:
    geometry = Geometry(Size(48, 48), Size(32, 32), Crop(left, 0, bucket.width, bucket.height))
    return Sample(backend, f"{number}.png", f"digest-{number}", geometry, ("a cat",))


def read_pixels(sample: Sample) -> Tensor:
    """Noise that is a function of the image's content; the crop moves it."""
    generator = torch.Generator().manual_seed(int(sample.content.removeprefix("digest-")))
    noise = torch.rand(3, sample.geometry.crop.height, sample.geometry.crop.width, generator=generator) * 2 - 1
    return noise.roll(sample.geometry.crop.left, -1)


class Vae:
    """A small encoder of real convolutions that counts what it is given."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, 1, 1)]
            self.layers = nn.Sequential(*layers)
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Mapping[str, Tensor]:
        self.batches.append(len(pixels))
        mean, std = self.layers(pixels).chunk(2, dim=1)
        return {"mean": mean, "std": std.exp()}

    @property
    def images(self) -> int:
        return sum(self.batches)


def cache(store: Store | Callable[[Sample], Store | None] | None, vae: Callable[[Tensor], Mapping[str, Tensor]], **others) -> LatentCache:
    images = MadeImages(others.pop("read_pixels", read_pixels))
    facts = {"fingerprint": "vae 1", "images": images, "batch_size": 4, "warn": pytest.fail, **others}
    return LatentCache(store, vae, **facts)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def damage(path: Path) -> None:
    assert damage_entries(path.parent) == 1


def test_what_is_read_is_what_the_vae_answers(tmp_path):
    vae, samples = Vae(), [*map(sample, range(5)), sample(5, TALL)]
    latents = cache(Store(tmp_path), vae)

    latents.fill(samples)

    for one in samples:
        wanted = vae(read_pixels(one)[None])
        assert latents.read(one).keys() == {"mean", "std"}
        for name, tensor in latents.read(one).items():
            assert tensor.dtype == torch.float32 and tensor.shape == (4, one.geometry.crop.height // 4, one.geometry.crop.width // 4)
            torch.testing.assert_close(tensor, wanted[name][0])


def test_a_full_cache_encodes_nothing(tmp_path):
    samples = [*map(sample, range(5))]
    cache(Store(tmp_path), Vae()).fill(samples)
    vae = Vae()
    again = cache(Store(tmp_path), vae)

    again.fill(samples)
    again.read_batch(samples)

    assert again.missing(samples) == [] and vae.batches == []


def test_three_new_images_are_three_to_encode(tmp_path):
    cache(Store(tmp_path), Vae()).fill([*map(sample, range(5))])
    vae = Vae()

    cache(Store(tmp_path), vae).fill([*map(sample, range(8))])

    assert vae.batches == [3]


@pytest.mark.parametrize(
    "edited",
    [
        replace(sample(2), content="digest-99"),
        sample(2, left=3),
        replace(sample(2), geometry=Geometry(Size(48, 48), Size(40, 40), sample(2).geometry.crop)),
    ],
    ids=["image", "crop", "size"],
)
def test_an_edited_image_or_another_geometry_is_the_only_one_missing(tmp_path, edited):
    latents = cache(Store(tmp_path), Vae())
    latents.fill([*map(sample, range(4))])

    assert latents.missing([sample(0), sample(1), edited, sample(3)]) == [edited]


def test_captions_and_names_are_not_part_of_the_key(tmp_path):
    latents = cache(Store(tmp_path), Vae())
    latents.fill([sample(0)])

    assert latents.missing([replace(sample(0), name="renamed.png", captions=("a dog",))]) == []


def test_the_same_image_twice_is_encoded_once(tmp_path):
    latents = cache(Store(tmp_path), Vae())

    assert latents.missing([sample(0), replace(sample(0), name="copy.png"), sample(1)]) == [sample(0), sample(1)]


def test_datasets_that_share_a_folder_share_its_entries(tmp_path):
    latents = cache(lambda one: Store(tmp_path), Vae())

    assert latents.missing([sample(0), sample(0, backend="dogs")]) == [sample(0)]


def test_another_vae_leaves_the_entries_of_this_one(tmp_path):
    latents = cache(Store(tmp_path), Vae())
    latents.fill([sample(0)])
    before = latents.read(sample(0))

    cache(Store(tmp_path), Vae(seed=1), fingerprint="vae 2").fill([sample(0)])

    assert same(latents.read(sample(0)), before)
    assert len(Store(tmp_path).keys()) == 2


def test_a_latent_does_not_depend_on_how_it_came_to_be_encoded(tmp_path):
    samples = [*map(sample, range(7))]
    filled = [cache(Store(tmp_path / str(size)), Vae(), batch_size=size) for size in (2, 3, 4, 7)]
    for latents in filled:
        latents.fill(samples)
    one_by_one = cache(Store(tmp_path / "ondemand"), Vae(), is_ondemand=True)
    never_kept = cache(None, Vae())

    results = [[latents.read(one) for one in samples] for latents in (*filled, one_by_one, never_kept)]
    results.append(never_kept.read_batch(samples))

    assert all(same(row, wanted) for rows in results for row, wanted in zip(rows, results[0]))


def test_with_a_batch_size_of_one_nothing_is_encoded_twice(tmp_path):
    vae = Vae()

    cache(Store(tmp_path), vae, batch_size=1).fill([*map(sample, range(3))])

    assert vae.batches == [1, 1, 1]


def test_on_demand_entries_are_made_at_the_first_reading_and_kept(tmp_path):
    vae, synced = Vae(), list[int]()
    latents = cache(Store(tmp_path), vae, is_ondemand=True)

    with pytest.MonkeyPatch.context() as patch:
        replace_fsync(patch, lambda descriptor: synced.append(descriptor))
        first = latents.read_batch([sample(0), sample(1), sample(2)])
    second = latents.read_batch([sample(0), sample(1), sample(2)])

    assert vae.batches == [3] and len(synced) <= 2  # the folder, and all entries of the batch together
    assert all(map(same, first, second))


def test_a_disabled_cache_misses_nothing_and_encodes_every_time():
    vae = Vae()
    latents = cache(None, vae)

    latents.fill([sample(0)])
    latents.read_batch([sample(0), sample(1)])
    latents.read_batch([sample(0), sample(1)])

    assert latents.missing([sample(0)]) == []
    assert vae.batches == [2, 2]


def test_each_dataset_may_have_a_folder_of_its_own_or_none(tmp_path):
    stores = {"cats": Store(tmp_path / "cats"), "dogs": Store(tmp_path / "dogs"), "birds": None}
    samples = [sample(0), sample(0, backend="dogs"), sample(0, backend="birds"), sample(1)]
    latents = cache(lambda one: stores[one.backend], Vae())

    missing = latents.missing(samples)
    latents.fill(samples)

    assert missing == [samples[0], samples[1], samples[3]]
    assert (len(stores["cats"].keys()), len(stores["dogs"].keys())) == (2, 1)
    assert same(latents.read(samples[0]), latents.read(samples[2]))


@pytest.mark.parametrize(("harm", "word"), [(damage, "damaged"), (Path.unlink, "gone")])
def test_an_entry_that_was_harmed_is_made_again_and_reported(tmp_path, harm, word):
    said: list[str] = []
    vae = Vae()
    latents = cache(Store(tmp_path), vae, warn=said.append)
    latents.fill([sample(0)])
    before = latents.read(sample(0))
    [path] = tmp_path.rglob("*.safetensors")
    harm(path)

    after = latents.read(sample(0))

    assert len(said) == 1 and word in said[0] and "cats/0.png" in said[0]
    assert same(after, before) and same(Store(tmp_path).get(latents.key(sample(0))), before)
    assert vae.batches == [2, 2]


def test_all_images_that_cannot_be_read_are_named_at_once_and_all_others_are_cached(tmp_path):
    def read(one: Sample) -> Tensor:
        if one.name == "1.png":
            raise DatasetError("the file ends in the middle", hint="...")
        if one.name == "6.png":
            raise FileNotFoundError(errno.ENOENT, "No such file", one.name)
        return read_pixels(one)

    latents = cache(Store(tmp_path), Vae(), read_pixels=read)
    samples = [*map(sample, range(8))]

    with pytest.raises(UnusableImages) as refused:
        latents.fill(samples)

    assert "2 of 8 images" in refused.value.message
    assert "cats/1.png: the file ends in the middle" in refused.value.message and "cats/6.png: " in refused.value.message
    assert refused.value.samples == (sample(1), sample(6)) and refused.value.exit_code == 3
    assert latents.missing(samples) == [sample(1), sample(6)]
    with pytest.raises(UnusableImages, match=r"cats/1\.png"):
        cache(None, Vae(), read_pixels=read).read_batch(samples[:2])


def test_a_latent_that_is_not_finite_is_named_and_not_kept(tmp_path):
    def overflowing(pixels: Tensor) -> Mapping[str, Tensor]:
        return {"mean": pixels / (pixels.amin((1, 2, 3), keepdim=True) != read_pixels(sample(1)).min()), "std": pixels}

    latents = cache(Store(tmp_path), overflowing)

    with pytest.raises(UnusableImages, match=r"cats/1\.png: .*not finite; vae_dtype"):
        latents.fill([*map(sample, range(3))])

    assert latents.missing([*map(sample, range(3))]) == [sample(1)]


def test_a_bug_in_a_reading_thread_is_not_swallowed(tmp_path):
    def read(one: Sample) -> Tensor:
        raise ZeroDivisionError(one.name)

    with pytest.raises(ZeroDivisionError):
        cache(Store(tmp_path), Vae(), read_pixels=read).fill([sample(0)])


def test_a_full_disk_stops_the_fill_and_keeps_what_was_made(tmp_path, monkeypatch):
    written: list[int] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(descriptor)
        real_fsync(descriptor)

    replace_fsync(monkeypatch, fsync)
    latents = cache(Store(tmp_path), Vae(), batch_size=2)

    with pytest.raises(MemoryLimitError, match=r"its \d+ finished entries are kept") as refused:
        latents.fill([*map(sample, range(20))])

    kept = 20 - len(latents.missing([*map(sample, range(20))]))
    assert 1 <= kept <= 4 and f"its {kept} finished" in refused.value.message  # a sync for the new file, then two of entries


def test_too_little_memory_halves_the_batch_says_so_and_changes_nothing(tmp_path):
    vae, said = Vae(), list[str]()

    def small(pixels: Tensor) -> Mapping[str, Tensor]:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return vae(pixels)

    samples = [*map(sample, range(9))]
    latents = cache(Store(tmp_path), small, batch_size=8, warn=said.append)

    latents.fill(samples)

    assert said[-1].endswith("going on with vae_batch_size 2")
    assert all(same(latents.read(one), row) for one, row in zip(samples, cache(None, Vae()).read_batch(samples)))


def test_memory_for_one_image_only_is_enough(tmp_path):
    vae, said = Vae(), list[str]()

    def tiny(pixels: Tensor) -> Mapping[str, Tensor]:
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return vae(pixels)

    cache(Store(tmp_path), tiny, warn=said.append).fill([sample(0)])

    assert vae.batches == [1] and said[-1].endswith("vae_batch_size 1")


def test_images_are_decoded_while_the_encoder_works_but_not_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    decoded: list[str] = []
    second_batch = threading.Event()
    vae = Vae()
    ahead: list[int] = []

    def read(one: Sample) -> Tensor:
        decoded.append(one.name)
        if len(decoded) > 2:
            second_batch.set()
        return read_pixels(one)

    def encode(pixels: Tensor) -> Mapping[str, Tensor]:
        assert second_batch.wait(10), "nothing was decoded while the first batch was in the encoder's hands"
        ahead.append(len(decoded) - vae.images)
        return vae(pixels)

    cache(Store(tmp_path), encode, read_pixels=read, batch_size=2).fill([*map(sample, range(40))])

    assert vae.images == 40
    assert max(ahead) <= 2 * 4  # the batch in hand, and what two workers keep filled behind it


FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_latents import Store, Vae, cache, sample

vae = Vae()

def encode(pixels):
    print("encoding", flush=True)
    return vae(pixels)

cache(Store(Path(sys.argv[1])), encode, batch_size=3).fill([*map(sample, range(300))])
"""


def test_a_fill_that_is_killed_goes_on_where_it_was_and_ends_with_the_same_latents(tmp_path):
    whole = cache(Store(tmp_path / "whole"), Vae(), batch_size=3)
    samples = [*map(sample, range(300))]
    whole.fill(samples)
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", FILL, str(folder), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        assert process.stdout.readline()
    process.kill()
    process.wait()
    vae = Vae()
    latents = cache(Store(folder), vae, batch_size=3)
    made_before = 300 - len(latents.missing(samples))

    latents.fill(samples)

    assert 3 <= made_before < 300
    assert 300 - made_before <= vae.images <= 300 - made_before + 1  # a lone last one is encoded as a pair
    assert all(same(latents.read(one), whole.read(one)) for one in samples)


def test_an_interruption_loses_no_finished_batch(tmp_path):
    vae = Vae()

    def interrupted(pixels: Tensor) -> Mapping[str, Tensor]:
        if len(vae.batches) == 3:
            raise KeyboardInterrupt
        return vae(pixels)

    latents = cache(Store(tmp_path), interrupted)

    with pytest.raises(KeyboardInterrupt):
        latents.fill([*map(sample, range(40))])

    assert len(latents.missing([*map(sample, range(40))])) == 40 - 3 * 4
