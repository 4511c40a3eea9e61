"""Pictures that are shown while they are being made."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from simpletuner.models.flow import pack
from simpletuner.models.preview import projection, unpacked
from simpletuner.training.previews import picture_of
from tests.builders.run import train_in_process, write_run

LOOKING = {
    "validation_prompt": "a picture",
    "validation_resolution": "32",
    "validation_num_inference_steps": 4,
    "validation_step_interval": 1,
    "max_train_steps": 1,
    "checkpoint_step_interval": 0,
    "validation_preview": True,
    "validation_preview_steps": 2,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_projection_gives_back_the_colours_of_smooth_pictures():
    """An encoder that mixes colours into more channels, unevenly, as those of latents do."""
    mix, shift = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, -1.0, 0.0, 2.0])

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdhw->bchw", mix, torch.nn.functional.avg_pool2d(pixels, 8)) + shift[:, None, None]

    pixels = torch.rand(2, 3, 1, 1).expand(-1, -1, 64, 32) * 2 - 1
    colours = projection(encode, 8, torch.device("cpu"))(encode(pixels))

    assert colours.shape == (2, 3, 8, 4) and torch.allclose(colours, pixels[..., :8, :4], atol=1e-4)


def test_latents_are_found_in_every_form_that_pipelines_hold_them_in():
    latents = torch.randn(1, 4, 6, 8)

    for held in (latents, latents[:, :, None], pack(latents)):
        assert torch.equal(unpacked(held, 6, 8), latents)


def test_a_large_preview_is_made_smaller():
    assert picture_of(torch.zeros(1, 3, 1024, 512)).size == (192, 384)


@pytest.mark.parametrize("way", ["linear", "tiny", "missing"])
def test_previews_are_files_by_prompt_and_change_no_picture(tmp_path, capsys, way):
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(latent_channels=4, **channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    model = {"linear": "linear", "tiny": str(tmp_path / "tiny"), "missing": str(tmp_path / "nothing")}[way]
    write_run(tmp_path / "shown", **LOOKING, validation_preview_model=model)

    assert train_in_process(tmp_path / "shown") == 0
    said = " ".join(capsys.readouterr().out.split())

    with Image.open(tmp_path / "shown" / "output" / "previews" / "validation_7_32x32.jpg") as image:
        facts = json.loads(image.getexif()[270])
        assert numpy.asarray(image).std() > 0
    assert (facts["sampling_step"], facts["step"], facts["prompt"]) == ("4", "1", "a picture")
    assert ("previews show colours alone" in said) == (way == "missing")
    if way != "linear":
        return
    write_run(tmp_path / "plain", **{**LOOKING, "validation_preview": False, "validation_preview_steps": None})
    assert train_in_process(tmp_path / "plain") == 0
    for name in ("base_validation_7_32x32.png", "step_00001_validation_7_32x32.png"):
        both = [tmp_path / folder / "output" / "validation_images" / name for folder in ("shown", "plain")]
        assert both[0].read_bytes() == both[1].read_bytes()
