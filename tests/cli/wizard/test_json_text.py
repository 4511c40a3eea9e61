"""Values are changed in a text that keeps its comments."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.cli.wizard.json_text import REMOVED, change, find
from simpletuner.relaxed_json import parse_relaxed

COMMENTS = ("", " // why", " # why", "/* a\n b */", "\n\n// alone\n")
keys = st.text('abc"\\é/', min_size=1, max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('x,}]/*#" ', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
EXAMPLE = """\
{
    // The model.
    "model_family": "sdxl",  // large
    "rank": 16, /* small,
    but enough */
    "preset": { "targets": ["a", "b"] },
    "last": 1 // the end
}
"""


@st.composite
def commented(draw):
    """A document, and a text of it with comments and trailing commas."""
    document = draw(st.dictionaries(keys, values, max_size=4))
    comment = st.sampled_from(COMMENTS)
    comma = st.sampled_from(["", ","])
    parts = [f"{json.dumps(key)}: {json.dumps(value, indent=draw(st.sampled_from([None, 2])))}" for key, value in document.items()]
    text = "{" + draw(comment) + "\n"
    for number, part in enumerate(parts):
        text += "  " + part + ("," if number < len(parts) - 1 else draw(comma)) + draw(comment) + draw(st.sampled_from(["\n", "\n\n"]))
    return document, text + "}" + draw(comment) + "\n"


@settings(max_examples=60)
@given(commented(), st.dictionaries(keys, values | st.just(REMOVED), max_size=4))
def test_the_changed_text_says_what_it_should_and_keeps_every_comment(made, changes):
    document, text = made

    after = change(text, {(key,): value for key, value in changes.items()})

    expected = {key: value for key, value in {**document, **changes}.items() if value is not REMOVED}
    assert parse_relaxed(after, "after") == expected
    assert after.count("why") == text.count("why") and after.count("alone") == text.count("alone") and after.count("*/") >= text.count("a\n b */")


def test_one_line_changes_for_one_value():
    after = change(EXAMPLE, {("rank",): 32})

    assert [line for line in after.splitlines() if line not in EXAMPLE.splitlines()] == ['    "rank": 32, /* small,']


def test_a_new_key_stands_behind_the_last_one_and_its_comment():
    assert change(EXAMPLE, {("new",): "x"}).endswith('    "last": 1, // the end\n    "new": "x"\n}\n')


def test_values_deep_inside_are_found():
    after = change(EXAMPLE, {("preset", "targets", 1): "c", ("preset", "factor"): 8})

    assert '"preset": { "targets": ["a", "c"], "factor": 8 },' in after


def test_an_unchanged_text_is_the_same_to_the_byte():
    assert change(EXAMPLE, {}) == EXAMPLE
    assert set(find("[1, {}]")) == {(), (0,), (1,)}
