from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.wildcards import has_choice, has_lone_brace, resolve


def first(level: int, place: int, options: int) -> int:
    return 0


def last(level: int, place: int, options: int) -> int:
    return options - 1


@pytest.mark.parametrize(
    ("text", "with_first", "with_last"),
    [
        ("a {red|blue} cat", "a red cat", "a blue cat"),
        ("{a|b}{c|d}", "ac", "bd"),
        ("a {very |}big cat", "a very big cat", "a big cat"),
        ("{a|{b|{c|d}}}", "a", "d"),
        ("{{a|b} cat|dog}", "a cat", "dog"),
        ("{}", "", ""),
        ("{cat}", "cat", "cat"),
        (r"\{a|b\}", "{a|b}", "{a|b}"),
        (r"{a\|b|\{c\}}", "a|b", "{c}"),
        (r"saber \(fate\)", r"saber \(fate\)", r"saber \(fate\)"),
        ("a|b", "a|b", "a|b"),
        ("{a|b", "{a|b", "{a|b"),
        ("} {a|b} {", "} a {", "} b {"),
        ("{red, {big|small}|}", "red, big", ""),
        ("", "", ""),
    ],
)
def test_one_option_of_each_group_is_taken(text, with_first, with_last):
    assert (resolve(text, first), resolve(text, last)) == (with_first, with_last)


@pytest.mark.parametrize(("text", "choice", "lone"), [("{a|b}", True, False), ("{{a}|b}", True, False), ("{a}", False, False), ("a|b", False, False)])
def test_choices_are_seen(text, choice, lone):
    assert (has_choice(text), has_lone_brace(text)) == (choice, lone)


@pytest.mark.parametrize("text", ["{a|b", "a}", "{a|b}}", "{{a|b}"])
def test_braces_without_a_partner_are_seen(text):
    assert has_lone_brace(text) and not has_lone_brace(text.replace("{", r"\{").replace("}", r"\}"))


nested = st.recursive(
    st.text("ab ,", max_size=4).map(lambda word: (word, {word})),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(
            lambda options: ("{" + "|".join(text for text, _ in options) + "}", set().union(*(words for _, words in options)))
        )
        | st.tuples(inner, inner).map(lambda pair: (pair[0][0] + pair[1][0], {one + two for one in pair[0][1] for two in pair[1][1]}))
    ),
    max_leaves=8,
)


@given(nested, st.randoms(use_true_random=False))
def test_what_comes_out_is_one_of_what_the_groups_allow(case, random):
    text, allowed = case

    assert resolve(text, lambda level, place, options: random.randrange(options)) in allowed


@given(st.text())
def test_no_text_is_refused(text):
    resolve(text, last)
    has_lone_brace(text)


@given(st.text().filter(lambda text: not set(text) & set("{}|\\")))
def test_a_text_without_braces_stays_as_it_is(text):
    assert resolve(text, first) == text


@pytest.mark.parametrize("text", ["{" * 20_000, "\\|" * 20_000, "{" + "\\|" * 20_000, "{a" * 200 + "}" * 200, "{a|b}" * 5_000])
def test_no_text_takes_long(text):
    began = time.monotonic()

    resolve(text, first)

    assert time.monotonic() - began < 5
