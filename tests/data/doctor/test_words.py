"""What is wrong with captions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simpletuner.data.doctor.words import estimate_tokens
from tests.builders.demonstration import MODEL

TEXTS = {"id": "set", "instance_data_dir": "images", "caption_strategy": "textfile"}


@pytest.fixture
def caption(draw, workplace):
    """Save an image and its caption."""

    def write(name: str, text: str, seed: int) -> None:
        draw(f"images/{name}.png", seed=seed)
        (workplace / "images" / f"{name}.txt").write_text(text, encoding="utf-8")

    return write


def test_empty_overlong_and_missing_captions_are_told(caption, draw, check, problems):
    caption("good", "a lake", 1)
    caption("empty", " \n", 2)
    caption("long", "word " * 60, 3)
    draw("images/bare.png", seed=4)

    report = check(TEXTS)

    assert problems(report, "empty caption")[0].files == ("empty.png",)
    assert problems(report, "no caption")[0].files == ("bare.png",)
    [long] = problems(report, "long caption")
    assert long.files == ("long.png",)
    assert "24 tokens" in long.message and "(estimated)" in long.message


def test_a_tokenizer_at_hand_is_asked_and_nothing_is_called_estimated(caption, check, problems):
    caption("one", "a b c", 1)
    model = replace(MODEL, text_tokens=2, count_tokens=lambda texts: [len(text.split()) for text in texts])

    report = check(TEXTS, model=model)

    assert problems(report, "long caption")[0].message == "1 caption longer than the 2 tokens that the model reads, the longest 3"
    assert report.datasets[0].figures["longest_caption_tokens"] == 3


def test_captions_shared_by_many_images_are_counted(caption, check, problems):
    for number in range(4):
        caption(f"same{number}", "one and the same", number)
    for number in range(6):
        caption(f"own{number}", f"picture {number}", 10 + number)

    [problem] = problems(check(TEXTS), "repeated caption")

    assert problem.message == "40% of the images share their caption with another, 4 of them 'one and the same'"
    assert len(problem.files) == 4


def test_an_instance_prompt_is_said_once_for_all(draw, check, problems):
    for number in range(3):
        draw(f"images/{number}.png", seed=number)

    [problem] = problems(check({**TEXTS, "caption_strategy": "instanceprompt", "instance_prompt": "sks cat"}), "repeated caption")

    assert problem.message == "every image has the same caption: 'sks cat'" and not problem.files


@pytest.mark.parametrize(("text", "tokens"), [("", 1), ("a cat", 3), ("海辺の夕暮れ", 6), ("word " * 100, 126)])
def test_tokens_are_estimated_from_bytes(text, tokens):
    assert estimate_tokens(text) == tokens
