"""Finding the config of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.cli import locate
from simpletuner.cli.locate import Place, find_config
from simpletuner.errors import ConfigError


def make(*paths):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")


def found(config=None, example=None, env=None, **environ):
    return str(find_config(config, example, env, environ).config)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    make("package/digits/config.json", "package/plain/config.json", "package/no_config/README.md")
    monkeypatch.setattr(locate, "EXAMPLES", tmp_path / "package")
    return tmp_path / "package"


def test_the_usual_places_are_tried_in_order():
    make("config.json", "config.toml", "config/config.json", "config/config.env")

    for expected in ("config.json", "config.toml", "config/config.json", "config/config.env"):
        assert found() == expected
        Path(expected).unlink()


def test_nothing_found_lists_what_was_tried_and_offers_the_example():
    with pytest.raises(ConfigError) as caught:
        found()

    assert all(path in caught.value.message for path in ("config.json", "config/config.toml", "config/config.env"))
    assert "--example" in str(caught.value.hint)


@pytest.mark.parametrize("asked", ["mine/config.json", "mine", "mine/config"])
def test_a_path_may_be_a_file_a_folder_or_lack_its_suffix(asked):
    make("mine/config.json", "config.json")

    assert found(config=asked) == "mine/config.json"
    assert found(CONFIG_PATH=asked) == "mine/config.json"


def test_an_environment_is_a_folder_in_config():
    make("config/mine/config.toml", "config/config.json")

    assert found(env="mine") == "config/mine/config.toml"
    assert found(ENV="mine") == "config/mine/config.toml"
    assert found(SIMPLETUNER_ENV="mine", ENV="other") == "config/mine/config.toml"
    assert found(ENV="default") == "config/config.json"


def test_an_environment_that_is_not_there_lists_what_was_tried():
    make("config/config.json")

    with pytest.raises(ConfigError, match="tried config/other/config"):
        found(env="other")


def test_a_shells_start_up_file_in_ENV_is_not_meant():
    make("config.json")

    assert found(ENV="/etc/shinit_v2") == "config.json"


def test_a_flag_goes_before_an_environment_variable():
    make("config/mine/config.json", "a.json")

    assert found(config="a.json", ENV="mine") == "a.json"
    assert found(env="mine", CONFIG_PATH="a.json") == "config/mine/config.json"


def test_an_example_comes_from_the_package(examples):
    make("config.json")

    assert find_config(None, "digits", None, {}) == Place(examples / "digits/config.json", examples / "digits")
    assert find_config(None, None, "examples/plain", {}).example == examples / "plain"
    assert list(locate.examples()) == ["digits", "plain"]


def test_an_unknown_example_offers_the_nearest(examples):
    with pytest.raises(ConfigError) as caught:
        find_config(None, "digitz", None, {})

    assert "'digits'" in str(caught.value.hint)


def test_two_ways_of_asking_exclude_each_other():
    with pytest.raises(ConfigError, match="one of them"):
        found(config="a", env="b")
