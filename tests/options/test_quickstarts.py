"""Configs as users of the quickstarts have them load as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simpletuner.errors import ConfigError
from simpletuner.options.load import load_config
from simpletuner.options.schema import schema
from simpletuner.options.sources import read_file

QUICKSTARTS = Path(__file__).parent / "quickstarts"
AURAFLOW = (QUICKSTARTS / "auraflow/config.json").read_text(encoding="utf-8")
SDXL = (QUICKSTARTS / "sdxl/config.json").read_text(encoding="utf-8")
MEANT = {
    "validation_num_inference_steps": 20,
    "vae_cache_ondemand": True,
    "resolution": 1024.0,
    "num_train_epochs": 0,
    "max_train_steps": 10000,
    "max_grad_norm": 0.01,
    "learning_rate": 4e-5,
    "gradient_checkpointing": True,
    "disable_benchmark": False,
    "optimizer": "optimi-lion",
    "base_model_precision": "int8-quanto",
    "lycoris_config": "config/lycoris_config.json",
}


def load(folder, text):
    path = folder / "config.json"
    path.write_text(text, encoding="utf-8")
    settings, _ = read_file(path, {})
    return load_config(settings, lambda name, flavour, location: {})


def test_auraflows_quickstart_means_what_it_says(tmp_path):
    loaded = load(tmp_path, AURAFLOW)

    values = loaded.config.flat()
    assert {key: values[key] for key in MEANT} == MEANT


def test_auraflows_quickstart_is_told_what_has_no_effect_and_no_more(tmp_path):
    notes = load(tmp_path, AURAFLOW).notes

    named = [note.split()[0] for note in notes]
    assert named == ["validation_torch_compile", "lr_scheduler"]


def test_sdxls_quickstart_means_what_it_says(tmp_path):
    loaded = load(tmp_path, SDXL)

    assert loaded.config.models.model_flavour == "base-1.0"
    assert loaded.config.memory.gradient_checkpointing is True
    assert loaded.config.validation.validation_guidance == 3.4
    assert any("validation_resolution, validation_guidance have no effect" in note for note in loaded.notes)


@pytest.mark.parametrize("text", [AURAFLOW, SDXL])
def test_the_schema_knows_every_key_of_the_quickstarts(text):
    described = schema({})
    patterns = list(described["patternProperties"])

    for key in json.loads(text):
        assert key in described["properties"] or any(re.search(pattern, key) for pattern in patterns), key


@pytest.mark.parametrize("extra", ["use_ema: yes, please", '"use_ema": "maybe"'])
def test_a_quickstart_with_a_mistake_is_refused(tmp_path, extra):
    with pytest.raises(ConfigError):
        load(tmp_path, AURAFLOW.replace("{", "{" + extra + ",", 1))
