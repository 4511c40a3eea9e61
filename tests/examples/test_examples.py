"""The embedded examples as they are shipped: their settings are understood, their files are whole and small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import examples, find_config
from simpletuner.relaxed_json import load_relaxed

LARGEST_BYTES = 20_000_000
DIGITS = examples()["digits"]
PICTURES = sorted((DIGITS / "images").rglob("*.png"))
OURS = [name for name in examples() if not name.startswith("text-to-image")]
"""The others are recipes of diffusers, see test_text_to_image.py."""


@pytest.mark.parametrize("name", OURS)
def test_an_examples_settings_are_understood_and_all_have_an_effect(name):
    loaded = read_options(find_config(None, name, None, {}), [])

    assert loaded.config.models.model_family == "auraflow"
    assert not loaded.notes


@pytest.mark.parametrize("name", OURS)
def test_an_example_names_files_that_are_there(name):
    config = read_options(find_config(None, name, None, {}), []).config

    assert Path(config.data.data_backend_config).is_file()
    assert len(load_relaxed(config.validation.user_prompt_library)) > 3


def test_the_digits_example_is_small():
    assert sum(path.stat().st_size for path in DIGITS.rglob("*") if path.is_file()) < LARGEST_BYTES


def test_every_picture_is_64_px_square_and_has_its_captions():
    assert len(PICTURES) == 120
    for path in PICTURES:
        assert Image.open(path).size == (64, 64)
        captions = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert len(captions) == 3
        assert all(("neon" in caption) == (path.parent.name == "neon") for caption in captions)


def test_the_digits_model_draws_with_plain_diffusers():
    from diffusers import AuraFlowPipeline

    pipeline = AuraFlowPipeline.from_pretrained(DIGITS / "model")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a handwritten seven", width=64, height=64, num_inference_steps=2, max_sequence_length=16).images[0]

    assert image.size == (64, 64)
    assert pipeline.transformer.num_parameters() < 6_000_000


def test_every_caption_and_prompt_fits_the_text_encoder():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(DIGITS / "model/tokenizer")
    captions = [caption for path in PICTURES for caption in path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()]
    prompts = load_relaxed(DIGITS / "user_prompt_library.json").values()

    for text in {*captions, *prompts}:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= 16
        assert tokenizer.tokenize(text) == text.split(), "every word should be known as a whole"


def test_the_model_names_no_folder_of_the_machine_it_was_made_on():
    for path in (DIGITS / "model").rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path
