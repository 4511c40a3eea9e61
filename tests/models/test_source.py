from __future__ import annotations

import json
import re
import shutil

import pytest

from simpletuner.errors import ConfigError
from simpletuner.models.source import Source, find_weights, is_local
from simpletuner.options.models import Models

FLAVOURS = {"large": "maker/large", "small": "maker/small"}


def source(**options) -> Source:
    return Source(Models(model_family="auraflow", **options), FLAVOURS)


def test_the_first_flavour_is_the_default_and_a_path_wins_over_a_flavour():
    assert source().location == "maker/large" and source().flavour == "large"
    assert source(model_flavour="small").location == "maker/small"
    chosen = source(model_flavour="small", pretrained_model_name_or_path="someone/else")
    assert chosen.location == "someone/else" and chosen.flavour == "small" and not chosen.is_released


def test_a_path_that_is_a_flavour_is_that_flavour():
    assert source(pretrained_model_name_or_path="maker/small").flavour == "small"
    assert source(pretrained_model_name_or_path="someone/else").flavour is None


def test_a_wrong_flavour_is_answered_with_the_nearest_right_one():
    with pytest.raises(ConfigError, match="'smal' is not a flavour of auraflow") as caught:
        source(model_flavour="smal")

    assert "did you mean 'small'?" in caught.value.hint and "large" in caught.value.hint


@pytest.mark.parametrize("location", ["./maker/large", "/maker/large", "~/large", "a/b/c", "large", "maker/large.safetensors", "maker/config.json"])
def test_a_path_is_told_from_a_hub_id(location):
    assert is_local(location) and not is_local("maker/large") and not is_local("maker-1/large_v0.3")


def test_a_folder_here_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "large").mkdir(parents=True)

    assert is_local("maker/large") and not source().is_released


def test_a_part_is_read_from_its_folder(tiny):
    part = source(pretrained_model_name_or_path=str(tiny)).part("transformer")

    assert part.folder() == tiny / "transformer" and part.config()["num_mmdit_layers"] == 1
    assert part.files() == {name: tiny / "transformer" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")}


def test_a_tokenizer_is_all_of_its_files_but_hidden_ones(copy):
    (copy / "tokenizer" / ".cache").touch()

    assert set(source(pretrained_model_name_or_path=str(copy)).part("tokenizer").files()) == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("inside", ["vae", ""], ids=["in its sub-folder", "at the root"])
def test_a_part_may_come_from_elsewhere(tiny, tmp_path, inside):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny / "vae", elsewhere / inside, dirs_exist_ok=True)

    chosen = source(pretrained_model_name_or_path=str(tiny), pretrained_vae_model_name_or_path=str(elsewhere))

    assert chosen.part("vae").folder() == elsewhere / inside and chosen.is_replaced("vae")
    assert chosen.part("transformer").folder() == tiny / "transformer" and not chosen.is_replaced("transformer")


def test_a_sub_folder_that_was_named_is_the_only_one_looked_into(tiny, tmp_path):
    shutil.copytree(tiny / "transformer", tmp_path / "step_100")

    chosen = source(pretrained_transformer_model_name_or_path=str(tmp_path), pretrained_transformer_subfolder="step_100")
    wrong = source(pretrained_transformer_model_name_or_path=str(tmp_path), pretrained_transformer_subfolder="step_200")

    assert chosen.part("transformer").folder() == tmp_path / "step_100"
    with pytest.raises(ConfigError, match=r"no step_200/config\.json") as caught:
        wrong.part("transformer").folder()
    assert "step_100/" in caught.value.hint


def test_the_revision_is_that_of_the_model_and_not_of_what_replaces_a_part():
    chosen = source(revision="abc", pretrained_vae_model_name_or_path="someone/vae")

    assert chosen.part("transformer").revision == "abc" and chosen.part("vae").revision is None


def test_the_classes_of_parts_are_those_of_the_models_own_list(tiny):
    chosen = source(pretrained_model_name_or_path=str(tiny))

    assert chosen.class_of("text_encoder").__name__ == "UMT5EncoderModel"
    assert chosen.class_of("scheduler").__name__ == "FlowMatchEulerDiscreteScheduler"


def test_a_class_that_is_not_installed_is_named(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", "UMT9EncoderModel"]}))

    with pytest.raises(ConfigError, match="its text_encoder is a UMT9EncoderModel of transformers"):
        source(pretrained_model_name_or_path=str(copy)).class_of("text_encoder")


def test_broken_json_is_named_with_its_place(copy):
    (copy / "vae" / "config.json").write_text('{"a": 1,\n "b"')

    with pytest.raises(ConfigError, match=r"vae/config\.json is not valid JSON: .* line 2 column"):
        source(pretrained_model_name_or_path=str(copy)).part("vae").config()


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("there", "variant", "found"),
    [
        ([f"{STEM}.safetensors"], None, (None, [f"{STEM}.safetensors"])),
        (["model.safetensors"], None, (None, ["model.safetensors"])),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], "fp16", ("fp16", [f"{STEM}.fp16.safetensors"])),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], None, (None, [f"{STEM}.safetensors"])),
        ([f"{STEM}.safetensors"], "fp16", (None, [f"{STEM}.safetensors"])),
        ([f"{STEM}.fp16.safetensors"], None, None),
        ([f"{STEM}.bin"], None, None),
        ([], None, None),
    ],
)
def test_weights_are_found_by_name_and_variant(tmp_path, there, variant, found):
    for name in there:
        (tmp_path / name).touch()

    assert find_weights(tmp_path, variant) == found


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_found_through_their_index_and_only_all_together(tmp_path, variant):
    dot = f".{variant}" if variant else ""
    shards = [f"{STEM}{dot}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = f"{STEM}.safetensors.index{dot}.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}))
    (tmp_path / shards[0]).touch()

    assert find_weights(tmp_path, variant) is None
    (tmp_path / shards[1]).touch()
    assert find_weights(tmp_path, variant) == (variant, [index, *shards])


@pytest.mark.parametrize(
    ("there", "hint"),
    [([f"{STEM}.fp16.safetensors"], "Set variant to fp16."), ([f"{STEM}.bin"], "Pickled weights"), ([], f"should hold {STEM}.safetensors")],
)
def test_a_part_without_usable_weights_says_what_there_is_and_what_to_do(copy, there, hint):
    (copy / "vae" / f"{STEM}.safetensors").unlink()
    for name in there:
        (copy / "vae" / name).touch()

    with pytest.raises(ConfigError, match=f"no weights in safetensors.*{', '.join(['config.json', *there])}") as caught:
        source(pretrained_model_name_or_path=str(copy)).part("vae").files()
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"revision": "v2"}, "revision has no effect"),
        ({"variant": "fp61"}, "variant has no effect: no part of .* has files of variant fp61"),
        ({"variant": "fp16"}, None),
        ({"single_file_base_model": "maker/large"}, "single_file_base_model has no effect"),
        ({}, None),
    ],
)
def test_settings_that_a_folder_has_no_use_for_are_said(copy, options, said):
    (copy / "vae" / f"{STEM}.safetensors").rename(copy / "vae" / f"{STEM}.fp16.safetensors")

    notes = source(pretrained_model_name_or_path=str(copy), **options).notes(("vae", "transformer", "tokenizer"))

    assert len(notes) == (0 if said is None else 1)
    assert said is None or re.match(said, notes[0])
