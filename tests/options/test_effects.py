"""Options that will do nothing are named, if somebody set them."""

from __future__ import annotations

import pytest

from simpletuner.options.effects import IDLE, without_effect
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import declared


def notes(**values):
    settings = [Setting(key, value, "config.json") for key, value in {"model_family": "auraflow", **values}.items()]
    return load_config(settings, lambda name, flavour, location: {}).notes


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"lora_type": "lycoris", "lora_rank": 16}, "lora_rank"),
        ({"lora_type": "standard", "lycoris_config": "a.json"}, "lycoris_config"),
        ({"model_type": "full", "lora_rank": 4}, "lora_rank"),
        ({"flow_sigmoid_scale": 2, "flow_use_uniform_schedule": True}, "flow_sigmoid_scale"),
        ({"flow_sigmoid_scale": 2, "flow_use_beta_schedule": True}, "flow_sigmoid_scale"),
        ({"flow_beta_schedule_alpha": 3}, "flow_beta_schedule_alpha"),
        ({"flow_schedule_shift": 3, "flow_schedule_auto_shift": True}, "flow_schedule_shift"),
        ({"huber_c": 0.2}, "huber_c"),
        ({"gradient_checkpointing": False, "gradient_checkpointing_backend": "unsloth"}, "gradient_checkpointing_backend"),
        ({"gradient_checkpointing_interval": 4}, "gradient_checkpointing_interval"),
        ({"gradient_checkpointing_offload_bytes": 1000}, "gradient_checkpointing_offload_bytes"),
        ({"attention_mechanism": "xformers", "sageattention_usage": "training"}, "sageattention_usage"),
        ({"huber_schedule": "constant"}, "huber_schedule"),
        ({"flow_schedule_shift": 3, "flow_custom_timesteps": [500, 1000]}, "flow_schedule_shift"),
        ({"distilled_guidance_max": 5}, "distilled_guidance_max"),
        ({"scheduled_sampling_probability": 0.5}, "scheduled_sampling_probability"),
        ({"scheduled_sampling_max_step_offset": 5}, "scheduled_sampling_max_step_offset"),
        (
            {"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_probability": 0.5, "scheduled_sampling_ramp_steps": 9},
            "scheduled_sampling_prob",
        ),
        ({"diff2flow_enabled": True, "model_family": "sdxl"}, "diff2flow_enabled"),
        ({"diff2flow_loss": True, "model_family": "sdxl"}, "diff2flow_loss"),
        ({"snr_weight": 2, "model_family": "sdxl"}, "snr_weight"),
        ({"refiner_training_strength": 0.3, "model_family": "sdxl"}, "refiner_training_strength"),
        ({"grad_clip_method": "value", "max_grad_norm": 0}, "grad_clip_method"),
        ({"vae_cache_ondemand": True, "vae_cache_disable": True}, "vae_cache_ondemand"),
        ({"target_downsample_size": 1024}, "target_downsample_size"),
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"validation_guidance": 3}, "validation_guidance"),
        ({"assistant_lora_strength": 0.5, "disable_assistant_lora": True}, "assistant_lora_strength"),
        ({"validation_prompt": "a", "validation_guidance": 0, "validation_negative_prompt": "b"}, "validation_negative_prompt"),
        ({"validation_prompt": "a", "validation_disable": True}, "validation_prompt"),
        ({"tracker_run_name": "a"}, "tracker_run_name"),
        ({"webhook_config": {"webhook_type": "raw", "callback_url": "http://h"}, "logging_dir": "a"}, "logging_dir"),
        ({"base_model_default_dtype": "bf16"}, "base_model_default_dtype"),
        ({"optimizer_release_gradients": True}, "optimizer_release_gradients"),
        ({"activation_memory_budget": 0.5}, "activation_memory_budget"),
    ],
)
def test_an_option_without_effect_is_said_aloud(values, idle):
    said = [note for note in notes(**values) if "no effect" in note]

    assert len(said) == 1, said
    assert idle in said[0].split(" ha")[0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_type": "lycoris", "lycoris_config": "a.json"},
        {"lora_rank": 8},
        {"flow_sigmoid_scale": 2},
        {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3},
        {"flow_schedule_shift": 3},
        {"loss_type": "huber", "huber_c": 0.2},
        {"use_ema": True, "ema_decay": 0.9},
        {"model_type": "full", "base_model_default_dtype": "fp32"},
        {"validation_prompt": "a", "validation_guidance": 3},
        {"report_to": "jsonl", "tracker_run_name": "a"},
        {"webhook_config": {"webhook_type": "raw", "callback_url": "http://h"}, "tracker_run_name": "a"},
        {"hub_model_id": "title-of-the-page"},
        {"use_dora": False, "lora_type": "lycoris"},
    ],
)
def test_an_option_with_effect_or_switched_off_needs_no_word(values):
    assert notes(**values) == ()


def test_a_family_that_is_told_no_guidance_says_so_of_all_options_of_it():
    settings = {"model_family": "sd3", "distilled_guidance_mode": "random-range", "flux_guidance_max": 5}
    config = load_config([Setting(key, value, "config.json") for key, value in settings.items()], lambda name, flavour, location: {}).config

    said = without_effect(config, ["distilled_guidance_mode", "distilled_guidance_max"], {"distilled_guidance": "it is told none"})

    assert said == ["distilled_guidance_mode, distilled_guidance_max have no effect: it is told none"]


def test_a_default_needs_no_word():
    config = load_config([Setting("model_family", "auraflow", "config.json")], lambda name, flavour, location: {}).config

    assert without_effect(config, []) == []


def test_every_option_that_may_be_idle_exists():
    assert {key for idle in IDLE for key in idle.keys.split()} <= declared().keys()
