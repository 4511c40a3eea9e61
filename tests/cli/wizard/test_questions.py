"""Questions come of the declarations of options."""

from __future__ import annotations

import pytest

from simpletuner.cli.wizard.files import NAMED_BY
from simpletuner.cli.wizard.own import Own
from simpletuner.cli.wizard.questions import Choice, option_of, pick, question, read_value
from simpletuner.cli.wizard.steps import asked_keys
from simpletuner.options.option import options_of
from simpletuner.options.train_config import declared


def test_every_option_that_declares_a_question_is_asked_once():
    asked = list(asked_keys())

    assert {key for key, option in declared().items() if option.ask} - {*NAMED_BY} <= set(asked)
    assert len(asked) == len(set(asked)) and set(options_of(Own)) <= set(asked)


def test_the_help_is_the_options_own_with_its_default_and_the_proposal(propose_for):
    asked = question("learning_rate", propose_for())

    assert asked.title == "Learning rate?" and asked.shown == "0.0001"
    assert declared()["learning_rate"].help in asked.help
    assert "In config.json: learning_rate" in asked.help and "Proposed here: 0.0001, because: usual for a LoRA" in asked.help


def test_an_answer_of_ones_own_stands_beside_what_is_proposed(propose_for):
    asked = question("learning_rate", propose_for(learning_rate=3e-4))

    assert asked.default == 3e-4 and asked.reason.startswith("proposed: 0.0001")


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [("resolution", "768", 768), ("max_train_steps", "2e3", 2000), ("gradient_checkpointing", "no", False), ("output_dir", "out/x", "out/x")],
)
def test_what_is_typed_is_read_as_its_section_reads_it(key, typed, value):
    assert read_value(option_of(key), typed) == value


@pytest.mark.parametrize(("key", "typed"), [("resolution", "-3"), ("learning_rate", "fast"), ("lora_rank", ""), ("lora_rank", "2.5"), ("name", " ")])
def test_what_cannot_be_is_refused_by_its_rule(key, typed):
    with pytest.raises(ValueError, match=r"not|needs"):
        read_value(option_of(key), typed)


def test_a_choice_is_picked_by_number_name_or_beginning():
    choices = (Choice("a", "auraflow"), Choice("b", "sd3"), Choice("c", "sdxl"))

    assert [pick(choices, text) for text in ("1", "SD3", "aur", "3")] == ["a", "b", "a", "c"]
    with pytest.raises(ValueError, match="did you mean 'auraflow'"):
        pick(choices, "aurflow")
    with pytest.raises(ValueError, match="Known answers"):
        pick(choices, "sd")
