"""Screens fit the terminal, whatever its size and whatever is asked."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth

from simpletuner.cli.wizard.questions import Choice, Question
from simpletuner.cli.wizard.screen import FANCY, SIMPLE, folded, list_screen, signs_for, typing_screen, window

words = st.text("ab 猫é\t", max_size=30)
choices = st.lists(st.builds(Choice, st.just(1), words, words, words), min_size=1, max_size=25)
questions = st.builds(Question, words, st.just(1), reason=words, help=words, place=st.just("3/12"))


@settings(max_examples=40)
@given(questions, choices, st.data(), st.integers(20, 120), st.integers(10, 40), st.booleans())
def test_no_screen_is_larger_than_the_terminal_and_the_marked_answer_is_on_it(question, rows, data, width, height, shows_help):
    at = data.draw(st.integers(0, len(rows) - 1))

    lines = list_screen(question, rows, at, shows_help=shows_help, width=width, height=height, signs=FANCY)

    assert len(lines) <= height
    assert all(get_cwidth(text) < width for _, text in lines)
    assert any(style == "class:here" for style, _ in lines) or len(lines) == height


def test_at_80_by_24_a_long_list_scrolls_and_the_keys_stay_in_sight():
    question = Question("Which optimizer?", 1, reason="the usual one", help="Optimizer. " * 40, place="5/12", footer=lambda: "memory plan: fits")
    rows = [Choice(number, f"optimizer-{number}", "what it is " * 9) for number in range(50)]

    lines = [text for _, text in list_screen(question, rows, 25, shows_help=True, width=80, height=23, signs=FANCY)]

    assert len(lines) == 23
    assert lines[0] == "5/12 Which optimizer?" and "? help" in lines[-1] and lines[-2] == "memory plan: fits"
    assert sum("more" in line for line in lines) == 2 and any("❯ optimizer-25" in line for line in lines)


def test_help_on_a_page_is_about_the_marked_line():
    page = Question("Size and memory", 1, help="The whole page.")
    rows = [Choice(1, "Go on"), Choice(2, "resolution", help="The edge.")]

    shown = [[text for _, text in list_screen(page, rows, at, shows_help=True, width=80, height=23, signs=FANCY)] for at in (0, 1)]

    assert "The whole page." in shown[0] and "The edge." in shown[1] and "The whole page." not in shown[1]


def test_an_output_without_such_letters_gets_plain_ones():
    assert signs_for("ascii") is SIMPLE and signs_for("UTF-8") is FANCY and signs_for(None) is SIMPLE
    question = dataclasses.replace(Question("A size?", 1), help="It is a number.")

    lines = [text for _, text in typing_screen(question, "'x' is not a number", shows_help=True, width=80, signs=SIMPLE)]

    assert lines[1:3] == ["It is a number.", "'x' is not a number"] and all(line.isascii() for line in lines)


@given(st.integers(1, 60), st.integers(3, 30), st.data())
def test_the_window_holds_the_marked_row(count, room, data):
    at = data.draw(st.integers(0, count - 1))

    first, last = window(count, at, room)

    assert 0 <= first <= at < last <= count and last - first == min(count, room)


@given(st.text("ab 猫", max_size=80), st.integers(2, 30))
def test_folding_loses_no_letter(text, width):
    lines = folded(text, width)

    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(get_cwidth(line) <= width for line in lines)
