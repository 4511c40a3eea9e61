from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest
import torch
from diffusers import AuraFlowPipeline

from simpletuner import plugins
from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.times import Beta, LogitNormal, Uniform
from simpletuner.errors import ConfigError
from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.models.family import ModelFamily
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised, Size
from tests.builders.auraflow import SCALING_FACTOR, build_tiny_auraflow

CPU = torch.device("cpu")


def released(**options) -> AuraFlow:
    return AuraFlow(Models(model_family="auraflow", **options))


def batch_of(text: dict[str, torch.Tensor]) -> Batch:
    return Batch(samples=(), prompts=(), latents={}, text=text)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Facts.


def test_the_family_is_found_by_its_name():
    assert plugins.load("simpletuner.models.families", "auraflow", ModelFamily) is AuraFlow


def test_the_facts_import_no_torch():
    code = (
        "import sys, simpletuner.models.families.auraflow as m; m.AuraFlow.defaults; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checking_a_local_model_imports_no_torch(tiny):
    code = f"""
import sys
from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.options.models import Models
from simpletuner.types import Size

family = AuraFlow(Models(model_family="auraflow", pretrained_model_name_or_path={str(tiny)!r}))
family.check_source()
family.check_size(Size(family.alignment_px, 64))
sys.exit("torch" in sys.modules or "diffusers" in sys.modules)
"""

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "location", "tokens"),
    [
        ({}, "terminusresearch/auraflow-v0.3", 256),
        ({"model_flavour": "v0.2"}, "fal/AuraFlow-v0.2", 256),
        ({"model_flavour": "v0.1"}, "fal/AuraFlow", 256),
        ({"model_flavour": "pony"}, "purplesmartai/pony-v7-base", 768),
        ({"pretrained_model_name_or_path": "purplesmartai/pony-v7-base"}, "purplesmartai/pony-v7-base", 768),
        ({"model_flavour": "pony", "tokenizer_max_length": 120}, "purplesmartai/pony-v7-base", 120),
    ],
)
def test_a_flavour_says_which_model_and_how_many_text_tokens(options, location, tokens):
    family = released(**options)

    assert family.source_name() == location and family.text_tokens == tokens
    assert family.pipeline_text_arguments() == {"max_sequence_length": tokens}


def test_class_names_that_users_write_are_classes_of_the_denoiser(auraflow):
    classes = {type(module).__name__ for module in auraflow().load_denoiser(torch.float32, 0).modules()}

    for short, names in AuraFlow.class_aliases.items():
        assert set(names) <= classes, short


def test_the_default_targets_of_a_lora_are_in_the_denoiser(auraflow):
    names = [name for name, _ in auraflow().load_denoiser(torch.float32, 0).named_modules()]

    for suffix in AuraFlow.lora_targets:
        assert any(name.endswith("." + suffix) for name in names), suffix


def test_settings_that_have_no_effect_are_said():
    assert released().notes() == []
    assert "auraflow has no unet" in released(pretrained_unet_model_name_or_path="a/b").notes()[0]
    assert "no effect without pretrained_transformer_model_name_or_path" in released(pretrained_transformer_subfolder="x").notes()[0]


# Sizes.


def test_released_models_are_aligned_to_64_pixels_without_asking_the_hub():
    assert released().alignment_px == 64


def test_a_small_model_is_aligned_to_what_it_can_take(auraflow):
    assert auraflow().alignment_px == 8


@pytest.mark.parametrize(("positions", "alignment"), [(8 * 8, 8), (32 * 32, 16), (64 * 64, 32), (128 * 128, 64), (192 * 192, 64)])
def test_the_alignment_grows_with_the_largest_picture_up_to_64(auraflow, copy, positions, alignment):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps({**config, "pos_embed_max_size": positions}))

    assert auraflow(pretrained_model_name_or_path=str(copy)).alignment_px == alignment


@pytest.mark.parametrize("size", [Size(64, 64), Size(8, 64), Size(56, 24)])
def test_sizes_that_are_accepted_are_drawn(auraflow, size):
    family = auraflow()
    family.check_size(size)
    latents = torch.zeros(1, 4, size.height // 4, size.width // 4)
    noised = Noised(latents, latents, torch.tensor([0.5]))

    assert family.predict(family.load_denoiser(torch.float32, 0), noised, batch_of({"prompt": torch.zeros(1, 24, 32)})).shape == latents.shape
    assert family.tokens(latents) == size.width // 8 * (size.height // 8)


@pytest.mark.parametrize(("patch", "step"), [(1, 8), (2, 8), (3, 24), (4, 16)])
def test_a_side_is_made_of_whole_patches_and_of_pairs_of_latent_pixels(auraflow, copy, patch, step):
    """The second is the pipeline's wish: it refuses other heights and widths whatever the patch."""
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps({**config, "patch_size": patch}))
    family = auraflow(pretrained_model_name_or_path=str(copy))

    family.check_size(Size(step, step))

    with pytest.raises(ConfigError, match=f"multiples of {step}"):
        family.check_size(Size(step - 4, step))


@pytest.mark.parametrize(("size", "why"), [(Size(60, 64), "multiples of 8"), (Size(64, 12), "multiples of 8"), (Size(72, 8), "up to 64 pixels")])
def test_sizes_that_the_model_has_no_positions_for_are_refused(auraflow, size, why):
    with pytest.raises(ConfigError, match=why):
        auraflow().check_size(size)


# What is learned.


def test_raw_latents_are_scaled_as_the_pipeline_unscales_them(auraflow):
    raw = draw(2, 4, 8, 8)

    assert torch.equal(auraflow().scale_latents(raw), raw * SCALING_FACTOR)


