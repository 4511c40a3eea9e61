from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from simpletuner.data.filters import apply, parse, read_filters, tidy


def filtered(text: str, *entries: str) -> str:
    return apply([parse(entry) for entry in entries], text)[0]


@pytest.mark.parametrize(
    ("entry", "text", "result"),
    [
        ("cat", "a cat, category, Cat, cat.", "a, category, Cat."),
        ("by me", "a dog by me", "a dog"),
        ("a.b", "a.b, axb", "axb"),
        ("-", "a - b", "a b"),
        ("水印", "有水印的图", "有的图"),
        ("Ünder", "Ünderneath, Ünder", "Ünderneath"),
        (r"\bcats?\b", "a cat, cats, category", "a, category"),
        ("(very|quite) ", "a very big, quite red cat", "a big, red cat"),
        ("^photo of ", "photo of a photo of a cat", "a photo of a cat"),
        ("s/colour/color/", "colour, discoloured", "color, discolored"),
        ("s/(red) (cat)/\\2 in \\1/", "a red cat", "a cat in red"),
        ("s/CAT/dog/i", "a cat, Cat", "a dog, dog"),
        (r"s/a\/b/c\/d/", "a/b", "c/d"),
        ("s/ and /, /g", "one and two and three", "one, two, three"),
        ("s/watermark//", "a cat, watermark", "a cat"),
    ],
)
def test_an_entry_is_words_or_an_expression_or_a_replacement(entry, text, result):
    assert filtered(text, entry) == result


def test_entries_work_in_their_order():
    assert filtered("a cat", "s/cat/dog/", "dog") == "a"
    assert filtered("a cat", "dog", "s/cat/dog/") == "a dog"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("a(b", "is no regular expression: missing ), unterminated subpattern at position 1"),
        ("s/[/x/", "is no regular expression"),
        ("s/a/b", "is not of that form"),
        ("s/a/b/c/", "is not of that form"),
        (r"s/a/\1/", "has a replacement that cannot be used: invalid group reference 1"),
        ("  ", "is empty"),
    ],
)
def test_what_cannot_be_used_is_refused(entry, reason):
    with pytest.raises(ValueError) as caught:
        parse(entry)

    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("a cat, , sitting", "a cat, sitting"),
        (", a cat ,, red", "a cat, red"),
        ("a cat,  red , ", "a cat, red,"),
        ("a cat, .", "a cat."),
        ("A cat. . It sits.", "A cat. It sits."),
        (". It sits.", "It sits."),
        ("well ... a .5 mm pen", "well ... a .5 mm pen"),
        ("one\n, \ntwo", "one\ntwo"),
        (" , ; ", ""),
        ("a;; b", "a; b"),
    ],
)
def test_separators_with_nothing_between_them_go(text, tidied):
    assert tidy(text, text) == tidied


def test_a_comma_at_the_end_goes_unless_it_was_there_before():
    assert filtered("a cat, red", "red") == "a cat"
    assert filtered("a cat, red,", "red") == "a cat,"


@example(".;\n.")
@given(st.text(" ab,;.\n", max_size=20))
def test_what_is_tidy_stays_as_it_is(text):
    once = tidy(text, text)

    assert tidy(once, once) == once


@given(st.text(" ab,;.", max_size=20))
def test_tidying_takes_away_no_letter(text):
    assert [letter for letter in tidy(text, text) if letter in "ab"] == [letter for letter in text if letter in "ab"]


@given(st.lists(st.from_regex(r"[a-z]{1,5}( [a-z]{1,5})?", fullmatch=True), min_size=1, max_size=6), st.data())
def test_a_tag_that_is_filtered_out_leaves_the_others_as_they_were(tags, data):
    gone = data.draw(st.sampled_from(tags))
    words = set(gone.split())
    tags = [tag for tag in tags if tag == gone or not words & set(tag.split())]

    assert filtered(", ".join(tags), gone) == ", ".join(tag for tag in tags if tag != gone)


@given(st.text(max_size=30))
def test_a_text_in_which_nothing_is_found_is_not_touched(text):
    assert apply([parse("\x00never")], text.replace("\x00", "")) == (text.replace("\x00", ""), set())


def test_filters_are_read_from_a_list_or_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("\ufeffcat\n\n  s/a/b/ \n", encoding="utf-8")
    (tmp_path / "words.json").write_text(json.dumps(["cat", "s/a/b/"]))

    for written in (["cat", "s/a/b/"], str(tmp_path / "words.txt"), str(tmp_path / "words.json")):
        filters, problems = read_filters(written)
        assert not problems
        assert [one.written.strip() for one in filters] == ["cat", "s/a/b/"]


def test_every_problem_names_its_place(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("cat\na(b\n\ns/x\n")

    assert [problem.split(": ")[0] for problem in read_filters(str(path))[1]] == [f"{path}, line 2", f"{path}, line 4"]
    assert read_filters(["cat", "[", 3])[1] == [
        "caption_filter_list, entry 2: '[' is no regular expression: unterminated character set at position 0",
        "caption_filter_list, entry 3 is 3; it must be a text",
    ]


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("watermark", "neither a list nor a .txt or .json file"),
        ("none.txt", "none.txt cannot be read: No such file"),
        ("none.json", "does not exist"),
    ],
)
def test_a_file_that_is_none_is_named(written, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    (found,) = read_filters(written)[1]

    assert found.startswith("caption_filter_list: ") and problem in found
