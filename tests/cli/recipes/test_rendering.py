"""The examples for released models: each is understood, has no setting without effect, and fits the card that it is written for."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from simpletuner.cli.choices import known_names
from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import Place, examples
from simpletuner.cli.recipes.pages import folders_of, readme
from simpletuner.cli.recipes.rendering import fit_of, kept, render, smallest_card
from simpletuner.cli.recipes.table import CARDS_GB, EMBEDDED, RECIPES, card_named
from simpletuner.cli.wizard.ending import check
from simpletuner.errors import ConfigError
from simpletuner.relaxed_json import parse_relaxed
from simpletuner.training.building import build_family
from simpletuner.training.plan import plan_run
from simpletuner.training.plan_pictures import largest_batch

NAMES = list(RECIPES)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder to work in that has every example's pictures, as far as a dry run looks."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        for folder in folders_of(name):
            Path(folder).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_what_a_dry_run_accepts_without_a_note(name, pictures):
    for card in (CARDS_GB[0], CARDS_GB[-1]):
        refused, notes = check(render(name, card).files)

        assert refused is None
        assert notes == []


def test_every_family_and_method_has_an_example():
    assert {recipe.family for recipe in RECIPES.values()} == set(known_names()["family"])
    assert {recipe.method for recipe in RECIPES.values()} == {"LoRA", "LoKr", "all weights", "subject", "style"}
    assert set(EMBEDDED) == set(examples())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_the_plans_fits_the_cards(name):
    for card in CARDS_GB:
        fit = fit_of(name, card)

        assert fit is not None
        assert fit.fits == (fit.card_bytes <= card * 1e9)
        assert fit.download_bytes > 1e9
    assert (smallest_card(name) or 99) <= 24


def test_the_table_has_no_example_that_is_gone():
    assert list(kept()) == NAMES


def test_a_file_says_the_reason_of_each_value_that_was_proposed():
    text = render("flux-lora", 8).files["config.json"]

    assert '"blocks_to_swap": ' in text and "blocks are copied to the card" in text
    assert '"learning_rate": 0.0001,  // usual for a LoRA with AdamW' in text
    assert '"lora_type": "standard",\n' in text, "what the example itself decides needs no reason"
    assert parse_relaxed(text, "config.json") == render("flux-lora", 8).settings


def test_a_subject_has_a_dataset_that_stays_as_it_is():
    datasets = json.loads(render("sdxl-subject").files["multidatabackend.json"])

    assert [entry.get("is_regularisation_data", False) for entry in datasets] == [False, True, False]
    assert datasets[0]["instance_prompt"] == "a photo of ohwx dog"


def test_a_style_puts_its_trigger_word_before_each_caption():
    pictures = json.loads(render("flux-style").files["multidatabackend.json"])[0]

    assert pictures["caption_strategy"] == "textfile"
    assert (pictures["instance_prompt"], pictures["prepend_instance_prompt"]) == ("ohwx style,", True)


def test_a_readme_names_its_folder_and_every_card():
    text = readme("sdxl-subject", 12, "config/mine")

    assert "simpletuner train --config config/mine/config.json" in text
    assert "datasets/dogs" in text and "no captions are needed" in text
    assert all(f"| {card} GB |" in text for card in CARDS_GB)


@pytest.mark.parametrize(("text", "card"), [("8", 8), ("12GB", 12), ("20GB", 16), ("80GB", 48), ("24GB", 24)])
def test_a_card_takes_the_largest_settings_that_fit_it(text, card):
    assert card_named(text) == card


@pytest.mark.parametrize("text", ["6GB", "big", ""])
def test_another_card_is_refused(text):
    with pytest.raises(ConfigError, match="--card"):
        card_named(text)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "sd1x-lora" else pytest.mark.slow) for name in NAMES if name != "sd1x-full"])
def test_the_plan_still_says_what_is_kept(name):
    for card in (8, 24) if name == "flux-lora" else (24,):
        with tempfile.TemporaryDirectory() as folder:
            for file, text in render(name, card).files.items():
                (Path(folder) / file).write_text(text.replace("{folder}", folder))
            config = read_options(Place(Path(folder) / "config.json"), []).config
            batch = largest_batch(config, build_family(config), {"model_family": config.models.model_family})
            plan = plan_run(config, batch.size, batch.count)

        assert plan.card_bytes == pytest.approx(fit_of(name, card).card_bytes, rel=0.02), "python tests/docs/card_table.py renews what is kept"
