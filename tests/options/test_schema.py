"""The JSON Schema of config.json."""

from __future__ import annotations

import json
import re

import pytest

from simpletuner.options.schema import DIALECT, NUMBER, schema
from simpletuner.options.train_config import declared

CHOICES = {"optimizer": {"lion": "Sign of momentum."}}


def test_it_describes_every_option_and_is_json():
    described = json.loads(json.dumps(schema(CHOICES)))

    assert described["$schema"] == DIALECT
    assert described["properties"].keys() == declared().keys()
    assert all(described["properties"][key]["description"] == option.help for key, option in declared().items())


def test_values_defaults_and_limits_are_those_of_the_declaration():
    properties = schema(CHOICES)["properties"]

    assert properties["learning_rate"]["default"] == 1e-4
    assert properties["learning_rate"]["exclusiveMinimum"] == 0
    assert properties["caption_dropout_probability"]["maximum"] == 1
    assert set(properties["model_type"]["enum"]) == {"full", "lora", None}
    assert {True, "false"} <= set(properties["use_ema"]["enum"])
    assert properties["optimizer"]["examples"] == ["lion"]
    assert properties["data_backend_config"]["default"] == "config/multidatabackend.json"
    assert "default" not in properties["model_family"]


@pytest.mark.parametrize("text", ["1", "-1", "4e-5", " 0.5 ", ".5", "20.0", ""])
def test_quoted_numbers_pass(text):
    assert re.search(NUMBER, text)


@pytest.mark.parametrize("text", ["a", "1a", "1e", "--1", "."])
def test_other_texts_are_no_numbers(text):
    assert not re.search(NUMBER, text)


@pytest.mark.parametrize(
    "key", ["_comment", "$schema", "--learning_rate", "validation_steps", "controlnet", "flux_guidance_mode", "validation_torch_compile"]
)
def test_comments_dashes_and_older_keys_are_allowed(key):
    assert any(re.search(pattern, key) for pattern in schema({})["patternProperties"])


@pytest.mark.parametrize("key", ["lerning_rate", "my_controlnet", "flux"])
def test_unknown_keys_are_marked(key):
    described = schema({})

    assert described["additionalProperties"] is False
    assert not any(re.search(pattern, key) for pattern in described["patternProperties"])
