"""A model without a VAE: latents are the pixels, and pictures come back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simpletuner.cli.choices import family_of
from simpletuner.errors import ConfigError
from simpletuner.models import pixels
from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.models.offline import shapes
from simpletuner.options.models import Models
from simpletuner.types import Size
from tests.builders.pixels import build_foreign_t5, build_pixel_auraflow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return build_foreign_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    return build_pixel_auraflow(tmp_path_factory.mktemp("models") / "grey")


def auraflow(model: Path, t5: Path, **options) -> AuraFlow:
    paths = {"pretrained_model_name_or_path": str(model), "pretrained_t5_model_name_or_path": str(t5)}
    return AuraFlow(Models(model_family="auraflow", model_init="random", **{**paths, **options}))


def bytes_as_pixels(values: numpy.ndarray) -> torch.Tensor:
    """(H, W, 3) of bytes to (1, 3, H, W) as images are read."""
    return torch.from_numpy(values).permute(2, 0, 1)[None].float().div(127.5).sub(1.0)


@given(st.floats(-1, 1, width=32))
def test_what_is_grey_stays_the_very_same_number(value):
    picture = torch.full((1, 3, 2, 2), value)

    assert torch.equal(pixels.encode(picture, 1)["mean"], picture[:, :1])


def test_colours_become_the_greys_that_pillow_makes_of_them():
    values = numpy.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)

    ours = pixels.encode(bytes_as_pixels(values), 1)["mean"][0, 0]

    theirs = torch.from_numpy(numpy.array(Image.fromarray(values).convert("L"))).float() / 127.5 - 1
    assert (ours - theirs).abs().max() <= 1.01 / 127.5 / 2  # Pillow rounds to whole greys


def test_latents_in_colour_are_the_pixels_and_have_no_spread(tmp_path, t5):
    family = auraflow(build_pixel_auraflow(tmp_path, channels=3), t5)
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = family.load_vae(CPU, torch.bfloat16)

    raw = family.encode_pixels(vae, picture)

    assert torch.equal(raw["mean"], picture) and torch.equal(raw["std"], torch.zeros_like(picture))
    assert torch.equal(family.scale_latents(raw["mean"]), picture)
    assert torch.equal(vae.decode(picture, return_dict=False)[0], picture)


def test_a_model_says_by_its_list_of_parts_or_a_run_by_an_option_that_there_is_no_vae(tmp_path, grey, t5):
    model = build_pixel_auraflow(tmp_path)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))

    for family in (auraflow(grey, t5), auraflow(model, t5, pretrained_vae_model_name_or_path="none")):
        family.check_source()
        assert "vae" not in family.parts
        assert (family.vae_stride, family.alignment_px, family.longest_px) == (1, 8, 32)
    with pytest.raises(ConfigError, match="has no vae"):
        auraflow(model, t5).check_source()


def test_other_runs_of_the_family_keep_their_vae(auraflow):
    assert "vae" in auraflow().parts and auraflow().vae_stride == 4


def test_sizes_are_in_steps_of_a_patch(grey, t5):
    auraflow(grey, t5).check_size(Size(24, 32))
    with pytest.raises(ConfigError, match="multiples of 8"):
        auraflow(grey, t5).check_size(Size(28, 28))
    with pytest.raises(ConfigError, match="up to 32 pixels"):
        auraflow(grey, t5).check_size(Size(64, 32))


def test_a_denoiser_of_four_channels_is_refused(tmp_path, t5):
    with pytest.raises(ConfigError, match="1 or 3 channels; its in_channels is 4"):
        auraflow(build_pixel_auraflow(tmp_path, channels=4), t5).check_source()


def test_a_family_that_needs_a_vae_says_so():
    family = family_of("sdxl")(Models(model_family="sdxl", pretrained_vae_model_name_or_path="none"))

    with pytest.raises(ConfigError, match="which model_family sdxl cannot") as caught:
        family.check_source()
    assert "auraflow" in str(caught.value.hint)


def test_grey_and_colour_have_different_cache_entries(tmp_path, grey, t5):
    colour = auraflow(build_pixel_auraflow(tmp_path, channels=3), t5)

    assert auraflow(grey, t5).vae_fingerprint() != colour.vae_fingerprint()


def test_the_size_of_latents_is_known_without_a_vae(grey, t5):
    found = shapes(auraflow(grey, t5))

    assert (found.latents.channels, found.latents.stride_px, found.text["prompt"][-1], found.assumed) == (1, 1, 32, ())
