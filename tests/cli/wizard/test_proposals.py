"""What is proposed: functions of the machine, the pictures and the answers before."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.cli.wizard.figures import readable, rounded
from simpletuner.cli.wizard.machine import Card, Machine
from simpletuner.cli.wizard.pictures import Pictures
from simpletuner.cli.wizard.pitfalls import pitfalls
from simpletuner.cli.wizard.proposals import RULES, Situation, propose
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.train_config import declared
from tests.cli.wizard.conftest import BILLIONS, facts


@pytest.mark.parametrize(
    ("gigabytes", "family", "precision"),
    [(0, "sd1x", "no_change"), (6, "sd1x", "no_change"), (8, "sdxl", "no_change"), (12, "auraflow", "int8-quanto")],
)
def test_the_family_and_its_precision_follow_the_card(propose_for, gigabytes, family, precision):
    s = propose_for(gigabytes)

    assert (s.value("model_family"), s.value("base_model_precision")) == (family, precision)


def test_a_model_twice_too_large_in_8_bits_is_proposed_in_4(propose_for):
    assert propose_for(10, model_family="flux").value("base_model_precision") == "nf4-bnb"


@pytest.mark.parametrize(
    ("chosen", "rate"),
    [
        ({}, 1e-4),
        ({"lora_type": "lycoris"}, 2e-4),
        ({"model_type": "full"}, 1e-5),
        ({"optimizer": "optimi-lion"}, 1e-5),
        ({"optimizer": "bnb-lion8bit", "lora_type": "lycoris"}, 2e-5),
        ({"optimizer": "prodigy"}, 1.0),
        ({"optimizer": "torch-adadelta"}, 1.0),
    ],
)
def test_the_rate_is_for_the_optimizer_and_what_is_trained(propose_for, chosen, rate):
    assert propose_for(**chosen).value("learning_rate") == pytest.approx(rate)


@pytest.mark.parametrize(("optimizer", "schedule"), [("torch-adamw", "cosine"), ("adamw_schedulefree", "constant"), ("prodigy", "constant")])
def test_the_schedule_is_one_that_the_optimizer_is_made_for(propose_for, optimizer, schedule):
    assert propose_for(optimizer=optimizer).value("lr_scheduler") == schedule


def test_small_pictures_lower_the_resolution_to_their_size(propose_for):
    assert propose_for(size=(800, 700)).value("resolution") == 704
    assert propose_for(size=(4000, 3000)).value("resolution") == 1024
    assert propose_for(size=(4000, 3000), model_family="sd1x").value("resolution") == 512


def test_a_few_tiny_pictures_are_left_out_and_many_are_not(propose_for):
    s = propose_for()
    few = dataclasses.replace(s.pictures, sizes=(*s.pictures.sizes, (300, 300)), has_text=(True,) * 21)
    many = dataclasses.replace(s.pictures, sizes=(*s.pictures.sizes, *[(300, 300)] * 9), has_text=(True,) * 29)

    assert propose(dataclasses.replace(s, pictures=few, found={}))["minimum_image_size"].value == 512
    assert propose(dataclasses.replace(s, pictures=many, found={}))["minimum_image_size"].value == 0


def test_a_card_without_bf16_gets_fp16_and_a_cpu_float32(propose_for):
    old = Machine((Card("Tesla T4", 16 * 10**9, 16 * 10**9, has_bf16=False),))

    assert propose_for(machine=old).value("mixed_precision") == "fp16"
    assert propose_for(0).value("mixed_precision") == "no"


@pytest.mark.parametrize(
    ("family", "ram", "mixed", "precision", "warns"),
    [
        ("sd1x", 24, "no", "no_change", 0),
        ("flux", 64, "no", "no_change", 0),
        ("flux", 40, "bf16", "no_change", 0),
        ("flux", 24, "bf16", "int8-quanto", 0),
        ("flux", 12, "bf16", "int8-quanto", 1),
    ],
)
def test_without_a_card_precisions_follow_main_memory(propose_for, family, ram, mixed, precision, warns):
    s = propose_for(machine=Machine(ram_bytes=ram * 10**9), model_family=family)

    assert (s.value("mixed_precision"), s.value("base_model_precision")) == (mixed, precision)
    assert sum("likely not to fit" in text for text in pitfalls(s)) == warns


def test_steps_and_ranks_reckon_with_the_pictures_that_train(propose_for):
    s = propose_for(count=60, caption_strategy="textfile")
    pictures = dataclasses.replace(s.pictures, sizes=(*[(1400, 1000)] * 10, (300, 300), *[(200, 200)] * 49), has_text=(True,) * 11 + (False,) * 49)
    s = dataclasses.replace(s, pictures=pictures, found={})

    found = propose(s)

    assert found["minimum_image_size"].value == 512 and s.trained.count == 10
    assert "for 10 pictures" in found["lora_rank"].reason and "each of 10 pictures" in found["max_train_steps"].reason
    assert not any("enlarged" in text for text in pitfalls(s))


def test_questions_of_another_adapter_are_not_asked(propose_for):
    assert "lokr_factor" not in propose_for().found
    assert "lora_rank" not in propose_for(lora_type="lycoris").found
    assert not {"lora_type", "lora_rank", "lokr_factor", "blocks_to_swap"} & propose_for(model_type="full").found.keys()


def test_feed_forward_layers_are_left_out_where_they_are_known_to_fail(propose_for):
    assert propose_for(model_family="sdxl", lora_type="lycoris").value("lokr_layers") == "attention"
    assert propose_for(model_family="auraflow", lora_type="lycoris").value("lokr_layers") == "attention+feedforward"


def test_captions_are_taken_from_where_they_are():
    def strategy(**found):
        empty = Situation(Machine(), Pictures("cats", ((9, 9),) * 4, **found), {"model_family": "sd1x"}, facts, lambda family: {"first": 1})
        return propose(empty)

    assert strategy(has_text=(True,) * 4)["caption_strategy"].value == "textfile"
    assert strategy(telling_names=3)["caption_strategy"].value == "filename"
    assert strategy()["instance_prompt"].value == "a photo of cats"


numbers = st.integers(1, 5000)
answers = st.fixed_dictionaries(
    {},
    optional={
        "model_family": st.sampled_from(sorted(BILLIONS)),
        "model_type": st.sampled_from(["lora", "full"]),
        "lora_type": st.sampled_from(["standard", "lycoris"]),
        "optimizer": st.sampled_from(["torch-adamw", "prodigy", "lion", "torch-sgd"]),
        "train_batch_size": st.integers(1, 64),
        "resolution": st.sampled_from([256, 512, 1024]),
    },
)


@given(st.integers(0, 200), st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30), answers)
def test_whatever_there_is_the_options_proposed_go_together(gigabytes, sizes, chosen):
    cards = (Card("card", gigabytes * 10**9, gigabytes * 10**9),) if gigabytes else ()
    situation = Situation(Machine(cards), Pictures("cats", tuple(sizes)), chosen, facts, lambda family: {"first": BILLIONS[family]})

    found = propose(situation)

    assert list(found) == [key for key in RULES if key in found]
    values = {key: situation.value(key) for key in {**found, **chosen} if key in declared() and situation.value(key) != ""}
    load_config([Setting(key, value, "test") for key, value in values.items()], lambda *names: {})
    assert all(proposal.reason for key, proposal in found.items() if key != "pretrained_model_name_or_path")


def test_rhythms_are_numbers_that_one_counts_in():
    assert [readable(number) for number in (0.1, 0.6, 7, 22.5, 56, 230, 1200)] == [0, 1, 5, 20, 50, 250, 1000]


@given(st.floats(1, 1e7))
def test_rounding_stays_near(number):
    assert abs(rounded(number) - number) <= max(0.5, 0.26 * number)
    assert rounded(rounded(number)) == rounded(number)
