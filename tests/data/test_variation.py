from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.filters import parse
from simpletuner.data.loader import prompt_of, prompts_of
from simpletuner.data.variation import Variation, expand, split
from simpletuner.types import Crop, Geometry, Sample, Size

TAGS = "a cat, red, on a mat, at night, from above"
GEOMETRY = Geometry(Size(8, 8), Size(8, 8), Crop(0, 0, 8, 8))
SHUFFLED = Variation(count=6, shuffles=True)


def sample(*captions: str, name: str = "x.png") -> Sample:
    return Sample("set", name, name, GEOMETRY, captions)


def versions(variation: Variation, caption: str = TAGS) -> list[str]:
    return [variation.version(caption, number) for number in variation.numbers]


variations = st.builds(
    Variation,
    count=st.integers(1, 5),
    seed=st.integers(0, 3),
    shuffles=st.booleans(),
    separator=st.sampled_from(["comma", "space", "period"]),
    kept_tags=st.integers(0, 4),
    includes_original=st.booleans(),
    tag_dropout=st.sampled_from([0.0, 0.3, 1.0]),
    has_wildcards=st.booleans(),
    filters=st.sampled_from([(), (parse("b"),), (parse("s/a+/c/"), parse("c"))]),
    heads=st.sampled_from([(), ("sks",), ("a, b",)]),
)
texts = st.text("ab ,.{|}\\\n", max_size=24)


@given(variations, st.lists(texts, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.0]))
def test_whatever_a_draw_shows_was_listed_to_be_encoded(variation, captions, dropout):
    samples = [sample(*captions), sample(*captions[:1], name="y.png")]
    listed = prompts_of([expand(samples, variation)], dropout)

    shown = {prompt_of(one, draw, dropout, seed, variation) for one in samples for draw in range(8) for seed in (0, 1)}

    assert shown <= listed.keys()
    assert set(listed.values()) <= {*captions, ""}


@given(variations, texts, st.integers(0, 3))
def test_a_prompt_is_a_function_of_rule_sample_draw_and_seed(variation, caption, seed):
    def shown() -> list[str]:
        return [prompt_of(sample(caption, TAGS), draw, 0.1, seed, replace(variation)) for draw in range(5)]

    assert shown() == shown()


@given(variations, texts)
def test_more_versions_leave_the_others_as_they_were(variation, caption):
    more = replace(variation, count=variation.count + 3)

    assert [more.version(caption, number) for number in variation.numbers] == versions(variation, caption)


@given(variations.map(lambda one: replace(one, has_wildcards=False, filters=())), texts.filter(lambda text: ".." not in text))
def test_tags_are_moved_and_dropped_but_never_made(variation, caption):
    before = Counter(split(caption, variation.separator))

    for version in versions(variation, caption):
        after = split(version, variation.separator)
        kept = split(caption, variation.separator)[: variation.kept_tags]
        assert not Counter(after) - before
        assert after[: len(kept)] == kept
        assert variation.tag_dropout or Counter(after) == before


def test_versions_are_the_same_in_every_python():
    """Pinned, for others would be encoded anew."""
    assert versions(Variation(count=3, shuffles=True)) == [
        "a cat, red, on a mat, at night, from above",
        "at night, a cat, from above, red, on a mat",
        "from above, on a mat, red, at night, a cat",
        "on a mat, a cat, red, at night, from above",
    ]


def test_tags_stand_in_every_place():
    firsts = Counter(version.split(", ")[0] for version in versions(Variation(count=1000, shuffles=True, includes_original=False)))

    assert all(abs(firsts[tag] - 200) < 4.5 * (1000 * 0.2 * 0.8) ** 0.5 for tag in TAGS.split(", "))


def test_the_original_is_a_version_unless_it_is_left_out():
    assert versions(SHUFFLED)[0] == TAGS and len(versions(SHUFFLED)) == 7
    assert versions(replace(SHUFFLED, includes_original=False)) == versions(SHUFFLED)[1:]


def test_another_seed_makes_other_versions():
    assert versions(SHUFFLED)[1:] != versions(replace(SHUFFLED, seed=1))[1:]


def test_sentences_are_shuffled_whole():
    text = "It is 3.5 m long. A cat sits on it. It rains."

    found = {tuple(sorted(split(version, "period"))) for version in versions(Variation(50, shuffles=True, separator="period"), text)}

    assert found == {("A cat sits on it", "It is 3.5 m long", "It rains")}
    assert all(version.endswith(".") for version in versions(Variation(5, shuffles=True, separator="period"), text))


def test_a_caption_of_one_tag_has_one_version():
    assert set(versions(SHUFFLED, "a cat,")) == {"a cat,"}


@pytest.mark.parametrize("head", ["sks style,", "sks", "by sks, in oil,"])
def test_an_instance_prompt_before_a_caption_stays_in_front(head):
    variation = replace(SHUFFLED, count=50, heads=("sks", "sks style,", "by sks, in oil,"))

    found = versions(variation, f"{head} {TAGS}")

    assert all(version.startswith(head) for version in found)
    assert len(set(found)) > 10


