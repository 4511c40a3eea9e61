"""What a family, a flavour and a location prefer, and what has no effect in them."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.cli.choices import family_defaults, idle_of, known_names
from simpletuner.options.load import Loaded, load_config
from simpletuner.options.sources import Setting


def load(**options: Any) -> Loaded:
    settings = [Setting(key, value, "config.json") for key, value in {"validation_prompt": "a cat", **options}.items()]
    return load_config(settings, family_defaults, idle_of=idle_of, choices=known_names())


@pytest.mark.parametrize(
    ("family", "flavour", "guidance", "steps"),
    [
        ("flux", "schnell", 0, 4),
        ("flux", "dev", 3.5, 30),
        ("flux2", "klein-4b-distilled", 1, 4),
        ("flux2", "klein-4b", 4, 30),
        ("z_image", "turbo", 0, 9),
        ("z_image", "base", 4, 30),
        ("chroma", "flash", 1, 16),
    ],
)
def test_pictures_of_a_distilled_flavour_are_made_in_few_steps_unless_it_is_said_otherwise(family, flavour, guidance, steps):
    loaded = load(model_family=family, model_flavour=flavour)

    options = loaded.config.validation
    assert (options.validation_guidance, options.validation_num_inference_steps) == (guidance, steps)
    assert loaded.origins["validation_guidance"] == f"family {family}"
    own = load(model_family=family, model_flavour=flavour, validation_guidance=2, validation_num_inference_steps=12).config.validation
    assert (own.validation_guidance, own.validation_num_inference_steps) == (2, 12)


def test_a_flavour_is_known_by_its_hub_id_too_and_no_other_model_is_taken_for_it():
    def steps(**options: Any) -> int:
        return load(model_family="z_image", **options).config.validation.validation_num_inference_steps

    assert steps(pretrained_model_name_or_path="Tongyi-MAI/Z-Image-Turbo") == 9
    assert steps(pretrained_model_name_or_path="mine/z-image") == 30
    assert steps(pretrained_model_name_or_path="mine/turbo-again", model_flavour="turbo") == 9


def no_effect(**options: Any) -> list[str]:
    return [note.split(" ha")[0] for note in load(**options).notes if "no effect" in note]


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"model_family": "flux", "model_flavour": "schnell", "distilled_guidance": 3.5}, ["distilled_guidance"]),
        ({"model_family": "flux", "model_flavour": "dev", "distilled_guidance": 3.5}, []),
        ({"model_family": "flux", "flux_attention_masked_training": True}, []),
        ({"model_family": "sd3", "flux_attention_masked_training": True}, ["flux_attention_masked_training"]),
        ({"model_family": "flux", "validation_guidance_real": 4.0, "validation_negative_prompt": "ugly"}, []),
        ({"model_family": "flux", "validation_negative_prompt": "ugly"}, ["validation_negative_prompt"]),
        ({"model_family": "flux", "model_flavour": "libreflux", "validation_negative_prompt": "ugly"}, []),
        ({"model_family": "flux2", "validation_guidance_real": 4.0}, []),
        ({"model_family": "flux2", "model_flavour": "dev", "validation_guidance_real": 4.0}, ["validation_guidance_real"]),
        ({"model_family": "sdxl", "validation_guidance_real": 4.0}, ["validation_guidance_real"]),
    ],
)
def test_guidance_that_a_model_does_not_take_is_said(options, idle):
    assert no_effect(**options) == idle
