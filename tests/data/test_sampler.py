"""The order of batches: complete, unmixed, and a function of the seed and the samples alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.buckets import Group
from simpletuner.data.sampler import BatchPlan, Sampler
from simpletuner.errors import DatasetError
from simpletuner.types import Crop, Geometry, Sample, Size

unhurried = settings(deadline=None, max_examples=60)
"""How long an example takes says more about the machine than about the sampler."""
ALWAYS = st.just(1.0)
BUCKETS = [Size(32, 32), Size(48, 24), Size(24, 48)]


def sample(backend: str, number: int, bucket: Size = BUCKETS[0]) -> Sample:
    geometry = Geometry(Size(64, 64), Size(64, 64), Crop(0, 0, bucket.width, bucket.height))
    return Sample(backend, f"{number:03d}.png", f"{backend}{number}", geometry, ("a picture",))


def group(name: str, count: int, **facts) -> Group:
    return Group(name, [sample(name, number) for number in range(count)], **facts)


@st.composite
def groups(draw: st.DrawFn, probabilities: st.SearchStrategy[float] = ALWAYS) -> list[Group]:
    made = []
    for name in draw(st.lists(st.sampled_from(["cats", "dogs", "birds"]), min_size=1, max_size=3, unique=True)):
        buckets = draw(st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=12))
        samples = [sample(name, number, bucket) for number, bucket in enumerate(buckets)]
        size = draw(st.one_of(st.none(), st.integers(1, 5)))
        made.append(Group(name, samples, repeats=draw(st.integers(0, 3)), probability=draw(probabilities), batch_size=size))
    return made


def samplers(probabilities: st.SearchStrategy[float] = ALWAYS) -> st.SearchStrategy[Sampler]:
    return st.builds(Sampler, groups(probabilities), st.integers(1, 5), st.integers(0, 2**32))


def stream(sampler: Sampler, epochs: int) -> list[BatchPlan]:
    return [batch for epoch in range(epochs) for batch in sampler.epoch_batches(epoch)]


@unhurried
@given(groups(), st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 3))
def test_an_epoch_draws_every_sample_once_and_once_more_for_each_repeat(datasets, batch_size, seed, epoch):
    batches = Sampler(datasets, batch_size, seed).epoch_batches(epoch)

    drawn = Counter(one for batch in batches for one in batch.samples)
    assert drawn == {one: dataset.repeats + 1 for dataset in datasets for one in dataset.samples}


@unhurried
@given(groups(), st.integers(1, 5), st.integers(0, 2**32))
def test_a_batch_is_of_one_dataset_and_one_bucket_and_only_the_last_of_a_bucket_is_not_full(datasets, batch_size, seed):
    batches = Sampler(datasets, batch_size, seed).epoch_batches(0)

    short = Counter()
    for batch in batches:
        size = next(dataset.batch_size for dataset in datasets if dataset.name == batch.group) or batch_size
        assert {one.backend for one in batch.samples} == {batch.group}
        assert {one.geometry.bucket for one in batch.samples} == {batch.bucket}
        assert 1 <= len(batch.samples) <= size
        short[batch.group, batch.bucket] += len(batch.samples) < size
    assert all(count <= 1 for count in short.values())


@unhurried
@given(groups(st.sampled_from([0.3, 1.0, 2.5])), st.integers(1, 5), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_order_of_the_files_or_of_the_datasets(datasets, batch_size, seed, shuffler):
    mixed = [Group(one.name, shuffler.sample(one.samples, len(one.samples)), one.repeats, one.probability, one.batch_size) for one in datasets]
    shuffler.shuffle(mixed)

    assert stream(Sampler(mixed, batch_size, seed), 3) == stream(Sampler(datasets, batch_size, seed), 3)


@unhurried
@given(samplers(st.sampled_from([0.1, 0.5, 1.0, 1.7])))
def test_any_position_gives_the_batch_that_the_epochs_have_there(sampler):
    batches = stream(sampler, 4)
    positions = [*range(len(batches))]
    random.Random(0).shuffle(positions)

    assert [sampler.at(position) for position in positions] == [batches[position] for position in positions]
    assert [sampler.locate(position) for position in range(len(batches))] == [
        (epoch, index) for epoch in range(4) for index in range(sampler.batches_per_epoch(epoch))
    ]


@unhurried
@given(samplers(st.sampled_from([0.5, 1.0, 2.0])))
def test_draws_count_how_often_a_sample_was_drawn_before(sampler):
    seen: dict[Sample, list[int]] = {}

    for batch in stream(sampler, 4):
        for one, draw in zip(batch.samples, batch.draws):
            seen.setdefault(one, []).append(draw)

    assert all(sorted(draws) == [*range(len(draws))] for draws in seen.values())


def test_without_repeats_the_draw_is_the_epoch():
    batches = stream(Sampler([group("cats", 7)], 2, seed=1), 3)

    assert all(set(batch.draws) == {batch.epoch} for batch in batches)


@unhurried
@given(groups(st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 1.5, 3.0])), st.integers(1, 5))
def test_epochs_take_the_share_that_the_probability_says_rounded_up_over_all_of_them(datasets, batch_size):
    sampler = Sampler(datasets, batch_size, seed=3)
    taken: Counter[str] = Counter()

    for epoch in range(6):
        taken.update(batch.group for batch in sampler.epoch_batches(epoch))
        for dataset in datasets:
            size = dataset.batch_size or batch_size
            counts = Counter(one.geometry.bucket for one in dataset.samples).values()
            whole = sum(-(-count * (dataset.repeats + 1) // size) for count in counts)
            assert taken[dataset.name] == math.ceil((epoch + 1) * Fraction(str(dataset.probability)) * whole)


def test_two_epochs_at_half_the_probability_see_every_sample_once():
    sampler = Sampler([group("cats", 16, probability=0.5), group("dogs", 8)], batch_size=4, seed=0)

    halves = [{one for batch in sampler.epoch_batches(epoch) for one in batch.samples if one.backend == "cats"} for epoch in (2, 3)]

    assert [len(half) for half in halves] == [8, 8]
    assert len(halves[0] | halves[1]) == 16


def test_copies_of_a_sample_do_not_share_a_batch_where_there_are_others_to_fill_it():
    batches = Sampler([group("cats", 40, repeats=24)], batch_size=4, seed=0).epoch_batches(0)

    assert all(len(set(batch.samples)) == 4 for batch in batches)


def test_datasets_are_shuffled_together():
    batches = Sampler([group("cats", 50), group("dogs", 50)], batch_size=1, seed=0).epoch_batches(0)

    changes = sum(left.group != right.group for left, right in pairwise(batches))
    assert 30 < changes < 70


def test_epochs_and_seeds_have_orders_of_their_own():
    datasets = [group("cats", 30)]
    orders = {tuple(batch.samples for batch in Sampler(datasets, 4, seed).epoch_batches(epoch)) for seed in range(5) for epoch in range(5)}

    assert len(orders) == 25


def test_batches_are_put_together_anew_in_each_epoch():
    sampler = Sampler([group("cats", 30)], 3, seed=0)

    first, second = ({frozenset(batch.samples) for batch in sampler.epoch_batches(epoch)} for epoch in (0, 1))

    assert len(first & second) < 2


def test_every_sample_is_as_likely_as_any_other_to_come_first():
    datasets = [group("cats", 8)]

    first = Counter(Sampler(datasets, 1, seed).at(0).samples[0].name for seed in range(800))

    deviations = [(count - 100) ** 2 / 100 for count in first.values()]
    assert len(first) == 8 and sum(deviations) < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_an_order_is_the_same_on_every_machine_and_in_every_release():
    """A promise, not a computation: runs of earlier releases are resumed by later ones."""
    sampler = Sampler([group("cats", 5), group("dogs", 3, repeats=1)], batch_size=2, seed=42)

    order = [[one.id.replace(".png", "") for one in batch.samples] for batch in sampler.epoch_batches(1)]

    assert order == [
        ["dogs/000", "dogs/001"],
        ["cats/003", "cats/000"],
        ["cats/001"],
        ["cats/004", "cats/002"],
        ["dogs/002", "dogs/002"],
        ["dogs/001", "dogs/000"],
    ]


def test_the_digest_names_what_the_order_and_the_pictures_depend_on():
    plain = Sampler([group("cats", 5)], 2, seed=1).digest()
    first, *others = group("cats", 5).samples
    recaptioned = Group("cats", [replace(first, captions=("another caption",)), *others])
    recropped = Group("cats", [replace(first, geometry=sample("cats", 0, BUCKETS[1]).geometry), *others])

    assert Sampler([Group("cats", [*reversed(group("cats", 5).samples)])], 2, seed=1).digest() == plain
    changed = [
        Sampler([group("cats", 6)], 2, seed=1),
        Sampler([group("cats", 5)], 3, seed=1),
        Sampler([group("cats", 5)], 2, seed=2),
        Sampler([group("cats", 5, repeats=1)], 2, seed=1),
        Sampler([recaptioned], 2, seed=1),
        Sampler([recropped], 2, seed=1),
    ]
    assert len({plain, *(sampler.digest() for sampler in changed)}) == 7


@pytest.mark.parametrize("datasets", [[], [Group("cats", [])], [group("cats", 3, probability=0.0)]], ids=["none", "empty", "never"])
def test_a_run_without_anything_to_draw_is_refused(datasets):
    with pytest.raises(DatasetError, match="anything to draw"):
        Sampler(datasets, 1, seed=0)


@unhurried
@given(samplers(), st.slices(10))
def test_an_epoch_is_a_sequence(sampler, part):
    batches = sampler.epoch_batches(0)

    assert len(batches) == sampler.batches_per_epoch(0)
    assert list(batches[part]) == list(batches)[part]
    assert batches[-1] == list(batches)[-1]
