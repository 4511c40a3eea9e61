"""Datasets that come and go: only within their windows, disturbing nobody, a function of the position."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.buckets import Group
from simpletuner.data.sampler import BatchPlan, Sampler
from simpletuner.data.window import ALWAYS, Window
from simpletuner.types import Crop, Geometry, Sample, Size

unhurried = settings(deadline=None, max_examples=100)
EPOCHS = 8


def group(name: str, count: int, window: Window = ALWAYS, **facts) -> Group:
    geometry = Geometry(Size(64, 64), Size(64, 64), Crop(0, 0, 32, 32))
    return Group(name, [Sample(name, f"{number:03d}.png", "", geometry, ("a picture",)) for number in range(count)], window=window, **facts)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start_epoch, start_step = draw(st.integers(1, 5)), draw(st.sampled_from([0, 0, 1, 3, 7, 20]))
    end_epoch = draw(st.one_of(st.none(), st.integers(start_epoch, 7)))
    end_step = draw(st.one_of(st.none(), st.integers(start_step + 1, 30)))
    return Window(start_epoch, end_epoch, start_step, end_step)


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    probabilities = st.sampled_from([0.3, 1.0, 1.0, 2.0])
    others = [
        group(name, draw(st.integers(1, 9)), draw(windows()), repeats=draw(st.integers(0, 2)), probability=draw(probabilities))
        for name in ("birds", "dogs", "eels")
    ]
    kept = draw(st.booleans())
    always = [group("cats", draw(st.integers(1, 9)))] if kept else []
    return Sampler([*others, *always], draw(st.integers(1, 3)), draw(st.integers(0, 99)), batches_per_step=draw(st.integers(1, 3)))


def stream(sampler: Sampler, epochs: int = EPOCHS) -> list[BatchPlan]:
    return [batch for epoch in range(epochs) for batch in sampler.epoch_batches(epoch)]


def lanes(sampler: Sampler) -> dict[str, Group]:
    return {lane.group.name: lane.group for lane in sampler._lanes}


@unhurried
@given(samplers())
def test_a_dataset_is_drawn_within_its_window_only(sampler):
    for position, batch in enumerate(stream(sampler)):
        window = lanes(sampler)[batch.group].window
        assert window.epochs[0] <= batch.epoch < window.epochs[1]
        assert window.steps[0] <= position // sampler.batches_per_step < window.steps[1]


@unhurried
@given(samplers())
def test_any_position_gives_the_batch_that_the_epochs_have_there(sampler):
    batches = stream(sampler)
    positions = [*range(len(batches))]
    random.Random(0).shuffle(positions)

    assert [sampler.at(position) for position in positions] == [batches[position] for position in positions]
    assert [sampler.locate(position) for position in range(len(batches))] == [
        (epoch, index) for epoch in range(EPOCHS) for index in range(sampler.batches_per_epoch(epoch))
    ]


@unhurried
@given(samplers())
def test_a_dataset_without_a_window_shows_each_sample_once_an_epoch_whatever_comes_and_goes(sampler):
    if "cats" not in lanes(sampler):
        return
    for epoch in range(EPOCHS):
        drawn = Counter(one.name for batch in sampler.epoch_batches(epoch) for one in batch.samples if batch.group == "cats")
        assert drawn == {one.name: 1 for one in lanes(sampler)["cats"].samples}


@unhurried
@given(samplers())
def test_the_stream_ends_exactly_where_nobody_takes_part(sampler):
    batches = stream(sampler)

    if sampler.end is None:
        return
    assert len(batches) <= sampler.end
    epoch = sampler.locate(sampler.end)[0]
    step = sampler.end // sampler.batches_per_step
    for one in lanes(sampler).values():
        takes_part = one.window.epochs[0] <= epoch < one.window.epochs[1] and one.window.steps[0] * sampler.batches_per_step <= sampler.end
        assert not (takes_part and (one.window.end_step is None or step < one.window.end_step))
    assert sampler.batches_per_epoch(epoch) == 0


@unhurried
@given(samplers())
def test_each_draw_of_a_sample_has_a_number_of_its_own(sampler):
    drawn = Counter((one.id, draw) for batch in stream(sampler) for one, draw in zip(batch.samples, batch.draws))

    assert set(drawn.values()) <= {1}


def test_a_dataset_that_begins_in_the_middle_of_an_epoch_is_mixed_into_the_rest_of_it():
    sampler = Sampler([group("cats", 20), group("dogs", 6, Window(start_step=10))], 1, seed=0)

    first, second = sampler.epoch_batches(0), sampler.epoch_batches(1)

    assert [len(first), len(second)] == [26, 26]
    assert {batch.group for batch in first[:10]} == {"cats"}
    assert Counter(batch.group for batch in first[10:]) == {"cats": 10, "dogs": 6}
    assert [batch.draws for batch in first if batch.group == "dogs"] == [(0,)] * 6
    assert [batch.draws for batch in second if batch.group == "dogs"] == [(1,)] * 6


def test_a_dataset_that_ends_in_the_middle_of_an_epoch_falls_out_of_the_rest_of_it():
    sampler = Sampler([group("cats", 20), group("dogs", 20, Window(end_step=5))], 1, seed=0, batches_per_step=2)

    epoch = sampler.epoch_batches(0)

    assert {batch.group for batch in epoch[10:]} == {"cats"}
    assert sum(batch.group == "cats" for batch in epoch) == 20
    assert sampler.batches_per_epoch(1) == 20


def test_epochs_before_a_window_opens_are_as_if_the_dataset_were_not_there():
    late = Sampler([group("cats", 20), group("dogs", 6, Window(start_epoch=3))], 2, seed=4)
    without = Sampler([group("cats", 20)], 2, seed=4)

    assert [stream(late, 2), len(late.epoch_batches(2))] == [stream(without, 2), 13]


def test_one_dataset_after_another_leaves_no_gap():
    relay = Sampler([group("cats", 4, Window(end_epoch=2)), group("dogs", 4, Window(start_epoch=3))], 2, seed=0)
    gap = Sampler([group("cats", 4, Window(end_epoch=2)), group("dogs", 4, Window(start_epoch=4))], 2, seed=0)
    late = Sampler([group("cats", 4, Window(start_step=1))], 2, seed=0)

    assert relay.end is None
    assert (gap.end, gap.locate(gap.end)) == (4, (2, 0))
    assert late.end == 0


def test_windows_are_part_of_the_digest_and_steps_only_with_them():
    plain = [Sampler([group("cats", 4)], 2, 0, steps).digest() for steps in (1, 2)]
    windowed = [Sampler([group("cats", 4, Window(end_step=9))], 2, 0, steps).digest() for steps in (1, 2)]

    assert plain[0] == plain[1]
    assert len({plain[0], *windowed}) == 3


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (ALWAYS, ""),
        (Window(2, 4), "epochs 2 to 4"),
        (Window(start_step=10), "steps 11 to the end"),
        (Window(end_epoch=3, end_step=7), "epochs 1 to 3, steps 1 to 7"),
    ],
)
def test_windows_are_said_as_users_count(window, words):
    assert str(window) == words
    assert list(window.problems()) == []


def test_empty_windows_are_problems():
    assert list(Window(start_epoch=3, end_epoch=2, start_step=5, end_step=5).problems()) == [
        "end_epoch 2 is before start_epoch 3",
        "end_step 5 is not after start_step 5",
    ]


@unhurried
@given(samplers(), st.integers(0, 120))
def test_batches_before_a_position_are_counted_as_the_stream_has_them(sampler, position):
    batches = stream(sampler)[:position]
    counted = sampler.counts(len(batches))

    assert {name: count for name, count in counted.items() if count} == Counter(batch.group for batch in batches)
    assert set(counted) == set(lanes(sampler))
