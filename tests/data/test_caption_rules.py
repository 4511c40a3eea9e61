"""From what a user writes about captions to the rule for their versions."""

from __future__ import annotations

import json

import pytest

from simpletuner.data.variation import Variation
from simpletuner.errors import ConfigError

HERE = {"id": "set", "instance_data_dir": "."}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "cache_dir": "cache/text"}


def variation(plan_of, *texts, **keys) -> Variation | None:
    return plan_of({**HERE, **keys}, *texts).datasets[0].variation


def problems(plan_of, *entries) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(*entries)
    return caught.value.message


def test_captions_are_trained_as_they_are_unless_asked(plan_of):
    assert variation(plan_of) is None
    assert variation(plan_of, caption_shuffle={"enable": False, "count": 9}, caption_tag_dropout=0, caption_wildcards="false") is None


def test_a_block_is_read_as_users_write_it(plan_of):
    block = {"enable": "true", "count": "4", "seed": 3, "split_on": "space", "position_start": 2, "include_original": False, "_why": "mine"}

    assert variation(plan_of, caption_shuffle=block) == Variation(4, 3, True, "space", 2, False)
    assert variation(plan_of, caption_shuffle=True) == variation(plan_of, caption_shuffle={"seed": None}) == Variation(1, shuffles=True)


def test_dropout_and_wildcards_use_the_block_too(plan_of):
    block = {"enable": False, "count": 7, "position_start": 1}

    assert variation(plan_of, caption_tag_dropout=0.2, caption_shuffle=block) == Variation(7, kept_tags=1, tag_dropout=0.2)
    assert variation(plan_of, caption_tag_dropout=0.2, caption_wildcards=True, caption_shuffle=True) == Variation(
        4, shuffles=True, tag_dropout=0.2, has_wildcards=True
    )
    assert variation(plan_of, caption_wildcards=True) == Variation(4, has_wildcards=True)


def test_an_instance_prompt_that_begins_captions_is_kept(plan_of):
    shuffled = {"caption_shuffle": True, "instance_prompt": [" sks,", "by sks,"]}

    assert variation(plan_of, prepend_instance_prompt=True, **shuffled).heads == ("sks,", "by sks,")
    assert variation(plan_of, only_instance_prompt=True, **shuffled).heads == ()
    assert variation(plan_of, caption_strategy="instanceprompt", prepend_instance_prompt=True, **shuffled).heads == ()


def test_filters_come_from_the_entry_that_a_dataset_uses(plan_of):
    first = {**TEXTS, "caption_filter_list": ["cat"]}
    second = {**TEXTS, "id": "more", "caption_filter_list": ["s/a/b/"]}

    plan = plan_of(HERE, {**HERE, "id": "two", "text_embeds": "more"}, first, second)

    assert [[one.written for one in dataset.variation.filters] for dataset in plan.datasets] == [["cat"], ["s/a/b/"]]
    assert plan.notes == ()


def test_a_filter_list_that_no_dataset_uses_is_said(plan_of):
    notes = plan_of(HERE, TEXTS, {**TEXTS, "id": "more", "caption_filter_list": ["cat"]}).notes

    assert "dataset 'more': caption_filter_list without effect: no dataset uses this entry" in notes


def test_filters_may_stand_in_a_file_whose_name_has_placeholders(plan_of, workplace):
    (workplace / "output").mkdir()
    (workplace / "output" / "words.json").write_text(json.dumps(["cat", "a{2}"]))

    found = variation(plan_of, {**TEXTS, "caption_filter_list": "{output_dir}/words.json"})

    assert [one.written for one in found.filters] == ["cat", "a{2}"]


def test_braces_in_a_filter_are_no_placeholders(plan_of):
    assert variation(plan_of, {**TEXTS, "caption_filter_list": ["a{2}", "{id}"]}).filters[0].written == "a{2}"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"caption_shuffle": {"coun": 3}}, "caption_shuffle: unknown key 'coun'; did you mean 'count'?"),
        ({"caption_shuffle": {"count": 0}}, "caption_shuffle.count is 0; it must be greater than or equal to 1"),
        ({"caption_shuffle": {"count": 10**9}}, "caption_shuffle.count is 1000000000; it must be less than or equal to 10000"),
        (
            {"caption_shuffle": {"split_on": "tab", "position_start": -1}},
            "caption_shuffle.split_on is 'tab'; it must be 'comma', 'space' or 'period'",
        ),
        (
            {"caption_shuffle": {"split_on": "tab", "position_start": -1}},
            "caption_shuffle.position_start is -1; it must be greater than or equal to 0",
        ),
        ({"caption_tag_dropout": 1.5}, "caption_tag_dropout is 1.5; it must be less than or equal to 1"),
        ({"caption_wildcards": "maybe"}, "caption_wildcards is 'maybe'; it must be true or false"),
    ],
)
def test_what_cannot_be_is_refused_with_its_rule(plan_of, keys, problem):
    assert f"dataset 'set': {problem}" in problems(plan_of, {**HERE, **keys})


def test_every_broken_filter_is_named(plan_of, workplace):
    (workplace / "words.txt").write_text("cat\n\na(b\n")

    message = problems(
        plan_of, HERE, {**TEXTS, "caption_filter_list": ["[", "cat", "s/a/b"]}, {**TEXTS, "id": "more", "caption_filter_list": "words.txt"}
    )

    assert "dataset 'texts': caption_filter_list, entry 1: '[' is no regular expression" in message
    assert "dataset 'texts': caption_filter_list, entry 3: 's/a/b' begins like s/pattern/replacement/" in message
    assert "dataset 'more': words.txt, line 3: 'a(b' is no regular expression" in message


@pytest.mark.parametrize(
    ("keys", "options", "note"),
    [
        ({"caption_filter_list": ["cat"]}, {}, "caption_filter_list belongs into a text_embeds entry"),
        ({"caption_shuffle": {"include_original": False}}, {}, "caption_shuffle gives each caption one other order, for good"),
        ({"caption_wildcards": True, "caption_shuffle": {"enable": False, "split_on": "space"}}, {}, "split_on of caption_shuffle without effect"),
        ({"caption_tag_dropout": 1}, {}, "caption_tag_dropout is 1: no version but the original has any tag"),
        (
            {"caption_shuffle": True, "caption_wildcards": True},
            {"caption_dropout_probability": 1},
            "caption_shuffle, caption_wildcards without effect: caption_dropout_probability is 1",
        ),
    ],
)
def test_a_setting_without_effect_is_said_aloud(plan_of, keys, options, note):
    assert [line for line in plan_of({**HERE, **keys}, **options).notes if line.startswith(f"dataset 'set': {note}")]


def test_a_plan_says_how_captions_vary(plan_of):
    block = {"count": 3, "position_start": 1, "seed": 2}
    entries = ({**HERE, "caption_shuffle": block, "caption_tag_dropout": 0.1, "caption_wildcards": True}, {**TEXTS, "caption_filter_list": ["cat"]})

    (line, _) = plan_of(*entries).describe()

    steps = "with wildcards, 1 filter, 10% of tags dropped, tags shuffled, split at commas, the first 1 kept"
    assert f"captions: filename, {steps}, 4 versions of each with the original, seed 2;" in line
