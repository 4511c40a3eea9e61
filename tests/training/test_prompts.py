"""Sizes of pictures, as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner.errors import ConfigError
from simpletuner.options.validation import Validation
from simpletuner.training.prompts import LIBRARY, file_name_of, named_prompts, parse_size, pictures, read_library
from simpletuner.types import Size

SIZES = {"1024x768": Size(1024, 768), "1024": Size(1024, 1024), "1.0": Size(1024, 1024), "70x64": Size(64, 64), "5": Size(64, 64)}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size_is_edges_or_megapixels_and_fits_the_model(text, size):
    assert parse_size(text, 64) == size


@pytest.mark.parametrize("text", ["0", "0x64", "64x0", "64 by 64", "-64", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not a size|has no pixels"):
        parse_size(text, 64)


def library(folder: Path, content: object) -> Path:
    path = folder / "library.json"
    path.write_text(json.dumps(content))
    return path


def test_a_library_may_say_what_is_different_for_a_prompt(tmp_path):
    own = {"prompt": "a fox", "resolution": "64x32", "seed": 9, "num_images": 2, "guidance": 3, "negative_prompt": ""}
    options = Validation(
        user_prompt_library=library(tmp_path, {"plain": "a cat", "own": own}), validation_resolution="32", validation_unconditional=True
    )

    shown = pictures(options, 7, SimpleNamespace(alignment_px=8, check_size=lambda size: None))

    assert [one.file_stem for one in shown] == ["plain_7_32x32", "own_9_64x32", "own_10_64x32", "unconditional_7_32x32"]
    assert shown[1].options(options).validation_guidance == 3 and shown[0].options(options).validation_guidance is None
    assert (shown[1].negative_prompt, shown[0].negative_prompt, shown[3].prompt) == ("", options.validation_negative_prompt, "")


def test_all_that_is_wrong_in_a_library_is_said_at_once(tmp_path):
    wrong = {"a": {"prompt": "a", "guidence": 3}, "b": {"prompt": "b", "num_inference_steps": 0}, "c": {}, "d": 5}

    with pytest.raises(ConfigError) as caught:
        read_library(library(tmp_path, wrong))

    said = caught.value.message
    assert "did you mean 'guidance'" in said and "'b' says num_inference_steps 0, which is not a whole number of 1 or more" in said
    assert "'c' has no prompt" in said and "'d' has no prompt" in said


def test_the_library_that_comes_along_has_names_fit_for_files():
    found = named_prompts(Validation(validation_prompt_library=True))

    assert list(found) == list(LIBRARY) and all(file_name_of(name) == name for name in found)
