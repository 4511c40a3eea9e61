"""Reading options from files, variables and words."""

from __future__ import annotations

import pytest

from simpletuner.errors import ConfigError
from simpletuner.options.sources import VARIABLES, read_environment, read_file, read_words
from simpletuner.options.train_config import declared


def values(settings):
    return {setting.key: setting.value for setting in settings}


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_keys_may_have_dashes_in_front_and_inside(tmp_path):
    settings, _ = read_file(write(tmp_path, "config.json", '{"--seed": 1, "learning-rate": "1e-4", "resolution": 512,}'), {})

    assert values(settings) == {"seed": 1, "learning_rate": "1e-4", "resolution": 512}
    assert {setting.origin for setting in settings} == {str(tmp_path / "config.json")}


def test_toml_is_read(tmp_path):
    settings, _ = read_file(write(tmp_path, "config.toml", 'seed = 1 # a comment\nmodel_family = "auraflow"\nuse_ema = true\n'), {})

    assert values(settings) == {"seed": 1, "model_family": "auraflow", "use_ema": True}


def test_broken_toml_is_named_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.toml is not TOML.*line 2"):
        read_file(write(tmp_path, "config.toml", "seed = 1\nmodel_family auraflow\n"), {})


def test_a_file_of_a_list_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no object of options"):
        read_file(write(tmp_path, "config.json", "[1]"), {})


def test_variables_are_read_as_a_shell_would(tmp_path):
    text = """
    # a comment
    export LEARNING_RATE=4e-5   # the rate
    MODEL_FAMILY='auraflow'
    export OUTPUT_DIR="${BASE}/models"
    export VALIDATION_PROMPT="a photo of a cat"
    export HF_HOME=/data/hf
    export TRAINER_EXTRA_ARGS="--flow_schedule_auto_shift --user_prompt_library=config/prompts.json \\
        --validation_guidance 3.5"
    """

    settings, others = read_file(write(tmp_path, "config.env", text), {"BASE": "/runs"})

    assert values(settings) == {
        "learning_rate": "4e-5",
        "model_family": "auraflow",
        "output_dir": "/runs/models",
        "validation_prompt": "a photo of a cat",
        "flow_schedule_auto_shift": "true",
        "user_prompt_library": "config/prompts.json",
        "validation_guidance": "3.5",
    }
    assert others == {"HF_HOME": "/data/hf"}
    assert settings[0].origin == f"{tmp_path / 'config.env'} LEARNING_RATE"


def test_a_variable_in_single_quotes_is_left_as_it_is(tmp_path):
    settings, _ = read_file(write(tmp_path, "config.env", "VALIDATION_PROMPT='a $5 note'\n"), {})

    assert values(settings) == {"validation_prompt": "a $5 note"}


def test_every_variable_with_a_name_of_its_own_reaches_its_option(tmp_path):
    text = "\n".join(f"export {name}=1" for name in VARIABLES)

    settings, others = read_file(write(tmp_path, "config.env", text), {})

    assert {setting.key for setting in settings} == set(VARIABLES.values())
    assert not others


def test_a_misspelled_or_older_variable_is_left_to_be_said_and_a_librarys_is_not(tmp_path):
    text = "export LERNING_RATE=1\nexport PUSH_TO_HUB=true\nexport CUDA_VISIBLE_DEVICES=0\nexport Mixed=1\n"

    settings, others = read_file(write(tmp_path, "config.env", text), {})

    assert values(settings) == {"lerning_rate": "1", "push_to_hub": "true"}
    assert others == {"CUDA_VISIBLE_DEVICES": "0", "Mixed": "1"}


def test_a_line_that_is_no_variable_is_named(tmp_path):
    with pytest.raises(ConfigError, match="line 2"):
        read_file(write(tmp_path, "config.env", "export SEED=1\nif true; then\n"), {})


def test_an_open_quote_is_named_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match="line 1"):
        read_file(write(tmp_path, "config.env", 'MODEL_FAMILY="auraflow\n'), {})


def test_a_file_that_a_config_names_may_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "lycoris.json").write_text("{}")
    (tmp_path / "here.json").write_text("[]")
    path = write(
        folder, "config.json", '{"lycoris_config": "lycoris.json", "data_backend_config": "here.json", "user_prompt_library": "nowhere.json"}'
    )

    settings, _ = read_file(path, {})

    assert values(settings) == {
        "lycoris_config": str(folder / "lycoris.json"),
        "data_backend_config": "here.json",
        "user_prompt_library": "nowhere.json",
    }


def test_environment_variables_count_with_the_prefix_or_by_a_name_of_several_words():
    settings = read_environment({"LEARNING_RATE": "1e-3", "SIMPLETUNER_SEED": "5", "SEED": "6", "VARIANT": "fp16", "PATH": "/bin", "HF_HOME": "x"})

    assert values(settings) == {"learning_rate": "1e-3", "seed": "5"}
    assert [setting.origin for setting in settings] == ["environment LEARNING_RATE", "environment SIMPLETUNER_SEED"]


@pytest.mark.parametrize("words", [["--learning_rate", "1e-4"], ["--learning_rate=1e-4"], ["--learning-rate", "1e-4"], ["learning_rate=1e-4"]])
def test_a_flag_may_be_written_in_four_ways(words):
    settings, rest = read_words(words)

    assert values(settings) == {"learning_rate": "1e-4"}
    assert settings[0].origin == "flag --learning_rate"
    assert not rest


def test_truth_values_may_stand_alone_and_be_denied():
    settings, _ = read_words(["--use_ema", "--gradient_checkpointing", "off", "--no-disable_benchmark", "--validation_disable=yes", "seed=3"])

    assert values(settings) == {
        "use_ema": "true",
        "gradient_checkpointing": "off",
        "disable_benchmark": "false",
        "validation_disable": "yes",
        "seed": "3",
    }


def test_a_value_may_begin_with_a_dash_or_hold_an_equals_sign():
    settings, _ = read_words(["--validation_negative_prompt", "-blurry", "--optimizer_config", "eps=1e-6,amsgrad=true"])

    assert values(settings) == {"validation_negative_prompt": "-blurry", "optimizer_config": "eps=1e-6,amsgrad=true"}


def test_every_option_can_be_given_as_a_flag():
    words = [f"--{key}=1" for key in declared()]

    assert values(read_words(words)[0]) == dict.fromkeys(declared(), "1")


def test_other_words_are_left_over():
    assert read_words(["train", "--seed", "1"])[1] == ["train"]
