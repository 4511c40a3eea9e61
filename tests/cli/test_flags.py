"""Flags from declarations."""

from __future__ import annotations

import pytest

from simpletuner.cli.flags import describe_option, help_of_options, read_flags
from simpletuner.errors import ConfigError
from simpletuner.options.train_config import SECTIONS, declared


def test_options_and_a_commands_own_arguments_are_told_apart():
    found, own = read_flags(["--learning_rate", "1e-4", "env=mine", "seed=3"], ["env", "config"], [])

    assert {setting.key: setting.value for setting in found} == {"learning_rate": "1e-4", "seed": "3"}
    assert own == {"env": "mine"}


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--lerning_rate=1", "--learning_rate"),
        ("--optimiser=lion", "--optimizer"),
        ("lerning_rate=1", "--learning_rate"),
        ("--dryrun", "--dry_run"),
        ("dry_run=true", "--dry_run"),
    ],
)
def test_an_unknown_flag_offers_the_nearest(word, nearest):
    with pytest.raises(ConfigError) as caught:
        read_flags([word], ["env"], ["dry_run"])

    assert str(caught.value.hint) == f"Did you mean {nearest}?"


def test_older_flags_are_left_to_the_loader():
    found, _ = read_flags(["--validation_steps", "5", "--push_to_hub"], [], [])

    assert [setting.key for setting in found] == ["validation_steps", "push_to_hub"]


def test_a_word_that_is_no_flag_is_refused():
    with pytest.raises(ConfigError, match="'now'"):
        read_flags(["now"], [], [])


def test_help_shows_what_is_not_advanced_under_its_section():
    shown = help_of_options()

    assert all(f"\n  --{key}:" in shown for key, option in declared().items() if not option.advanced)
    assert not any(f"\n  --{key}:" in shown for key, option in declared().items() if option.advanced)
    assert all(f"{section.__name__}: {section.__doc__}" in shown for section in SECTIONS.values())


def test_an_option_says_its_rule_default_and_help():
    shown = " ".join(describe_option(declared()["learning_rate"]).split())

    assert shown.startswith("--learning_rate: a number above 0 (default 0.0001) Step size")
