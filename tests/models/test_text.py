from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowPipeline

from simpletuner.models.text import count_tokens, encode_masked

PROMPTS = ["a cat", "", "a handwritten seven, in red ink"]


@pytest.fixture(scope="module")
def pipeline(tiny):
    return AuraFlowPipeline.from_pretrained(tiny)


@pytest.fixture
def encoders(auraflow):
    return auraflow().load_text_encoders(torch.device("cpu"), torch.float32)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("tokens", [8, 40])
def test_embeddings_are_bit_for_bit_those_of_the_models_own_pipeline(encoders, pipeline, prompt, tokens):
    ours = encode_masked(encoders, [prompt], tokens)

    with torch.no_grad():
        theirs, mask, _, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=tokens)
    assert torch.equal(ours["prompt"], theirs)
    assert torch.equal(ours["mask"], mask.view(1, tokens, -1)[..., 0])  # the pipeline repeats its mask along the width


def test_every_prompt_has_the_same_length_and_nothing_where_it_is_padded(encoders):
    encoded = encode_masked(encoders, PROMPTS, 24)

    assert encoded["prompt"].shape == (3, 24, 32) and encoded["mask"].shape == (3, 24)
    assert encoded["mask"].sum(1).tolist() == [6, 1, 24]
    assert not encoded["prompt"][encoded["mask"] == 0].any() and encoded["prompt"][encoded["mask"] == 1].abs().sum(-1).all()


def test_other_prompts_in_the_batch_make_no_difference(encoders):
    together = encode_masked(encoders, PROMPTS, 24)["prompt"]

    for row, prompt in zip(together, PROMPTS):
        assert torch.allclose(row, encode_masked(encoders, [prompt], 24)["prompt"][0], atol=1e-6)


def test_a_long_prompt_loses_its_end_but_not_the_end_token(encoders):
    encoded = encode_masked(encoders, ["x" * 500], 8)

    assert encoded["mask"].tolist() == [[1] * 8]
    ids = encoders.tokenizer("x" * 500, truncation=True, max_length=8)["input_ids"]
    assert ids[-1] == encoders.tokenizer.eos_token_id


def test_tokens_are_counted_before_truncation_and_without_a_warning(encoders, caplog, capfd):
    assert count_tokens(encoders.tokenizer, ["a cat", "", "x" * 500]) == [6, 1, 501]
    assert not caplog.records and not capfd.readouterr().err


def test_the_encoder_is_frozen_and_in_evaluation_mode(encoders):
    assert not encoders.encoder.training and not any(parameter.requires_grad for parameter in encoders.encoder.parameters())
