"""A T5 in place of the model's own: read by its own classes, refused where it cannot fit, written with the finished model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AuraFlowPipeline
from transformers import T5EncoderModel

from simpletuner.cli.choices import family_of
from simpletuner.errors import ConfigError
from simpletuner.models.t5 import tokenizer_class
from simpletuner.options.models import Models
from tests.builders.pixels import WIDTH, build_foreign_t5, build_pixel_auraflow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return build_foreign_t5(tmp_path_factory.mktemp("models") / "t5")


def test_prompts_are_read_as_transformers_reads_them(auraflow, t5):
    family = auraflow(pretrained_t5_model_name_or_path=str(t5))
    [text] = encoders = family.load_text_encoders(CPU, torch.float32)

    encoded = family.encode_text(encoders, ["a cat", ""])

    inputs = text.tokenizer(["a cat", ""], padding="max_length", max_length=24, return_tensors="pt")
    hidden = T5EncoderModel.from_pretrained(t5).eval()(**inputs)[0]
    assert type(text.encoder) is T5EncoderModel
    assert torch.equal(encoded["mask"], inputs["attention_mask"])
    assert torch.allclose(encoded["prompt"], hidden * inputs["attention_mask"][..., None], atol=1e-6)


def test_another_t5_makes_other_cache_entries_and_a_readme_makes_none(auraflow, t5, tmp_path):
    copy = shutil.copytree(t5, tmp_path / "copy")
    (copy / "README.md").write_text("changed")
    other = build_foreign_t5(tmp_path / "other", seed=1)

    found = [auraflow(pretrained_t5_model_name_or_path=str(path)).text_fingerprint() for path in (t5, copy, other)]

    assert found[0] == found[1] != found[2]
    assert auraflow().text_fingerprint() not in found


def test_a_finished_model_carries_the_t5_and_loads_in_diffusers(tmp_path, t5, auraflow):
    model = build_pixel_auraflow(tmp_path / "model")
    family = auraflow(pretrained_model_name_or_path=str(model), pretrained_t5_model_name_or_path=str(t5), model_init="random")
    denoiser = family.load_denoiser(torch.float32, 0)

    family.save_pipeline(denoiser, tmp_path / "pipeline")

    pipeline = AuraFlowPipeline.from_pretrained(tmp_path / "pipeline", vae=None)
    assert type(pipeline.text_encoder) is T5EncoderModel
    assert {path.name for path in (tmp_path / "pipeline/tokenizer").iterdir()} <= {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    prompt, _, _, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=24)
    ours = family.encode_text(family.load_text_encoders(CPU, torch.float32), ["a cat"])
    assert torch.allclose(prompt, ours["prompt"], atol=1e-6)


def test_embeddings_of_another_width_are_refused_before_anything_is_loaded(auraflow, tmp_path):
    wide = build_foreign_t5(tmp_path / "wide", width=2 * WIDTH)

    with pytest.raises(ConfigError, match="are 64 numbers wide, and the denoiser takes 32"):
        auraflow(pretrained_t5_model_name_or_path=str(wide)).check_source()


def test_what_is_no_t5_is_refused(auraflow, t5, tmp_path):
    bert = shutil.copytree(t5, tmp_path / "bert")
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))

    with pytest.raises(ConfigError, match="is a bert, no T5") as caught:
        auraflow(pretrained_t5_model_name_or_path=str(bert)).check_source()
    assert "umt5" in str(caught.value.hint)


def test_a_t5_that_is_not_there_or_a_single_file_is_refused(auraflow, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        auraflow(pretrained_t5_model_name_or_path=str(tmp_path / "nothing")).check_source()
    with pytest.raises(ConfigError, match="is a single file"):
        auraflow(pretrained_t5_model_name_or_path=str(tmp_path / "t5xxl.safetensors"))


def test_a_family_without_a_t5_says_that_the_option_has_no_effect():
    family = family_of("sdxl")(Models(model_family="sdxl", pretrained_t5_model_name_or_path="google/t5-v1_1-base"))

    assert any("reads no T5" in note for note in family.notes())


@pytest.mark.parametrize(("name", "parts"), [("sd3", "text_encoder_3"), ("flux", "text_encoder_2"), ("chroma", "text_encoder")])
def test_in_other_families_it_takes_the_place_of_their_t5(name, parts):
    family = family_of(name)(Models(model_family=name, pretrained_t5_model_name_or_path="google/t5-v1_1-xxl"))

    assert [part for part in family.parts if family.source.is_replaced(part)] == [parts, parts.replace("text_encoder", "tokenizer")]


@pytest.mark.parametrize(
    ("said", "taken"), [(None, "T5TokenizerFast"), ("T5Tokenizer", "T5TokenizerFast"), ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast")]
)
def test_the_fast_tokenizer_reads_the_files_of_the_slow_one(said, taken):
    assert tokenizer_class({"tokenizer_class": said}) == taken
