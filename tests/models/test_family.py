"""What holds for every family there is."""

from __future__ import annotations

import diffusers
import pytest

from simpletuner import plugins
from simpletuner.models.family import ModelFamily
from simpletuner.models.source import is_local
from simpletuner.options.models import Models
from simpletuner.options.train_config import SECTIONS, declared

FOLDER = "simpletuner.models.families"
FAMILIES = [plugins.load(FOLDER, name, ModelFamily) for name in plugins.names(FOLDER)]


@pytest.fixture(params=FAMILIES, ids=plugins.names(FOLDER))
def family(request) -> type[ModelFamily]:
    return request.param


def test_every_flavour_is_a_hub_id_that_a_run_would_take(family):
    name = family.__module__.rsplit(".", 1)[-1]

    for flavour, location in family.flavours.items():
        chosen = family(Models(model_family=name, model_flavour=flavour))
        assert chosen.source_name() == location and not is_local(location)
        assert chosen.text_tokens > 0 and chosen.alignment_px % 8 == 0


def test_every_default_is_an_option_with_a_value_that_it_accepts(family):
    for key, value in family.defaults.items():
        section = SECTIONS[declared()[key].section]
        required = {"model_family": "auraflow"} if section is Models else {}
        assert getattr(section(**required, **{key: value}), key) == value


def test_the_pipeline_exists_and_takes_the_parts(family):
    name = family.__module__.rsplit(".", 1)[-1]

    assert family.denoiser_folder in family.parts and "vae" in family.parts
    for flavour in family.flavours:
        pipeline = getattr(diffusers, family(Models(model_family=name, model_flavour=flavour)).pipeline_class)
        assert set(family.parts) <= set(pipeline.__init__.__annotations__)
