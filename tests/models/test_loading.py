from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.errors import ConfigError

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_come_frozen_in_evaluation_mode_and_in_the_wanted_precision(auraflow, dtype):
    family = auraflow()

    for network in (family.load_denoiser(dtype, seed=0), family.load_vae(CPU, dtype), family.load_text_encoders(CPU, dtype)[0].encoder):
        assert not network.training
        assert {parameter.requires_grad for parameter in network.parameters()} == {False}
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}


def test_loaded_weights_are_those_in_the_file(auraflow, tiny):
    denoiser = auraflow().load_denoiser(torch.float32, seed=0)

    stored = load_file(tiny / "transformer" / WEIGHTS)
    assert all(torch.equal(value, stored[name]) for name, value in denoiser.state_dict().items())


def test_loading_prints_nothing(auraflow, capfd):
    family = auraflow()

    family.load_text_encoders(CPU, torch.float32)
    family.load_denoiser(torch.float32, seed=0)

    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_weights_with_gaps_are_refused(auraflow, copy, part):
    path = next((copy / part).glob("*.safetensors"))
    tensors = load_file(path)
    gone = sorted(name for name in tensors if "norm" in name or "linear" in name)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, {"format": "pt"})
    family = auraflow(pretrained_model_name_or_path=str(copy))

    with pytest.raises(ConfigError, match=f"weights of the {part} of .* lack 1 tensors .* such as {gone}"):
        family.load_denoiser(torch.float32, 0) if part == "transformer" else family.load_text_encoders(CPU, torch.float32)


def test_weights_of_another_shape_are_refused(auraflow, copy):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 48}))

    with pytest.raises(ConfigError, match="the transformer of"):
        auraflow(pretrained_model_name_or_path=str(copy)).load_denoiser(torch.float32, 0)


def test_a_damaged_file_is_an_error_that_names_the_part(auraflow, copy):
    path = copy / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(ConfigError, match=r"the vae of .* cannot be read"):
        auraflow(pretrained_model_name_or_path=str(copy)).load_vae(CPU, torch.float32)


def test_a_random_denoiser_follows_from_its_seed_and_needs_no_weights(auraflow, copy):
    (copy / "transformer" / WEIGHTS).unlink()
    family = auraflow(pretrained_model_name_or_path=str(copy), model_init="random")

    first, again, other = (family.load_denoiser(torch.float32, seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])
    assert family.load_denoiser(torch.bfloat16, 1).dtype == torch.bfloat16


def test_a_random_denoiser_may_be_given_as_a_configuration_file(auraflow, tiny, tmp_path):
    config = json.loads((tiny / "transformer" / "config.json").read_text())
    (tmp_path / "wide.json").write_text(json.dumps({**config, "num_single_dit_layers": 2}))
    family = auraflow(model_init="random", pretrained_transformer_model_name_or_path=str(tmp_path / "wide.json"))
    family.check_source()

    assert len(family.load_denoiser(torch.float32, 1).single_transformer_blocks) == 2


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_loading_leaves_torchs_generator_as_it_was(auraflow, init):
    family = auraflow(model_init=init)
    before = torch.random.get_rng_state()

    family.load_text_encoders(CPU, torch.float32)
    family.load_vae(CPU, torch.float32)
    family.load_denoiser(torch.float32, seed=1)

    assert torch.equal(torch.random.get_rng_state(), before)
