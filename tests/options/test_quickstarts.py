"""Configs as users of the quickstarts have them load as they stand."""

from __future__ import annotations

import json
import re

import pytest

from simpletuner.errors import ConfigError
from simpletuner.options.load import load_config
from simpletuner.options.schema import schema
from simpletuner.options.sources import read_file

AURAFLOW = """{
    "validation_torch_compile": "false",
    "validation_step_interval": 200,
    "validation_seed": 42,
    "validation_resolution": "1024x1024",
    "validation_prompt": "A photo-realistic image of a cat",
    "validation_num_inference_steps": "20",
    "validation_guidance": 2.0,
    "validation_guidance_rescale": "0.0",
    "vae_cache_ondemand": true,
    "vae_batch_size": 1,
    "train_batch_size": 1,
    "tracker_run_name": "eval_loss_test1",
    "seed": 42,
    "resume_from_checkpoint": "latest",
    "resolution": 1024,
    "resolution_type": "pixel_area",
    "report_to": "tensorboard",
    "output_dir": "output/models-auraflow",
    "optimizer": "optimi-lion",
    "num_train_epochs": 0,
    "num_eval_images": 1,
    "model_type": "lora",
    "model_family": "auraflow",
    "mixed_precision": "bf16",
    "minimum_image_size": 0,
    "max_train_steps": 10000,
    "max_grad_norm": 0.01,
    "lycoris_config": "config/lycoris_config.json",
    "lr_warmup_steps": 100,
    "lr_scheduler": "constant",
    "lora_type": "lycoris",
    "learning_rate": "4e-5",
    "gradient_checkpointing": "true",
    "grad_clip_method": "value",
    "eval_steps_interval": 100,
    "disable_benchmark": false,
    "data_backend_config": "config/auraflow/multidatabackend.json",
    "checkpoints_total_limit": 5,
    "checkpoint_step_interval": 500,
    "caption_dropout_probability": 0.0,
    "base_model_precision": "int8-quanto",
    "aspect_bucket_rounding": 2
}"""
SDXL = """{
  "model_type": "lora",
  "model_family": "sdxl",
  "model_flavour": "base-1.0",
  "output_dir": "/home/user/output/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.4,
  "use_gradient_checkpointing": true,
  "learning_rate": 1e-4,
  "base_model_precision": "int8-quanto",
  "text_encoder_1_precision": "no_change",
  "text_encoder_2_precision": "no_change",
  "optimizer": "optimi-lion"
}"""
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
    return load_config(settings, lambda name, flavour: {})


def test_auraflows_quickstart_means_what_it_says(tmp_path):
    loaded = load(tmp_path, AURAFLOW)

    values = loaded.config.flat()
    assert {key: values[key] for key in MEANT} == MEANT


def test_auraflows_quickstart_is_told_what_has_no_effect_and_no_more(tmp_path):
    notes = load(tmp_path, AURAFLOW).notes

    named = [note.split()[0] for note in notes]
    assert named == ["validation_torch_compile", "num_eval_images", "eval_steps_interval", "lr_scheduler"]


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
