"""Networks from configurations alone."""

from __future__ import annotations

import shutil

import pytest
import torch

from simpletuner.cli.choices import family_of
from simpletuner.errors import SimpleTunerError
from simpletuner.models import blueprint
from simpletuner.options.models import Models
from tests.builders.auraflow import build_tiny_auraflow

PUBLISHED = {
    ("auraflow", "v0.3"): 6.86e9,
    ("sdxl", "base-1.0"): 2.567e9,
    ("sd1x", "1.5"): 859.5e6,
    ("sd2x", "2.1"): 865.9e6,
    ("sd3", "large"): 8.06e9,
    ("sd3", "medium"): 2.24e9,
    ("flux", "dev"): 11.9e9,
    ("chroma", "hd"): 8.9e9,
    ("flux2", "dev"): 32.2e9,
    ("flux2", "klein-4b"): 3.88e9,
    ("flux2", "klein-9b"): 9.08e9,
    ("qwen_image", "v1.0"): 20.43e9,
    ("z_image", "base"): 6.15e9,
    ("lumina2", "2.0"): 2.61e9,
    ("pixart", "600m-1024"): 610.9e6,
    ("sana", "sana1.5-1.6b-1024"): 1.6e9,
}
"""Parameters of denoisers, as their makers or their files say."""


def family(name: str, flavour: str | None = None, **options: str):
    return family_of(name)(Models(model_family=name, model_flavour=flavour, **options))


@pytest.mark.parametrize(("name", "flavour"), PUBLISHED, ids=lambda value: value)
def test_a_released_denoiser_has_as_many_parameters_as_the_published_one(tmp_path, name, flavour):
    plan, notes = blueprint.blueprint(family(name, flavour), tmp_path)

    count = sum(parameter.numel() for parameter in plan.empty_denoiser().parameters())

    assert count == pytest.approx(PUBLISHED[name, flavour], rel=0.005)
    assert notes and "not on this machine" in notes[0]
    assert plan.starts_random and plan.text_tokens == family(name, flavour).text_tokens


def test_every_family_has_facts_of_its_first_flavour(tmp_path):
    from simpletuner import plugins

    for name in plugins.names("simpletuner.models.families"):
        plan, _ = blueprint.blueprint(family(name), tmp_path / name)
        with torch.device("meta"):
            assert blueprint.text_networks(plan) and blueprint.vae_network(plan), name


def test_a_model_that_is_here_is_taken_as_it_is(tmp_path):
    here = family("auraflow", pretrained_model_name_or_path=str(build_tiny_auraflow(tmp_path / "model")))

    plan, notes = blueprint.blueprint(here, tmp_path / "plan")

    assert notes == []
    assert {name: p.shape for name, p in plan.empty_denoiser().named_parameters()} == {
        name: p.shape for name, p in here.load_denoiser(torch.float32, 0).named_parameters()
    }


def test_a_model_of_which_nothing_is_known_is_refused_by_its_part(tmp_path):
    model = build_tiny_auraflow(tmp_path / "model")
    shutil.rmtree(model / "vae")

    with pytest.raises(SimpleTunerError, match=r"nothing on this machine tells what the vae of .*model is"):
        blueprint.blueprint(family("auraflow", pretrained_model_name_or_path=str(model)), tmp_path / "plan")
