"""Paths that are not there, and what they may have been meant to be."""

from __future__ import annotations

import pytest

from simpletuner.errors import ConfigError
from simpletuner.models.families.sdxl import StableDiffusionXL
from simpletuner.models.files import nearest_path, path_hint
from simpletuner.options.models import Models


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "models" / "sdxl-base").mkdir(parents=True)
    (tmp_path / "models" / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sdxl(location: str) -> StableDiffusionXL:
    return StableDiffusionXL(Models(model_family="sdxl", pretrained_model_name_or_path=location))


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("./modles/sdxl-base", "./models/sdxl-base"),
        ("models/sdlx-base", "models/sdxl-base"),
        ("modles/sdlx-base", "models/sdxl-base"),
        ("models/sdxl-base", None),
        ("stabilityai/sdxl-base", None),
        ("models/kolors", None),
        ("models/notes.txt/sdxl-base", None),
    ],
)
def test_the_nearest_spelling_is_that_of_each_part(asked, near):
    assert nearest_path(asked) == near


def test_an_absolute_path_and_one_of_the_home_are_followed(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))

    assert nearest_path(f"{here}/modles") == f"{here}/models"
    assert nearest_path("~/modles") == f"{here}/models"
    assert path_hint("./kolors") == "Check the path; it starts from the folder in which the command runs."


def test_a_misspelt_folder_is_refused_with_the_right_one_and_one_that_looks_like_a_hub_id_is_pointed_out():
    with pytest.raises(ConfigError) as refused:
        sdxl("./modles/sdxl-base").check_source()

    assert "./modles/sdxl-base is not a folder" in refused.value.message and refused.value.hint == "Did you mean ./models/sdxl-base?"
    notes = sdxl("modles/sdxl-base").notes()
    assert notes == ["modles/sdxl-base is taken for a repository on the hub, since there is no such folder; there is models/sdxl-base"]
