from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from simpletuner.adapters.adapter import Targets
from simpletuner.adapters.kinds.lycoris import Lycoris
from simpletuner.errors import ConfigError
from simpletuner.models.families.flux2 import DEV, KLEIN, Flux2
from simpletuner.models.flow import pack, unpack
from simpletuner.options.adapters import Adapters
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised
from tests.builders.flux2 import build_tiny_flux2, build_tiny_flux2_dev

CPU = torch.device("cpu")
KLEIN_CLASSES = ("Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux2(tmp_path_factory.mktemp("models") / "klein")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux2_dev(tmp_path_factory.mktemp("models") / "dev")


def flux2(folder: Path | None = None, **options: Any) -> Flux2:
    where = {} if folder is None else {"pretrained_model_name_or_path": str(folder), "tokenizer_max_length": 24}
    return Flux2(Models(model_family="flux2", **{**where, **options}))


@pytest.mark.parametrize(
    ("options", "location", "pipeline", "idle"),
    [
        ({}, "black-forest-labs/FLUX.2-klein-base-9B", KLEIN, "distilled_guidance"),
        ({"model_flavour": "klein-4b"}, "black-forest-labs/FLUX.2-klein-base-4B", KLEIN, "distilled_guidance"),
        ({"model_flavour": "klein-4b-distilled"}, "black-forest-labs/FLUX.2-klein-4B", KLEIN, "distilled_guidance"),
        ({"model_flavour": "dev"}, "black-forest-labs/FLUX.2-dev", DEV, "validation_negative_prompt"),
        ({"pretrained_model_name_or_path": "black-forest-labs/FLUX.2-dev"}, "black-forest-labs/FLUX.2-dev", DEV, "validation_negative_prompt"),
    ],
)
def test_a_flavour_says_which_pipeline_it_is_without_asking_the_hub(monkeypatch, options, location, pipeline, idle):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    family = flux2(**options)

    assert (family.source_name(), family.pipeline_class, list(family.idle)) == (location, pipeline, [idle])
    assert (family.alignment_px, family.text_tokens) == (64, 512)


def test_a_folder_says_itself_which_pipeline_it_is(klein, dev):
    flux2(dev).check_source()
    flux2(klein).check_source()

    assert flux2(dev).pipeline_class == flux2(dev, model_flavour="klein-4b").pipeline_class == DEV
    assert flux2(klein).pipeline_class == flux2(klein, model_flavour="dev").pipeline_class == KLEIN


@pytest.mark.parametrize(("content", "why"), [(None, "model_index.json"), ({"_class_name": "FluxPipeline"}, "model_family flux")])
def test_a_folder_of_something_else_is_refused(tmp_path, klein, content, why):
    folder = Path(shutil.copytree(klein, tmp_path / "model"))
    (folder / "model_index.json").unlink()
    if content is not None:
        (folder / "model_index.json").write_text(json.dumps(content))

    with pytest.raises(ConfigError) as error:
        flux2(folder).check_source()

    assert why in f"{error.value.message} {error.value.hint}"


def test_the_facts_import_no_torch():
    code = (
        "import sys, simpletuner.models.families.flux2 as m; from simpletuner.options.models import Models;"
        "m.Flux2(Models(model_family='flux2')).pipeline_class; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_raw_latents_are_normalised_as_the_pipeline_normalises_those_of_a_picture(klein):
    pixels = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    family, pipeline = flux2(klein), Flux2KleinPipeline.from_pretrained(klein)

    ours = family.scale_latents(family.encode_pixels(family.load_vae(CPU, torch.float32), pixels)["mean"])

    with torch.no_grad():
        theirs = pipeline._encode_vae_image(pixels, generator=None)
    assert ours.shape == (2, 4, 12, 8) and family.tokens(ours) == 24
    assert torch.equal(pack(ours), pipeline._pack_latents(theirs))


def test_only_a_model_with_guidance_embeddings_is_told_one(klein, dev):
    options = Diffusion(distilled_guidance=2.5)

    assert flux2(dev).process(options).guidance == 2.5
    assert flux2(klein).process(options).guidance is None


def test_a_distilled_klein_is_sampled_without_classifier_free_guidance(tmp_path, klein):
    def is_distilled(folder: Path) -> bool:
        family = flux2(folder)
        vae, denoiser = family.load_vae(CPU, torch.float32), family.load_denoiser(torch.float32, 0)
        return bool(family.pipeline(denoiser, vae, Diffusion()).config.is_distilled)

    assert is_distilled(build_tiny_flux2(tmp_path / "distilled", is_distilled=True))
    assert not is_distilled(klein)


@pytest.mark.parametrize("model", ["klein", "dev"])
def test_the_words_around_a_prompt_count_as_tokens(request, model):
    family = flux2(request.getfixturevalue(model))
    encoders = family.load_text_encoders(CPU, torch.float32)

    empty, short, long = family.count_tokens(encoders, ["", "a cat", "a cat" * 20])

    assert empty > 2 and short == empty + 5 and long == empty + 100


@pytest.mark.parametrize("written", [KLEIN_CLASSES, ("Attention", "FeedForward")])
def test_a_lycoris_preset_finds_the_classes_that_users_write(tmp_path, klein, written):
    settings = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "full_matrix": True, "bypass_mode": True}
    preset = {"target_module": list(written), "module_algo_map": {written[0]: {"factor": 2}}}
    (tmp_path / "lycoris.json").write_text(json.dumps({**settings, "apply_preset": preset}))
    family = flux2(klein)
    options = Adapters(model_type="lora", lora_type="lycoris", lycoris_config=str(tmp_path / "lycoris.json"))
    adapter = Lycoris(options, Targets(family.class_aliases, family.lora_targets, family.denoiser_folder))

    attached = adapter.attach(family.load_denoiser(torch.float32, 0))

    assert attached.modules == 8 + 4 + 2  # of one double block's attention and two feed-forwards, and of a single block


def test_reference_pictures_follow_as_the_pipeline_has_them(klein):
    """The denoiser's call of one training step equals that of the pipeline with `image`, on the same latents, time and words."""
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    pictures = [Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)) for seed in (1, 2)]
    calls: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments, keywords: calls.append(keywords), with_kwargs=True)
    text = {"prompt": pipeline.encode_prompt("a cat", max_sequence_length=24, text_encoder_out_layers=(9, 18, 27))[0]}
    answer = pipeline(
        image=pictures,
        prompt_embeds=text["prompt"],
        negative_prompt_embeds=text["prompt"],
        width=64,
        height=64,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    assert answer is not None
    [theirs] = calls
    family = flux2(klein)
    tokens = theirs["hidden_states"].shape[1] // 3
    noisy = unpack(theirs["hidden_states"][:, :tokens], 64 // family.vae_stride, 64 // family.vae_stride)
    pixels = torch.stack([torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures])
    vae = family.load_vae(CPU, torch.float32)
    references = tuple(family.encode_pixels(vae, picture[None]) for picture in pixels)
    batch = Batch((), ("a cat",), {}, text, references=references)
    noised = Noised(noisy, torch.zeros_like(noisy), torch.ones(1))

    ours = family.predict(pipeline.transformer, noised, batch)

    mine = calls[1]
    assert torch.equal(mine["img_ids"], theirs["img_ids"][0]) and torch.equal(mine["txt_ids"], theirs["txt_ids"][0])
    torch.testing.assert_close(mine["hidden_states"], theirs["hidden_states"], rtol=1e-5, atol=1e-5)
    assert ours.shape == noisy.shape
    alone = family.predict(pipeline.transformer, noised, replace(batch, references=()))
    assert not torch.allclose(ours, alone)
