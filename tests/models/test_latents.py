from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from simpletuner.errors import ConfigError
from simpletuner.models.latents import UNSTATED_SCALING, Scaling, encode_posterior, scaling_of, stride_of


@pytest.fixture(scope="module")
def vae(tiny) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny / "vae")


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_mean_and_deviation_are_those_of_the_posterior_before_any_scaling(vae):
    moments = encode_posterior(vae, pixels())

    expected = vae.encode(pixels()).latent_dist
    assert moments["mean"].shape == (2, 4, 6, 8)
    assert torch.allclose(moments["mean"], expected.mean) and torch.allclose(moments["std"], expected.std)
    assert not moments["mean"].requires_grad


def test_a_half_precision_vae_still_gives_float32(vae):
    half = AutoencoderKL.from_config(vae.config).to(torch.bfloat16)

    moments = encode_posterior(half, pixels())

    assert {moment.dtype for moment in moments.values()} == {torch.float32}


def test_a_vae_that_overflows_is_an_error_that_names_the_option(vae):
    broken = AutoencoderKL.from_config(vae.config)
    with torch.no_grad():
        broken.quant_conv.weight.fill_(float("inf"))

    with pytest.raises(ConfigError, match=r"NaN or infinite latents in torch\.float32") as caught:
        encode_posterior(broken, pixels())
    assert "vae_dtype" in caught.value.hint


def test_scaling_takes_the_shift_off_before_it_multiplies():
    raw = torch.tensor([1.0, 3.0])

    assert torch.equal(Scaling(0.5, 1.0).scale(raw), torch.tensor([0.0, 1.0]))
    assert torch.equal(Scaling(0.5).scale(raw), raw * 0.5)


def test_the_scaling_is_read_from_the_configuration():
    config = {"scaling_factor": 0.3, "shift_factor": 0.2}

    assert scaling_of(config, has_shift=True) == Scaling(0.3, 0.2)
    assert scaling_of(config, has_shift=False) == Scaling(0.3, 0.0)
    assert scaling_of({"scaling_factor": 0.3, "shift_factor": None}, has_shift=True) == Scaling(0.3, 0.0)


def test_what_a_configuration_leaves_out_is_what_the_library_takes():
    silent = AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)).config

    assert scaling_of({}, has_shift=True) == Scaling(silent.scaling_factor) == Scaling(UNSTATED_SCALING)
    assert stride_of({}) == 1


def test_the_stride_is_what_the_vae_does(vae):
    assert stride_of(vae.config) == 24 // encode_posterior(vae, pixels())["mean"].shape[-2] == 4
