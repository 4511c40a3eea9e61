"""The recipe of the digits base: what it draws, which words it knows, and that the judge's digits stay the judge's."""

from __future__ import annotations

import looks
import numpy as np
import parts
import prepare
import pytest
import quality
import torch
import vae


@pytest.fixture(scope="module")
def fields():
    digits, _ = looks.digits()
    return [looks.strokes(digit) for digit in digits[:20]]


def test_the_judges_digits_are_never_drawn():
    _, labels = looks.digits()

    drawn, judged = looks.halves(labels)

    assert sorted([*drawn, *judged]) == list(range(len(labels)))
    assert np.bincount(labels[judged]).min() > 80


@pytest.mark.slow
def test_every_readable_digit_is_of_the_drawn_half():
    digits = prepare.Readable()
    drawn, _ = looks.halves(digits.labels)

    assert set(digits.numbers) < set(drawn)
    assert len(digits.numbers) > 0.9 * len(drawn)
    assert all((digits.labels[digits.best_of(digit)] == digit).all() for digit in range(10))


def test_the_same_seed_draws_the_same_picture(fields):
    first, again = (looks.ink(looks.draw(fields[3], random), random) for random in (np.random.default_rng(5), np.random.default_rng(5)))

    assert np.array_equal(first, again)


def test_a_stroke_lies_where_the_digit_is_dark(fields):
    digits, _ = looks.digits()
    for number in range(10):
        cells = looks.cells(looks.draw(fields[number]).stroke[..., 0])

        assert np.corrcoef(cells, digits[number].reshape(-1))[0, 1] > 0.7


def test_neon_is_told_from_ink_by_its_border(fields):
    random = np.random.default_rng(0)
    covers = [looks.draw(field, random) for field in fields]

    neon = np.stack([looks.neon(cover, hue) for cover, hue in zip(covers, [*looks.HUES.values()] * 4)])
    ink = np.stack([looks.ink(cover, random) for cover in covers])

    assert quality.is_neon(neon).all()
    assert not quality.is_neon(ink).any()


def test_a_black_picture_is_not_neon():
    assert not quality.is_neon(np.zeros((1, 64, 64, 3), np.float32)).any()


def test_a_digit_has_the_same_strokes_in_both_looks(fields):
    covers = [looks.draw(field) for field in fields]

    ink = quality.strokes_of(np.stack([looks.painted(cover, looks.PAPER, looks.INK) for cover in covers]))
    neon = quality.strokes_of(np.stack([looks.neon(cover, 0.5) for cover in covers]))

    for one, other in zip(ink, neon):
        assert np.corrcoef(looks.cells(one), looks.cells(other))[0, 1] > 0.9


def test_known_words_are_one_token_and_others_are_spelled():
    tokenizer = parts.new_tokenizer()

    assert tokenizer.tokenize("A handwritten Seven in pink neon") == ["a", "handwritten", "seven", "in", "pink", "neon"]
    assert tokenizer.tokenize("café 42") == ["c", "##a", "##f", "##e", "4", "##2"]


def test_a_prompt_is_padded_and_keeps_its_end_token_when_cut():
    tokenizer = parts.new_tokenizer()

    short, long = tokenizer(["a seven", "one " * 40], padding="max_length", truncation=True, max_length=parts.TOKENS)["input_ids"]

    assert short[3:] == [tokenizer.pad_token_id] * 13
    assert long[-1] == tokenizer.eos_token_id


def test_no_caption_of_the_base_has_a_word_of_the_new_style():
    words = {word for digit in range(10) for caption in prepare.base_captions(digit) for word in caption.split()}

    assert words.isdisjoint({"neon", *looks.HUES})


def test_different_digits_have_different_embeddings():
    tokenizer, encoder = parts.new_tokenizer(), parts.new_text_encoder(1)
    prompts = [f"a handwritten {name}" for name in looks.NAMES]

    hidden = encoder(**tokenizer(prompts, padding="max_length", max_length=parts.TOKENS, return_tensors="pt"))[0].detach()[:, 2]

    distances = torch.cdist(hidden, hidden) + 100 * torch.eye(10)
    assert distances.min() > 0.5 * hidden.norm(dim=1).mean()


def test_the_vae_learns_and_states_its_scale():
    pictures = torch.rand(24, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 64, 64) * 2 - 1

    trained = vae.train_vae(pictures, pictures, steps=40, seed=0, report=lambda line: None)

    assert vae.fidelity_db(trained, pictures[:6]) > vae.fidelity_db(vae.new_vae(0).eval(), pictures[:6]) + 2
    assert abs(vae.encode(trained, pictures[::7]).std() * trained.config.scaling_factor - 1) < 1e-3
