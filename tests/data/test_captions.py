from __future__ import annotations

import pytest

from simpletuner.data.captions import STRATEGIES, CaptionRule, captions_of, decode, sidecar_of


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_at_least_one_caption_for_any_name_and_text(strategy):
    rule = CaptionRule(strategy, instance_prompts=("a cat",))

    for name in ("x.png", "a/_.png", "日本.webp"):
        for text in ("", "\n \n", "one\ntwo"):
            captions = captions_of(rule, name, text)
            assert captions and all(isinstance(caption, str) for caption in captions)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_photo_of_a_cat.png", "a photo of a cat"),
        ("folder_name/x.y_z.webp", "x.y z"),
        ("_.png", ""),
        ("wie_schön.jpeg", "wie schön"),
    ],
)
def test_a_file_name_is_a_caption(name, caption):
    assert captions_of(CaptionRule("filename"), name) == (caption,)


def test_each_line_of_a_text_file_is_an_alternative():
    assert captions_of(CaptionRule("textfile"), "x.png", " a cat \r\n\r\n\tthe cat\n") == ("a cat", "the cat")


def test_a_text_file_can_be_one_caption():
    rule = CaptionRule("textfile", splits_lines=False)

    assert captions_of(rule, "x.png", "\na cat,\r\n  red \n\n") == ("a cat,\nred",)


def test_an_empty_text_file_is_an_image_without_words():
    assert captions_of(CaptionRule("textfile"), "x.png", " \n") == ("",)
    assert captions_of(CaptionRule("textfile", splits_lines=False), "x.png", "") == ("",)


def test_instance_prompts_are_alternatives():
    assert captions_of(CaptionRule("instanceprompt", ("a cat", "my cat")), "dog.png") == ("a cat", "my cat")


def test_an_instance_prompt_can_begin_each_caption():
    rule = CaptionRule("textfile", ("sks style,", "by sks,"), prepends_prompt=True)

    assert captions_of(rule, "x.png", "a cat\na dog") == ("sks style, a cat", "by sks, a cat", "sks style, a dog", "by sks, a dog")
    assert captions_of(rule, "x.png", "") == ("sks style,", "by sks,")


def test_only_textfile_needs_a_file_beside_the_image():
    assert sidecar_of(CaptionRule("textfile"), "a.b/cat.01.png") == "a.b/cat.01.txt"
    assert sidecar_of(CaptionRule("filename"), "cat.png") is None


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("schön".encode(), "schön", "utf-8"),
        ("schön".encode("utf-8-sig"), "schön", "utf-8"),
        ("schön".encode("utf-16"), "schön", "utf-16"),
        ("schön".encode("latin-1"), "schön", "latin-1"),
        (b"", "", "utf-8"),
        (b"\xff\xfe\x00", "ÿþ\x00", "latin-1"),
    ],
)
def test_text_is_read_in_the_encoding_it_is_in(data, text, encoding):
    assert decode(data) == (text, encoding)


def test_config_json_knows_every_strategy():
    from typing import get_args

    from simpletuner.options.data import Data

    assert set(get_args(Data.model_fields["caption_strategy"].annotation)) == set(STRATEGIES)
