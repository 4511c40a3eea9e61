"""Keys of older configs."""

from __future__ import annotations

import pytest

from simpletuner.options.retired import GONE, LATER, known_elsewhere, notice
from simpletuner.options.train_config import declared, spellings


def test_what_is_an_option_here_is_not_called_gone():
    assert not set(known_elsewhere()) & (declared().keys() | spellings().keys())
    assert all(notice(key, "x") is None for key in declared())


def test_a_key_stands_once():
    assert len(known_elsewhere()) == len(set(known_elsewhere()))


@pytest.mark.parametrize("key", [key.replace("*", "_x") for key in known_elsewhere()])
def test_each_is_said_in_one_line_that_names_it(key):
    said = notice(key, "something")

    assert said
    assert said.startswith(key)
    assert "\n" not in said


@pytest.mark.parametrize("value", [False, "false", 0, "0.0", None, "", "none", [], "Off"])
def test_what_asks_for_nothing_gets_nothing_and_no_word(value):
    assert notice("controlnet", value) == ""


def test_what_is_gone_is_named_whatever_it_says():
    assert notice("validation_torch_compile", "false")


def test_a_key_that_nobody_knows_is_none():
    assert notice("lerning_rate", 1) is None


def test_reasons_differ_between_the_tables():
    assert not GONE.keys() & LATER.keys()
