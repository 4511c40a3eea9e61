"""Declaring options, and reading their values as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from simpletuner.options.adapters import Adapters
from simpletuner.options.data import Data
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.memory import Memory
from simpletuner.options.optim import Optim
from simpletuner.options.option import options_of
from simpletuner.options.train_config import SECTIONS, declared, spellings
from simpletuner.options.training import Training
from simpletuner.options.validation import Validation


@pytest.mark.parametrize("option", declared().values(), ids=lambda option: option.key)
def test_every_option_has_a_sentence_and_a_rule(option):
    assert option.help[0].isupper() or option.help[0] in "`", option.help
    assert option.help.endswith("."), option.help
    assert "  " not in option.help
    assert option.rule


def test_every_section_says_what_it_is_for():
    assert all(section.__doc__ and section.__doc__.endswith(".") for section in SECTIONS.values())


def test_an_older_spelling_belongs_to_one_option_and_is_none_itself():
    old = [name for option in declared().values() for name in (*option.was, *option.was_opposite)]

    assert len(old) == len(set(old)) == len(spellings())
    assert not set(old) & declared().keys()


def test_a_default_passes_its_own_check():
    for name, section in SECTIONS.items():
        required = {"model_family": "any"} if name == "models" else {}
        given = {key: option.default for key, option in options_of(section).items() if not option.is_required}

        assert section(**required, **given) == section(**required)


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "yes", "on", "1", "y", " true ", True, 1])
def test_words_that_mean_true(text):
    assert Memory(gradient_checkpointing=text).gradient_checkpointing is True


@pytest.mark.parametrize("text", ["false", "False", "FALSE", "no", "off", "0", "n", "Off", False, 0])
def test_words_that_mean_false(text):
    assert Memory(gradient_checkpointing=text).gradient_checkpointing is False


@pytest.mark.parametrize("text", ["maybe", "2", 2, "", "tru", 0.5])
def test_other_words_are_no_truth_value(text):
    with pytest.raises(ValidationError):
        Memory(gradient_checkpointing=text)


@pytest.mark.parametrize("value", [20, "20", "20.0", " 20 ", 20.0, "2e1"])
def test_a_whole_number_may_be_quoted_and_have_a_point(value):
    assert Training(max_train_steps=value).max_train_steps == 20


@pytest.mark.parametrize("value", ["20.5", 20.5, "twenty", True, False, "nan", "inf", [20], -1, "-1"])
def test_what_is_no_whole_number_of_0_or_more_is_refused(value):
    with pytest.raises(ValidationError):
        Training(max_train_steps=value)


@pytest.mark.parametrize(("value", "meant"), [("4e-5", 4e-5), (1, 1.0), ("0.5", 0.5), (" 1E-3 ", 1e-3)])
def test_a_number_may_be_quoted(value, meant):
    assert Optim(learning_rate=value).learning_rate == meant


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("inf"), 0, "0", -1e-3, "fast", True, None])
def test_what_is_no_number_above_0_is_refused(value):
    with pytest.raises(ValidationError):
        Optim(learning_rate=value)


def test_texts_take_numbers_and_keep_their_case():
    assert Validation(validation_resolution=1024).validation_resolution == "1024"
    assert Validation(validation_prompt="A Cat ").validation_prompt == "A Cat "


def test_values_of_a_set_are_read_in_any_case_and_by_their_other_spellings():
    assert Memory(mixed_precision="BF16").mixed_precision == "bf16"
    assert Data(caption_strategy="instance_prompt").caption_strategy == "instanceprompt"
    assert Optim(lr_scheduler="cosine_with_warmup").lr_scheduler == "cosine"
    assert Optim(optimizer="AdamW_BF16").optimizer == "adamw_bf16"


def test_a_list_may_be_a_list_json_in_a_text_or_words_with_commas():
    for value in (["to_q", "to_k"], '["to_q", "to_k"]', "to_q, to_k"):
        assert Adapters(peft_lora_target_modules=value).peft_lora_target_modules == ["to_q", "to_k"]


def test_arguments_of_an_optimizer_may_be_an_object_or_a_text():
    assert Optim(optimizer_config={"eps": 1e-6}).optimizer_config == {"eps": 1e-6}
    assert Optim(optimizer_config='{"eps": 1e-6}').optimizer_config == {"eps": 1e-6}
    assert Optim(optimizer_config="eps=1e-6,amsgrad=true").optimizer_config == "eps=1e-6,amsgrad=true"


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")

    assert Training(output_dir="~/output").output_dir == Path("/home/somebody/output")


def test_an_empty_text_is_none_where_none_is_allowed_and_a_text_where_it_is_meant():
    assert Training(resume_from_checkpoint="").resume_from_checkpoint is None
    assert Validation(validation_negative_prompt="").validation_negative_prompt == ""


def test_no_shift_may_be_written_as_0():
    assert Diffusion(flow_schedule_shift=0).flow_schedule_shift == 1.0


def test_options_are_frozen_and_know_no_others():
    with pytest.raises(ValidationError):
        Training().seed = 3
    with pytest.raises(ValidationError):
        Training(sead=3)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Training, {"max_train_steps": 1, "num_train_epochs": 1}),
        (Data, {"maximum_image_size": 1024}),
        (Data, {"resolution": 1024, "resolution_type": "area"}),
        (Data, {"resolution": 1.0, "resolution_type": "pixel"}),
        (Diffusion, {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True}),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(section, values):
    with pytest.raises(ValidationError) as caught:
        section(**values)

    assert all(key in str(caught.value) for key in values if key != "learning_rate")