def test_a_shift_in_the_vaes_configuration_is_left_out_as_the_pipeline_leaves_it_out(auraflow, copy):
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.7}))
    raw = draw(2, 4, 8, 8)

    assert torch.equal(auraflow(pretrained_model_name_or_path=str(copy)).scale_latents(raw), raw * SCALING_FACTOR)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FlowMatching(LogitNormal(1.0), 1.73)),
        ({"flow_schedule_shift": 3.0, "flow_sigmoid_scale": 0.5}, FlowMatching(LogitNormal(0.5), 3.0)),
        ({"flow_schedule_shift": 0}, FlowMatching(LogitNormal(1.0), 1.0)),
        ({"flow_use_uniform_schedule": True}, FlowMatching(Uniform(), 1.73)),
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0}, FlowMatching(Beta(3.0, 2.0), 1.73)),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 1.73}, FlowMatching(LogitNormal(1.0), None)),
    ],
)
def test_the_options_choose_the_process(auraflow, options, expected):
    assert auraflow().process(Diffusion(**options)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_is_the_call_that_the_pipeline_makes(auraflow, tiny, dtype):
    """What the pipeline's denoiser is given in the middle of sampling, and what it answers, against ours."""
    calls: list = []
    plain = AuraFlowPipeline.from_pretrained(tiny, torch_dtype=dtype)
    plain.transformer.register_forward_hook(lambda _, inputs, named, output: calls.append((inputs[0], named, output[0])), with_kwargs=True)
    plain("a cat", height=32, width=32, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=24, output_type="latent")
    latents, named, expected = calls[1]
    family = auraflow()
    text = family.encode_text(family.load_text_encoders(CPU, dtype), ["a cat"])
    noised = Noised(latents.float(), latents.float(), plain.scheduler.timesteps[1:2] / 1000)

    answer = family.predict(family.load_denoiser(dtype, 0), noised, batch_of(text))

    assert 0 < named["timestep"].item() < 1
    assert answer.dtype == dtype and torch.equal(answer, expected)


def test_a_perfect_prediction_is_sampled_to_the_data_by_the_models_own_scheduler(auraflow):
    family = auraflow()
    latents, noise = draw(1, 4, 8, 8), draw(1, 4, 8, 8, seed=1)
    pipeline = family.pipeline(family.load_denoiser(torch.float32, 0), family.load_vae(CPU, torch.float32), Diffusion())
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)

    sample = noise
    for timestep in scheduler.timesteps:
        target = family.process(Diffusion()).add_noise(latents, noise, (timestep / 1000)[None]).target
        sample = scheduler.step(target, timestep, sample, return_dict=False)[0]

    assert scheduler.config.shift == 1.73
    assert torch.allclose(sample, latents, atol=1e-5)


# Pictures.


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_picture_from_cached_embeddings_is_bit_for_bit_that_of_plain_diffusers(auraflow, tiny, guidance):
    call = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": guidance, "output_type": "np"}
    plain = AuraFlowPipeline.from_pretrained(tiny)
    expected = plain("a cat", negative_prompt="blurry", max_sequence_length=24, generator=torch.Generator().manual_seed(3), **call).images

    family = auraflow()
    encoders = family.load_text_encoders(CPU, torch.float32)
    text, negative = (family.encode_text(encoders, [prompt]) for prompt in ("a cat", "blurry"))
    del encoders
    pipeline = family.pipeline(family.load_denoiser(torch.float32, 0), family.load_vae(CPU, torch.float32), Diffusion())
    pictures = pipeline(**family.pipeline_inputs(text, negative), generator=torch.Generator().manual_seed(3), **call).images

    assert numpy.array_equal(pictures, expected) and pictures.std() > 0.01
    assert family.pipeline_class == type(plain).__name__


def test_rendering_leaves_torchs_generator_as_it_was(auraflow):
    family = auraflow()
    text = family.encode_text(family.load_text_encoders(CPU, torch.float32), ["a cat"])
    pipeline = family.pipeline(family.load_denoiser(torch.float32, 0), family.load_vae(CPU, torch.float32), Diffusion())
    before = torch.random.get_rng_state()

    pipeline(**family.pipeline_inputs(text, text), height=16, width=16, num_inference_steps=1, generator=torch.Generator().manual_seed(3))

    assert torch.equal(torch.random.get_rng_state(), before)


# Identity.


def test_fingerprints_change_with_the_files_they_speak_of_and_with_no_others(auraflow, tiny, copy, tmp_path):
    other = build_tiny_auraflow(tmp_path / "other", seed=1)
    base = auraflow()
    same = auraflow(pretrained_model_name_or_path=str(copy))
    another_vae = auraflow(pretrained_vae_model_name_or_path=str(other))
    another_model = auraflow(pretrained_model_name_or_path=str(other))
    longer = auraflow(tokenizer_max_length=32)

    assert same.vae_fingerprint() == base.vae_fingerprint() and same.text_fingerprint() == base.text_fingerprint()
    assert another_vae.vae_fingerprint() != base.vae_fingerprint() and another_vae.text_fingerprint() == base.text_fingerprint()
    assert another_model.text_fingerprint() != base.text_fingerprint()
    assert longer.text_fingerprint() != base.text_fingerprint() and longer.vae_fingerprint() == base.vae_fingerprint()
    assert str(tiny) not in base.text_fingerprint() + base.vae_fingerprint()


def test_another_tokenizer_is_another_text_fingerprint(auraflow, copy):
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"NFKC"', '"NFC"'))

    assert auraflow(pretrained_model_name_or_path=str(copy)).text_fingerprint() != auraflow().text_fingerprint()


def test_the_tiny_model_of_these_tests_is_the_same_every_time(tiny, tmp_path):
    again = build_tiny_auraflow(tmp_path / "again")

    for path in tiny.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(tiny)).read_bytes()
