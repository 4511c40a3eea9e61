"""Reading the user's LyCORIS file."""

from __future__ import annotations

import pytest

from simpletuner.adapters.lycoris_file import parse, read_lycoris
from simpletuner.errors import ConfigError

USERS = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 10,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 10}, "FeedForward": {"factor": 4}},
    },
}


def test_a_users_file_is_typed_and_each_target_has_a_whole_recipe():
    read = parse(USERS, "lycoris_config.json")

    assert read.modules == ("Attention", "FeedForward")
    assert read.recipe.settings == {"linear_dim": 10000, "linear_alpha": 1.0, "factor": 10, "bypass_mode": True}
    assert read.module_recipes["FeedForward"].settings == {**read.recipe.settings, "factor": 4}


def test_a_fractional_alpha_stays_fractional_and_quoted_numbers_are_numbers():
    read = parse({"algo": "lora", "linear_dim": "16", "linear_alpha": "0.5", "use_tucker": "true"}, "a file")

    assert read.recipe.settings["linear_alpha"] == 0.5
    assert read.recipe.settings["linear_dim"] == 16
    assert read.recipe.settings["use_tucker"] is True


def test_the_file_may_have_comments_and_trailing_commas(tmp_path):
    path = tmp_path / "lycoris.json"
    path.write_text('{"_comment": "mine", "algo": "lokr", "factor": 8,}')

    assert read_lycoris(path).recipe.settings["factor"] == 8


def test_a_path_that_is_not_there_is_refused_but_the_default_one_need_not_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match="does not exist"):
        read_lycoris("config/mine.json")
    assert read_lycoris(None).recipe.settings["factor"] == 16
    (tmp_path / "config").mkdir()
    (tmp_path / "config/lycoris_config.json").write_text('{"algo": "loha", "linear_dim": 4}')
    assert read_lycoris(None).recipe.algo == "loha"


def test_every_problem_is_said_at_once_with_the_nearest_spelling():
    content = {
        "algo": "lokr",
        "linear_dimm": 4,
        "linear_alpha": "much",
        "dropout": 1.5,
        "multiplier": 0.5,
        "apply_preset": {"target_modules": ["Attention"], "module_algo_map": {"FeedForward": {"facto": 4}}},
    }

    with pytest.raises(ConfigError) as error:
        parse(content, "config/lycoris_config.json")

    said = error.value.message
    assert said.startswith("config/lycoris_config.json")
    assert "linear_dimm: unknown; did you mean 'linear_dim'?" in said
    assert "linear_alpha: 'much'; it must be a number" in said
    assert "dropout: 1.5" in said
    assert "multiplier: 0.5" in said
    assert "apply_preset.target_modules: unknown; did you mean 'target_module'?" in said
    assert "module_algo_map.FeedForward.facto: unknown; did you mean 'factor'?" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"algo": "lokkr"}, "did you mean 'lokr'"),
        ({"algo": "dylora", "linear_dim": 6}, "multiple of block_size 4"),
        ({"use_scalar": True}, "continued exactly"),
        ({"algo": "lokr", "unbalanced_factorization": True}, "cannot load"),
        ({"algo": "lokr", "bypass_mode": True, "weight_decompose": True}, "choose one"),
        ({"algo": "lora", "linear_dim": 10000}, "lokr alone"),
        ({"algo": "lora", "linear_dim": 0}, "more than 0"),
        ({"algo": "lora", "linear_dim": 4.5}, "whole number"),
        ({"algo": "lokr", "factor": 0}, "from 1"),
        ({"apply_preset": {"lora_prefix": "lora"}}, "'lycoris'"),
        ({"apply_preset": {"target_module": "Attention"}}, "a list of names"),
        ({"apply_preset": {"target_module": [3]}}, "a list of names"),
        ({"apply_preset": {"module_algo_map": {"Attention": {"dropout": 0.1}}}}, "top of the file"),
        ([], "not an object"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(content, said):
    with pytest.raises(ConfigError) as error:
        parse(content, "a file")

    assert said in error.value.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"algo": "loha", "linear_dim": 4, "factor": 8}, "factor has no effect with algo loha"),
        ({"algo": "lokr", "preset": "full"}, "preset has no effect"),
        ({"algo": "lokr", "rank_dropout": 0.1}, "rank_dropout has no effect"),
        ({"algo": "lokr", "apply_preset": {"unet_target_module": ["Attention"]}}, "use target_module"),
        ({"algo": "lokr", "apply_preset": {"module_algo_map": {"A": {"algo": "lora", "dim": 4, "factor": 2}}}}, "module_algo_map.A.factor"),
    ],
)
def test_what_has_no_effect_is_said(content, said):
    assert any(said in note for note in parse(content, "a file").notes)


def test_decomposed_weights_are_not_factored_and_other_forms_are_unless_the_file_says_so():
    assert parse({"algo": "lokr"}, "a file").recipe.is_factored
    assert not parse({"algo": "lokr", "bypass_mode": False}, "a file").recipe.is_factored
    assert not parse({"algo": "lokr", "dora_wd": True}, "a file").recipe.is_factored
    assert not parse({"algo": "diag-oft", "linear_dim": 4}, "a file").recipe.is_factored


def test_a_target_may_have_another_algorithm_of_its_own():
    read = parse({"algo": "lokr", "factor": 4, "apply_preset": {"module_algo_map": {"FeedForward": {"algo": "lora", "dim": 8}}}}, "a file")

    own = read.module_recipes["FeedForward"]
    assert own.algo == "lora"
    assert own.settings["linear_dim"] == 8
    assert "factor" not in own.settings
