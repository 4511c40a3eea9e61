"""From what was set to a checked config: layers, sources, problems, notes."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.errors import ConfigError
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import declared

FAMILY = {"model_family": "auraflow"}


def family_defaults(name, flavour, location):
    if name != "auraflow":
        raise ConfigError(f"{name!r} is not among the families", hint="did you mean 'auraflow'?")
    if flavour not in (None, "pony"):
        raise ConfigError(f"auraflow has no flavour {flavour!r}", hint="Known flavours: pony.")
    return {"flow_schedule_shift": 1.73, "validation_guidance": 3.5}


def load(*layers, **keywords):
    """Load layers of (origin, values); a bare mapping is the file."""
    named = [layer if isinstance(layer, tuple) else ("config.json", layer) for layer in layers]
    given_settings = [Setting(key, value, origin) for origin, values in named for key, value in values.items()]
    return load_config(given_settings, family_defaults, **keywords)


def refusal(*layers, **keywords):
    with pytest.raises(ConfigError) as caught:
        load(*layers, **keywords)
    assert caught.value.hint
    return caught.value.message


def test_a_layer_wins_over_those_below_and_its_name_is_kept():
    loaded = load(
        {**FAMILY, "learning_rate": 1e-5, "seed": 1, "validation_guidance": 5},
        ("environment LEARNING_RATE", {"learning_rate": "2e-5"}),
        ("flag --seed", {"seed": "7"}),
    )

    assert loaded.config.optim.learning_rate == 2e-5
    assert loaded.origins["learning_rate"] == "environment LEARNING_RATE"
    assert loaded.config.training.seed == 7
    assert loaded.origins["seed"] == "flag --seed"
    assert loaded.config.validation.validation_guidance == 5
    assert loaded.origins["validation_guidance"] == "config.json"
    assert loaded.config.diffusion.flow_schedule_shift == 1.73
    assert loaded.origins["flow_schedule_shift"] == "family auraflow"
    assert loaded.origins["lora_rank"] == "default"
    assert loaded.origins.keys() == declared().keys()


def test_a_value_from_the_environment_is_said_aloud():
    loaded = load({**FAMILY, "learning_rate": "1e-5"}, ("environment LEARNING_RATE", {"learning_rate": "2e-5"}))

    assert loaded.notes == ("learning_rate '2e-5' is taken from environment LEARNING_RATE in place of '1e-5' from config.json",)


def test_a_flag_over_the_file_needs_no_word():
    assert load({**FAMILY, "seed": 1}, ("flag --seed", {"seed": 2})).notes == ()


def test_comments_and_null_and_empty_texts_are_passed_over():
    loaded = load({**FAMILY, "_comment": "mine", "$schema": "options.json", "learning_rate": None, "instance_prompt": "", "seed": " "})

    assert loaded.config.optim.learning_rate == 1e-4
    assert loaded.config.training.seed == 42
    assert loaded.origins["instance_prompt"] == "default"


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_resume_is_a_fresh_start(empty):
    loaded = load({**FAMILY, "resume_from_checkpoint": empty})

    assert loaded.config.training.resume_from_checkpoint is None
    assert loaded.origins["resume_from_checkpoint"] == "config.json"


def test_an_empty_negative_prompt_is_meant_and_null_is_not():
    assert load({**FAMILY, "validation_negative_prompt": ""}).config.validation.validation_negative_prompt == ""
    assert load({**FAMILY, "validation_negative_prompt": None}).config.validation.validation_negative_prompt == "blurry, cropped, ugly"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("validation_steps", "validation_step_interval"),
        ("checkpointing_steps", "checkpoint_step_interval"),
        ("save_total_limit", "checkpoints_total_limit"),
    ],
)
def test_an_older_spelling_is_read_and_named(old, new):
    loaded = load({**FAMILY, old: "7", "validation_prompt": "a"})

    assert loaded.config.value(new) == 7
    assert any(old in note and new in note for note in loaded.notes)


def test_use_gradient_checkpointing_is_gradient_checkpointing():
    assert load({**FAMILY, "use_gradient_checkpointing": "false"}).config.memory.gradient_checkpointing is False


@pytest.mark.parametrize(("written", "meant"), [(False, True), ("false", True), ("No", True), (0, True), ("true", False), ("on", False)])
def test_an_older_key_of_opposite_meaning_is_turned_around(written, meant):
    loaded = load({**FAMILY, "vae_cache_preprocess": written})

    assert loaded.config.data.vae_cache_ondemand is meant
    assert any("vae_cache_preprocess" in note and "vae_cache_ondemand" in note for note in loaded.notes)


def test_keys_that_are_gone_or_not_built_are_named_in_a_line_each():
    loaded = load({**FAMILY, "validation_torch_compile": "false", "controlnet": True, "publishing_config": "x.json", "post_upload_script": False})

    assert [note.split()[0] for note in loaded.notes] == ["validation_torch_compile", "controlnet", "publishing_config"]


def test_every_problem_is_said_at_once_with_key_value_source_rule_and_nearest_spelling():
    message = refusal(
        {**FAMILY, "lerning_rate": 1, "train_batch_size": "two", "lr_scheduler": "cosin", "max_train_steps": 5},
        ("flag --num_train_epochs", {"num_train_epochs": "3"}),
        choices={"optimizer": ["torch-adamw"]},
    )

    assert message.startswith("4 problems")
    assert "lerning_rate (config.json) is no option; did you mean learning_rate?" in message
    assert "train_batch_size 'two' (config.json) is not a whole number of 1 or more" in message
    assert "lr_scheduler 'cosin' (config.json) is not one of constant" in message
    assert "did you mean 'cosine'?" in message
    assert "max_train_steps = 5 from config.json, num_train_epochs = '3' from flag --num_train_epochs" in message


def test_one_problem_is_the_message():
    assert refusal({**FAMILY, "seed": "x"}) == "seed 'x' (config.json) is not a whole number of 0 or more"


def test_a_wrong_value_is_not_judged_together_with_others():
    message = refusal({**FAMILY, "max_train_steps": "many", "num_train_epochs": 2})

    assert "many" in message
    assert "both" not in message


def test_members_of_open_sets_are_checked():
    message = refusal({**FAMILY, "optimizer": "lyon"}, choices={"optimizer": ["lion", "torch-adamw"]})

    assert "'lyon'" in message
    assert "did you mean 'lion'?" in message


def test_each_of_several_trackers_is_checked():
    assert load({**FAMILY, "report_to": "jsonl, tensorboard"}, choices={"tracker": ["jsonl", "tensorboard"]})
    assert "'wandbb'" in refusal({**FAMILY, "report_to": "jsonl,wandbb"}, choices={"tracker": ["jsonl", "wandb"]})


def test_a_missing_family_and_other_problems_are_said_together():
    message = refusal({"seed": "x"})

    assert "model_family is not set" in message
    assert "seed" in message


def test_an_unknown_family_or_flavour_is_a_problem_like_any_other():
    assert "aurafow" in refusal({"model_family": "aurafow", "seed": "x"})
    assert "no flavour 'v9'" in refusal({**FAMILY, "model_flavour": "v9"})


def test_the_family_is_asked_in_lower_case():
    assert load({"model_family": "AuraFlow", "model_flavour": "Pony"}).config.models.model_flavour == "pony"


def test_rules_between_sections_are_held():
    message = refusal({**FAMILY, "model_type": "full", "base_model_precision": "int8-quanto"})

    assert "model_type" in message
    assert "base_model_precision" in message


def test_variables_are_put_into_texts_lists_and_objects():
    loaded = load(
        {
            **FAMILY,
            "output_dir": "{env:RUNS}/a",
            "pretrained_model_name_or_path": "{example}/model",
            "peft_lora_target_modules": ["{env:RUNS}"],
            "validation_prompt": "a {cat}",
        },
        variables={"example": "/package/digits"},
        environ={"RUNS": "/runs"},
    )

    assert str(loaded.config.training.output_dir) == "/runs/a"
    assert loaded.config.models.pretrained_model_name_or_path == "/package/digits/model"
    assert loaded.config.adapters.peft_lora_target_modules == ["/runs"]
    assert loaded.config.validation.validation_prompt == "a {cat}"


def test_a_variable_that_is_not_set_is_a_problem():
    assert "environment variable RUNS" in refusal({**FAMILY, "output_dir": "{env:RUNS}/a"}, environ={})


def test_a_warm_up_is_honoured_where_the_schedule_has_none():
    loaded = load({**FAMILY, "lr_scheduler": "constant", "lr_warmup_steps": 100})

    assert loaded.config.optim.lr_scheduler == "constant_with_warmup"
    assert "lr_warmup_steps" in loaded.origins["lr_scheduler"]
    assert any("constant_with_warmup" in note for note in loaded.notes)


def test_without_steps_and_epochs_neither_is_set():
    loaded = load(FAMILY)

    assert loaded.config.training.num_train_epochs is None
    assert loaded.config.training.max_train_steps == 0


def value_of(option):
    """Values that an option takes, by its declaration."""
    if option.choices:
        return st.sampled_from(option.choices)
    low = option.limits.get("gt", option.limits.get("ge", 0))
    high = option.limits.get("lt", option.limits.get("le", max(low, 1) * 8))
    if option.kind == "bool":
        return st.booleans()
    if option.kind == "int":
        return st.integers(int(low), int(high))
    if option.kind == "float":
        return st.floats(low, high, exclude_min="gt" in option.limits, exclude_max="lt" in option.limits, width=32)
    if option.kind == "numbers":
        return st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=3)
    if option.kind == "list":
        return st.lists(st.from_regex(r"[a-z_.0-9]+", fullmatch=True), min_size=1, max_size=3)
    if option.kind == "object":
        return st.dictionaries(st.sampled_from(["eps", "amsgrad"]), st.booleans(), min_size=1)
    return st.from_regex(r"[a-z][a-z0-9/_.-]{0,8}", fullmatch=True)


# Left out: options that other options restrict, and the family, which decides the rest.
RESTRICTED = {
    *("model_family", "model_flavour", "resolution", "resolution_type", "maximum_image_size", "target_downsample_size", "minimum_image_size"),
    *("max_train_steps", "num_train_epochs", "lr_end", "learning_rate", "lr_warmup_steps", "lr_scheduler"),
    *("flow_custom_timesteps", "flux_fast_schedule", "refiner_training", "distilled_guidance_min", "inference_scheduler_timestep_spacing"),
    *("flow_use_uniform_schedule", "flow_use_beta_schedule", "model_type", "timestep_bias_begin", "timestep_bias_end", "base_model_precision"),
    "train_text_encoder",
    *("webhook_config", "hub_model_id", "validation_guidance_skip_layers", "activation_memory_budget", "dynamo_mode"),
    "input_perturbation",
    "base_model_default_dtype",
    "gradient_checkpointing_interval",
    *("blocks_to_swap", "max_resident_weights", "enable_group_offload"),
}
FREE = {key: option for key, option in declared().items() if key not in RESTRICTED}
CALM = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no fault of the loader's."""
CONFIGS = st.fixed_dictionaries({}, optional={key: value_of(option) for key, option in FREE.items()})


@CALM
@given(CONFIGS)
def test_what_a_config_says_of_itself_loads_as_the_same_config(values):
    config = load({**FAMILY, **values}).config

    assert load(json.loads(json.dumps(config.flat()))).config == config


@CALM
@given(CONFIGS)
def test_quoted_values_mean_what_plain_ones_do(values):
    quoted = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    assert load({**FAMILY, **quoted}).config == load({**FAMILY, **values}).config
