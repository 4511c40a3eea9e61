"""JSON as people write it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.errors import ConfigError
from simpletuner.relaxed_json import load_relaxed, parse_relaxed

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no fault of the reader's."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@CALM
@given(VALUES, st.sampled_from([None, 2]))
def test_what_json_writes_is_read_as_it_was(value, indent):
    assert parse_relaxed(json.dumps(value, indent=indent), "text") == value


@CALM
@given(VALUES)
def test_text_outside_ascii_needs_no_escapes(value):
    assert parse_relaxed(json.dumps(value, ensure_ascii=False), "text") == value


def test_comments_and_trailing_commas_are_passed_over():
    text = """
    // a comment to the end of the line
    { # another
        "a": [1, 2, /* inside */ 3,], /* over
        two lines */
        "url": "http://example.org/#part /* no comment */",
    } // the end"""

    assert parse_relaxed(text, "text") == {"a": [1, 2, 3], "url": "http://example.org/#part /* no comment */"}


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"seed": 1}')

    assert load_relaxed(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('{\n  "seed": 1\n  "resolution": 2\n}', "line 3, column 3", ["end of line 2"]),
        ('{"a": 1', "line 1, column 8", ["file ends", "line 1 is not closed"]),
        ("[1,\n 2", "line 2, column 3", ["line 1 is not closed"]),
        ("", "line 1, column 1", ["a value"]),
        ('{"a" 1}', "line 1, column 6", ['":" after "a"']),
        ("{'a': 1}", "line 1, column 2", ["double quotes"]),
        ('{"a": True}', "line 1, column 7", ["true"]),
        ('{"a": .5}', "line 1, column 7", ["number"]),
        ('{"a": 01}', "line 1, column 7", ["a value"]),
        ('{"a": "C:\\models"}', "line 1, column 10", ["backslash"]),
        ('{"a": "open\n"}', "line 1, column 7", ["not closed"]),
        ('{"a": 1} b', "line 1, column 10", ["end of the file"]),
        ("{,}", "line 1, column 2", ["a name"]),
        ("[1 2]", "line 1, column 4", ['"," or "]"']),
        ("/* open", "line 1, column 1", ["never closed"]),
        ('{"a": 1, "a": 2}', "line 1, column 10", ["second time"]),
        ("[" * 500, "line 1, column 101", ["100 brackets"]),
    ],
)
def test_what_is_wrong_is_named_with_line_and_column(text, where, words):
    with pytest.raises(ConfigError) as caught:
        parse_relaxed(text, "config.json")

    assert caught.value.message.startswith(f"config.json, {where}: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_name_that_stands_twice_with_one_value_is_no_mistake():
    assert parse_relaxed('{"a": 1, "a": 1}', "text") == {"a": 1}


def test_a_missing_file_a_folder_and_bytes_are_refused_by_name(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')

    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "bytes.json"):
        with pytest.raises(ConfigError, match=path.name):
            load_relaxed(path)