def test_tags_are_dropped_as_often_as_asked_and_kept_ones_never():
    variation = Variation(2000, tag_dropout=0.3, kept_tags=1, includes_original=False)

    counts = Counter(tag for version in versions(variation) for tag in version.split(", "))

    assert counts["a cat"] == 2000
    assert all(abs(counts[tag] - 1400) < 4.5 * (2000 * 0.3 * 0.7) ** 0.5 for tag in TAGS.split(", ")[1:])


def test_dropped_tags_leave_the_order_alone():
    order = versions(replace(SHUFFLED, tag_dropout=1e-9))
    assert order == versions(SHUFFLED)

    for fuller, sparser in zip(versions(SHUFFLED), versions(replace(SHUFFLED, tag_dropout=0.5))):
        left = sparser.split(", ")
        assert [tag for tag in fuller.split(", ") if tag in left] == left or not sparser


def test_without_shuffling_what_is_left_keeps_its_order():
    for version in versions(Variation(20, tag_dropout=0.5)):
        places = [TAGS.index(tag) for tag in split(version, "comma")]
        assert places == sorted(places)


def test_each_option_of_a_wildcard_is_shown_equally_often():
    found = Counter(versions(Variation(12, has_wildcards=True), "a {red|blue|green} cat"))

    assert found == {"a red cat": 4, "a blue cat": 4, "a green cat": 4}


def test_groups_choose_apart_from_each_other():
    assert len(set(versions(Variation(40, has_wildcards=True), "{a|b} {c|d}"))) == 4


def test_an_option_of_nothing_leaves_no_gap():
    assert set(versions(Variation(2, has_wildcards=True), "a cat, {red|}, sitting")) == {"a cat, red, sitting", "a cat, sitting"}


def test_braces_are_letters_without_the_switch():
    assert versions(Variation(filters=(parse("red"),)), "{a|b} red") == ["{a|b}"]


def test_the_steps_follow_in_their_order():
    """Wildcards, filters, dropout, order: a filter sees what a wildcard chose, and tags are what filters left."""
    variation = Variation(30, shuffles=True, has_wildcards=True, filters=(parse("s/blue/green, big/"),), kept_tags=1)

    found = {tuple(sorted(version.split(", "))) for version in versions(variation, "cat, {red|blue}, old")}

    assert found == {("cat", "old", "red"), ("big", "cat", "green", "old")}


def test_alike_versions_are_listed_once_with_their_caption():
    expansion = expand([sample("red, cat"), sample("cat, red", name="y.png")], Variation(20, shuffles=True))

    assert expansion.prompts == {"red, cat": "red, cat", "cat, red": "red, cat"}
    assert expansion.count == "2 captions in 21 versions make 2 text embeddings"


def test_captions_without_a_rule_are_listed_as_they_are():
    expansion = expand([sample("a", "b"), sample("b", name="y.png")], None)

    assert (expansion.prompts, expansion.count, expansion.notes) == ({"a": "a", "b": "b"}, "", ())


@pytest.mark.parametrize(
    ("variation", "captions", "note"),
    [
        (SHUFFLED, ["a cat", ""], "caption_shuffle changes nothing: no caption has two tags behind those that are kept, split at commas"),
        (Variation(2, shuffles=True, kept_tags=4), [TAGS], "caption_shuffle changes nothing"),
        (Variation(2, tag_dropout=0.1, kept_tags=9), [TAGS], "caption_tag_dropout changes nothing: no caption has a tag"),
        (Variation(2, has_wildcards=True), ["a cat", "{a}"], "caption_wildcards finds no {a|b} in any caption"),
        (Variation(2, has_wildcards=True), ["{a|b", "{a|b}"], "braces without a partner stay as they are, in 1 of 2 captions"),
        (Variation(filters=(parse("cat"), parse("dog"))), ["a cat"], "caption_filter_list: 'dog' is found in no caption"),
        (Variation(filters=(parse("cat"),)), ["cat", "a cat", ""], "1 of 3 captions have no words left: trained without words of their own"),
        (Variation(3, tag_dropout=1.0), ["a", "b"], "6 of 8 versions of captions have no words left"),
    ],
)
def test_rules_that_find_nothing_and_captions_that_are_left_empty_are_said(variation, captions, note):
    assert [found for found in expand([sample(*captions)], variation).notes if found.startswith(note)]


def test_nothing_is_said_of_rules_that_do_something():
    variation = Variation(2, 0, True, "comma", 1, True, 0.2, True, (parse("red"),))

    assert expand([sample("cat, {a|b}, red, c, d, e", "")], variation).notes == ("2 captions in 3 versions make 4 text embeddings",)


def test_each_version_is_drawn_equally_often():
    shown = Counter(prompt_of(sample(TAGS), draw, 0.0, 5, Variation(3, shuffles=True)) for draw in range(4000))

    assert all(abs(count - 1000) < 4.5 * (4000 * 0.25 * 0.75) ** 0.5 for count in shown.values()) and len(shown) == 4
