"""Batches from any position, the same however they are read ahead."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from simpletuner.data.buckets import Group
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.filters import parse
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import READERS, Loader, prompt_of, prompts_of
from simpletuner.data.sampler import Sampler
from simpletuner.data.store import Store
from simpletuner.data.variation import Variation, expand
from simpletuner.types import Batch, Crop, Geometry, Sample, Size
from tests.builders.images import MadeImages


def sample(number: int, **facts) -> Sample:
    geometry = Geometry(Size(32, 32), Size(32, 32), Crop(0, 0, 16, 16) if number % 2 else Crop(0, 0, 24, 16))
    return replace(Sample("cats", f"{number}.png", f"{number:x}", geometry, (f"cat {number}", f"a cat, the {number}th")), **facts)


def read_pixels(one: Sample) -> Tensor:
    return torch.full((3, one.geometry.crop.height, one.geometry.crop.width), float(int(one.content, 16)))


def encode_pixels(pixels: Tensor) -> Mapping[str, Tensor]:
    small = pixels[:, :, ::8, ::8]
    return {"mean": small, "std": small + 0.5}


def encode_text(prompts: Sequence[str]) -> Mapping[str, Tensor]:
    return {"prompt": torch.tensor([[float(len(prompt)), float(sum(prompt.encode()))] for prompt in prompts])}


@pytest.fixture
def caches(tmp_path):
    latents = LatentCache(Store(tmp_path / "vae"), encode_pixels, "vae", MadeImages(read_pixels), 4, warn=pytest.fail)
    embeds = EmbedCache(Store(tmp_path / "text"), encode_text, "text", 4, warn=pytest.fail)
    latents.fill(SAMPLES)
    embeds.fill(prompts_of([expand(SAMPLES, None), expand(SAMPLES, SHUFFLED)], 0.1))
    return latents, embeds


SAMPLES = [sample(number) for number in range(11)]
SHUFFLED = Variation(count=3, shuffles=True, includes_original=False)
CHANGED = {
    "count": 4,
    "seed": 1,
    "shuffles": False,
    "separator": "space",
    "kept_tags": 1,
    "includes_original": True,
    "tag_dropout": 0.1,
    "has_wildcards": True,
    "heads": ("sks",),
}
"""Each setting of a rule but filters, other than in SHUFFLED."""


def loader(caches, samples=SAMPLES, repeats=0, **facts) -> Loader:
    sampler = Sampler([Group("cats", samples, repeats=repeats)], batch_size=2, seed=5)
    return Loader(sampler, *caches, **{"caption_dropout": 0.2, "seed": 5, **facts})


def same(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    def equal(one: Batch, other: Batch) -> bool:
        tensors = [(one.latents[name], other.latents[name]) for name in one.latents] + [(one.text[name], other.text[name]) for name in one.text]
        return (one.samples, one.prompts) == (other.samples, other.prompts) and all(torch.equal(*pair) for pair in tensors)

    return len(left) == len(right) and all(map(equal, left, right))


def readers() -> int:
    return sum(thread.name.startswith("batch-reader") for thread in threading.enumerate())


def test_a_batch_holds_what_the_caches_hold_of_its_samples_and_prompts(caches):
    latents, embeds = caches

    for batch in loader(caches).iterate(count=12):
        assert {*batch.latents} == {"mean", "std"} and batch.latents["mean"].shape[0] == batch.text["prompt"].shape[0] == len(batch.samples)
        for index, (one, prompt) in enumerate(zip(batch.samples, batch.prompts)):
            assert prompt in (*one.captions, "")
            assert torch.equal(batch.text["prompt"][index], embeds.read(prompt)["prompt"])
            assert all(torch.equal(batch.latents[name][index], tensor) for name, tensor in latents.read(one).items())


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_reading_ahead_gives_the_same_batches(caches, prefetch):
    at_once = list(loader(caches, prefetch=0).iterate(position=3, stride=2, count=20))

    ahead = list(loader(caches, prefetch=prefetch).iterate(position=3, stride=2, count=20))

    assert len(ahead) == 20 and same(ahead, at_once)


def test_a_stream_taken_up_in_the_middle_is_the_tail_of_the_whole(caches):
    whole = list(loader(caches).iterate(count=15))

    assert same(list(loader(caches).iterate(position=9, count=6)), whole[9:])


def test_two_processes_together_read_what_one_reads(caches):
    whole = list(loader(caches).iterate(count=12))

    ranks = [loader(caches).iterate(position=rank, stride=2, count=6) for rank in range(2)]

    assert same([batch for step in zip(*ranks) for batch in step], whole)


def test_without_a_count_the_stream_goes_on_over_epochs(caches):
    batches = list(itertools.islice(loader(caches).iterate(), 3 * loader(caches).batches_per_epoch()))

    assert Counter(one.name for batch in batches for one in batch.samples) == {one.name: 3 for one in SAMPLES}


def test_every_draw_chooses_its_caption_and_its_dropout_anew(caches):
    drawn = Counter(
        (one.name, prompt) for batch in loader(caches, repeats=99).iterate(count=550) for one, prompt in zip(batch.samples, batch.prompts)
    )

    for one in SAMPLES:
        counts = [drawn[one.name, prompt] for prompt in (*one.captions, "")]
        assert sum(counts) == 100
        assert all(abs(count - wanted) < 4.5 * (wanted * (1 - wanted / 100)) ** 0.5 for count, wanted in zip(counts, (40, 40, 20)))


def test_prompts_are_a_function_of_seed_sample_and_draw():
    choices = [[prompt_of(one, draw, 0.5, seed) for draw in range(50)] for one in SAMPLES[:2] for seed in (1, 2)]

    assert choices == [[prompt_of(one, draw, 0.5, seed) for draw in range(50)] for one in SAMPLES[:2] for seed in (1, 2)]
    assert len({tuple("" if not prompt else "kept" for prompt in chosen) for chosen in choices}) == 4


@pytest.mark.parametrize(("dropout", "prompts"), [(0.0, {"cat 1", "a cat, the 1th"}), (1.0, {""})])
def test_dropout_of_zero_and_of_one_mean_never_and_always(dropout, prompts):
    assert {prompt_of(sample(1), draw, dropout, seed=0) for draw in range(200)} == prompts


def test_prompts_of_lists_all_that_can_ever_be_asked_for_once():
    samples = [sample(1), sample(2), replace(sample(3), captions=("cat 1",))]

    expansions = [expand(samples[:2], None), expand(samples[2:], None)]

    assert list(prompts_of(expansions, 0.0)) == ["cat 1", "a cat, the 1th", "cat 2", "a cat, the 2th"]
    assert list(prompts_of(expansions, 0.1)) == ["cat 1", "a cat, the 1th", "cat 2", "a cat, the 2th", ""]
    assert list(prompts_of([expand([replace(sample(1), captions=("",))], None)], 0.1)) == [""]


def test_captions_are_shown_in_the_versions_of_their_dataset(caches):
    versioned = {"repeats": 99, "variations": {"cats": SHUFFLED}, "caption_dropout": 0.0}

    batches = list(loader(caches, **versioned).iterate(count=550))

    shown = {prompt for batch in batches for prompt in batch.prompts}
    assert shown == prompts_of([expand(SAMPLES, SHUFFLED)], 0.0).keys() and any(prompt.startswith("the ") for prompt in shown)
    assert same(list(loader(caches, **versioned).iterate(7, count=13)), batches[7:20])


def test_versions_of_one_dataset_leave_others_alone(caches):
    assert same(list(loader(caches, variations={"dogs": SHUFFLED}).iterate(count=20)), list(loader(caches).iterate(count=20)))


def test_regularisation_batches_say_so(caches):
    kept = [replace(one, is_regularisation=True) for one in SAMPLES]

    assert all(batch.is_regularisation for batch in loader(caches, kept).iterate(count=4))
    assert not any(batch.is_regularisation for batch in loader(caches).iterate(count=4))


class Breaking:
    """Latents of which one sample cannot be read."""

    def __init__(self, latents: LatentCache, broken: Sample) -> None:
        self.latents, self.broken = latents, broken
        self.reads: list[Sequence[Sample]] = []

    @property
    def batches_read(self) -> int:
        return len(self.reads)

    def read_batch(self, samples: Sequence[Sample]) -> Sequence[Mapping[str, Tensor]]:
        self.reads.append(samples)  # in one go, whichever thread it is
        if self.broken in samples:
            raise OSError(5, "Input/output error")
        return self.latents.read_batch(samples)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_is_raised_at_the_batch_it_belongs_to(caches, prefetch):
    broken = loader(caches)._sampler.at(3).samples[0]
    batches = loader((Breaking(caches[0], broken), caches[1]), prefetch=prefetch).iterate(count=6)

    good = [next(batches) for _ in range(3)]

    with pytest.raises(OSError, match="Input/output"):
        next(batches)
    assert same(good, list(loader(caches).iterate(count=3)))
    assert readers() == 0


def test_closing_waits_for_what_is_being_read_and_for_nothing_else(caches):
    gate = threading.Event()

    class Slow(Breaking):
        def read_batch(self, samples: Sequence[Sample]) -> Sequence[Mapping[str, Tensor]]:
            if samples != first.samples:
                gate.wait(10)
            return super().read_batch(samples)

    first = loader(caches).batch_at(0)
    slow = Slow(caches[0], sample(99))
    batches = loader((slow, caches[1]), prefetch=40).iterate()
    next(batches)

    threading.Timer(0.5, gate.set).start()
    batches.close()

    assert readers() == 0
    assert slow.batches_read <= 1 + READERS


def test_no_more_is_read_ahead_than_was_asked_for(caches):
    counting = Breaking(caches[0], sample(99))
    batches = loader((counting, caches[1]), prefetch=3).iterate()
    next(batches)
    deadline = time.monotonic() + 10
    while counting.batches_read < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)

    assert counting.batches_read == 4
    batches.close()


def test_batches_are_ready_before_they_are_asked_for(caches):
    read = threading.Event()

    class Telling(Breaking):
        def read_batch(self, samples):
            rows = super().read_batch(samples)
            if self.batches_read >= 2:
                read.set()
            return rows

    batches = loader((Telling(caches[0], sample(99)), caches[1]), prefetch=2).iterate()
    next(batches)

    assert read.wait(10)
    batches.close()


def test_the_digest_tells_apart_whatever_changes_the_batches(caches):
    plain = loader(caches).digest()

    others = [loader(caches, SAMPLES[1:]), loader(caches, repeats=1), loader(caches, caption_dropout=0.1), loader(caches, seed=6)]

    assert loader(caches, [*reversed(SAMPLES)], prefetch=0).digest() == plain
    assert len({plain, *(other.digest() for other in others)}) == 5


def test_the_digest_tells_apart_all_that_makes_versions(caches):
    long = "x" * 300
    rules = [
        SHUFFLED,
        *(replace(SHUFFLED, **{key: value}) for key, value in CHANGED.items()),
        replace(SHUFFLED, filters=(parse(f"s/{long}a/b/"),)),
        replace(SHUFFLED, filters=(parse(f"s/{long}b/b/"),)),
        replace(SHUFFLED, filters=(parse(f"s/{long}b/c/"),)),
    ]

    digests = [loader(caches, variations={"cats": rule}).digest() for rule in rules]

    assert len({loader(caches).digest(), *digests}) == len(rules) + 1
    assert loader(caches, variations={"held out": SHUFFLED}).digest() == loader(caches).digest()  # no batch shows any of them
    assert {field.name for field in fields(Variation)} == {*CHANGED, "filters"}
    assert digests[0] == loader(caches, variations={"cats": replace(SHUFFLED)}).digest()
