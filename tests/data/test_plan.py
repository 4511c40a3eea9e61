from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.data.backends.local import LocalOptions
from simpletuner.data.cache_entries import BucketTextEmbedsOptions
from simpletuner.data.cache_place import LocalPlace
from simpletuner.data.captions import CaptionRule
from simpletuner.data.geometry import GeometryRule, Measure
from simpletuner.data.plan import load_plan
from simpletuner.data.window import Window
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.options.data import Data

VARIABLES = {"model_family": "auraflow", "output_dir": "output"}
DOCS = Path(__file__).parents[2] / "docs" / "dataloader.md"
AURAFLOW = """
[
  {
    "id": "pseudo-camera-10k-auraflow", "type": "local", "crop": true, "crop_aspect": "square", "crop_style": "center",
    "resolution": 1024, "minimum_image_size": 1024, "maximum_image_size": 1024, "target_downsample_size": 1024,
    "resolution_type": "pixel_area", "cache_dir_vae": "cache/vae/auraflow/pseudo-camera-10k",
    "instance_data_dir": "datasets/pseudo-camera-10k", "disabled": false, "skip_file_discovery": "",
    "caption_strategy": "filename", "metadata_backend": "discovery", "repeats": 0, "is_regularisation_data": true
  },
  {
    "id": "dreambooth-subject", "type": "local", "crop": false, "resolution": 1024, "minimum_image_size": 1024,
    "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae/auraflow/dreambooth-subject", "instance_data_dir": "datasets/dreambooth-subject",
    "caption_strategy": "instanceprompt", "instance_prompt": "the name of your subject goes here",
    "metadata_backend": "discovery", "repeats": 1000
  },
  {
    "id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true,
    "cache_dir": "cache/text/auraflow", "disabled": false, "write_batch_size": 128
  }
]
"""
SDXL = """
[
  {
    "id": "pseudo-camera-10k-sdxl", "type": "local", "crop": true, "crop_aspect": "square", "crop_style": "random",
    "resolution": 1.0, "minimum_image_size": 0.25, "maximum_image_size": 1.0, "target_downsample_size": 1.0,
    "resolution_type": "area", "cache_dir_vae": "cache/vae/sdxl/pseudo-camera-10k",
    "instance_data_dir": "datasets/pseudo-camera-10k", "disabled": false, "skip_file_discovery": "",
    "caption_strategy": "filename", "metadata_backend": "discovery"
  },
  {
    "id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true,
    "cache_dir": "cache/text/sdxl/pseudo-camera-10k", "disabled": false, "write_batch_size": 128
  }
]
"""
HERE = {"id": "set", "instance_data_dir": "."}
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "cache_dir": "cache/text"}


def problems(plan_of, *entries, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(*entries, **options)
    assert caught.value.exit_code == 2
    return caught.value.message


def load_text(workplace, text: str, **options):
    path = workplace / "multidatabackend.json"
    path.write_text(text, encoding="utf-8")
    return load_plan(path, Data(**options), VARIABLES, alignment_px=64)


def test_the_auraflow_quickstart_loads_as_it_stands(workplace):
    for name in ("pseudo-camera-10k", "dreambooth-subject"):
        (workplace / "datasets" / name).mkdir(parents=True)

    plan = load_text(workplace, AURAFLOW)

    plain, subject = plan.datasets
    size = Measure(1024, "pixel_area")
    assert plain.geometry == GeometryRule(size, 64, 2, True, "center", "square", minimum=size, maximum=size, target=size)
    assert plain.captions == CaptionRule("filename")
    assert (plain.is_regularisation, plain.repeats) == (True, 0)
    assert subject.captions == CaptionRule("instanceprompt", ("the name of your subject goes here",))
    assert (subject.is_regularisation, subject.repeats) == (False, 1000)
    assert subject.latents_place == LocalPlace(Path("cache/vae/auraflow/dreambooth-subject"))
    assert plan.text_place == LocalPlace(Path("cache/text/auraflow"))
    assert [note.split(" without effect")[0] for note in plan.notes] == ["dataset 'dreambooth-subject': maximum_image_size, target_downsample_size"]


def test_the_sdxl_quickstart_loads_as_it_stands(workplace):
    (workplace / "datasets/pseudo-camera-10k").mkdir(parents=True)

    plan = load_text(workplace, SDXL)

    megapixel = Measure(1.0, "area")
    assert plan.datasets[0].geometry == GeometryRule(
        megapixel, 64, 2, True, "random", "square", minimum=Measure(0.25, "area"), maximum=megapixel, target=megapixel
    )
    assert plan.notes == ()


def test_a_dry_run_is_told_each_dataset_in_a_line(workplace):
    for name in ("pseudo-camera-10k", "dreambooth-subject"):
        (workplace / "datasets" / name).mkdir(parents=True)

    lines = load_text(workplace, AURAFLOW).describe()

    assert len(lines) == 3
    for fact in ("datasets/pseudo-camera-10k", "1024 x 1024 px of area", "square, center", "captions: filename", "repeats 0", "regularisation"):
        assert fact in lines[0]
    assert "latents in cache/vae/auraflow/dreambooth-subject" in lines[1]


def test_values_written_as_text_comments_and_old_spellings_are_read(workplace):
    (workplace / "images").mkdir()

    plan = load_text(
        workplace,
        """[{ // mine
            "id": "set", "_comment": "x", "instance_data_root": "images", "resolution": "512", "crop": "true", "crop_style": "centre",
            "repeats": "2", "is_regularization_data": "true", "disable": "false", "train_batch_size": null, "caption_strategy": "instance_prompt",
            "instance_prompt": ["a cat", "my cat"],
        },]""",
    )

    dataset = plan.datasets[0]
    assert dataset.geometry.resolution == Measure(512, "pixel_area")
    assert (dataset.geometry.is_cropped, dataset.geometry.crop_style, dataset.repeats) == (True, "center", 2)
    assert (dataset.is_regularisation, dataset.train_batch_size) == (True, None)
    assert dataset.captions == CaptionRule("instanceprompt", ("a cat", "my cat"))


def test_what_an_entry_leaves_open_is_taken_from_config_json(plan_of):
    dataset = plan_of(
        HERE,
        alignment_px=16,
        resolution=512,
        resolution_type="pixel",
        minimum_image_size=256,
        caption_strategy="textfile",
        instance_prompt="sks",
        prepend_instance_prompt=True,
        cache_dir="kept",
    ).datasets[0]

    assert dataset.geometry == GeometryRule(Measure(512, "pixel"), 16, 2, False, minimum=Measure(256, "pixel"))
    assert dataset.captions == CaptionRule("textfile", ("sks",), prepends_prompt=True)
    assert dataset.latents_place == LocalPlace(Path("kept/vae/auraflow/set"))


def test_sizes_from_config_json_keep_their_unit_in_a_dataset_of_another(plan_of):
    plan = plan_of({**HERE, "resolution": 0.5, "resolution_type": "area"}, resolution=1024, resolution_type="pixel_area", minimum_image_size=256)

    assert plan.datasets[0].geometry.resolution == Measure(0.5, "area")
    assert plan.datasets[0].geometry.minimum == Measure(256, "pixel_area")


def test_a_size_of_zero_is_no_limit(plan_of):
    assert plan_of({**HERE, "minimum_image_size": 0}, minimum_image_size=512).datasets[0].geometry.minimum is None


def test_the_alignment_is_the_familys_unless_set(plan_of):
    assert plan_of(HERE, alignment_px=4).datasets[0].geometry.alignment_px == 4
    assert plan_of(HERE, alignment_px=4, aspect_bucket_alignment=16).datasets[0].geometry.alignment_px == 16


def test_placeholders_are_filled_in(plan_of, workplace, monkeypatch):
    monkeypatch.setenv("PHOTOS", "pictures")
    (workplace / "pictures" / "set").mkdir(parents=True)

    plan = plan_of(
        {"id": "set", "instance_data_dir": "{env:PHOTOS}/{id}", "cache_dir_vae": "{output_dir}/{model_family}/{id}"},
        {"id": "more", "instance_data_dir": "{example}/set", "instance_prompt": "{a|b} {mood}", "caption_strategy": "instanceprompt"},
        variables={"example": "pictures"},
    )

    assert plan.datasets[0].open().place == "pictures/set"
    assert plan.datasets[0].latents_place == LocalPlace(Path("output/auraflow/set"))
    assert plan.datasets[1].open().place == "pictures/set"
    assert plan.datasets[1].captions.instance_prompts == ("{a|b} {mood}",)


def test_a_placeholder_without_a_value_is_a_problem(plan_of, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)

    message = problems(plan_of, {"id": "a", "instance_data_dir": "{env:NOWHERE}/x"}, {"id": "b", "instance_data_dir": "{modelfamily}"})

    assert "dataset 'a': instance_data_dir is '{env:NOWHERE}/x', but the environment has no variable NOWHERE" in message
    assert "did you mean 'model_family'?" in message


def test_text_embeddings_go_where_the_default_entry_says(plan_of):
    assert plan_of(HERE).text_place == LocalPlace(Path("cache/text/auraflow"))
    assert plan_of(HERE, TEXTS).text_place == LocalPlace(Path("cache/text"))
    plan = plan_of(HERE, {**TEXTS, "id": "other", "cache_dir": "other"}, {**TEXTS, "default": True})
    assert plan.text_place == plan.datasets[0].text_place == LocalPlace(Path("cache/text"))
    assert plan.notes == ("dataset 'other': without effect: no dataset names it in text_embeds",)


def test_disabled_entries_are_not_looked_at(plan_of):
    plan = plan_of(HERE, {"id": "off", "disabled": "true", "type": "nonsense", "resolution": -1}, {"id": "set", "disable": True})

    assert [dataset.id for dataset in plan.datasets] == ["set"]
    assert plan.disabled == ("off", "set")
    assert "off: disabled" in plan.describe()


def test_every_problem_is_reported_at_once(plan_of):
    message = problems(
        plan_of,
        {**HERE, "instance_data_dirr": "x", "repeats": -1, "crop": "perhaps", "resolution": "big"},
        {"id": "set", "instance_data_dir": "gone"},
        {"id": "third", "type": "lokal", "instance_data_dir": "."},
        "fourth",
        {"instance_data_dir": "."},
        {"id": "six", "dataset_type": "imagee"},
        {"id": "seven", "dataset_type": "video"},
        {"id": "eight", "instance_data_dir": ".", "crop_style": "faces", "resolution_type": "pixels"},
        {"id": "nine"},
        {"id": "a/b", "instance_data_dir": "."},
    )

    for line in (
        "dataset 'set': unknown key 'instance_data_dirr'; did you mean 'instance_data_dir'?",
        "dataset 'set': repeats is -1; it must be greater than or equal to 0",
        "dataset 'set': crop is 'perhaps'; it must be true or false",
        "dataset 'set': resolution is 'big'; it must be a number",
        "dataset 'set': entries 1 and 2 have the same id; each needs its own",
        "dataset 'set': folder gone does not exist",
        "dataset 'third': type 'lokal' is not among the backends; did you mean 'local'?",
        "entry 4 is 'fourth'; a dataset is an object in braces",
        "entry 5: an 'id' is needed",
        "dataset 'six': dataset_type 'imagee'; did you mean 'image'?",
        "dataset 'seven': dataset_type 'video' is not available yet",
        "dataset 'eight': crop_style is 'faces'; it must be 'center', 'random', 'corner' or 'face'",
        "dataset 'eight': resolution_type is 'pixels'; it must be 'pixel', 'area' or 'pixel_area'",
        "dataset 'nine': instance_data_dir is needed",
        "dataset 'a/b': an id is also a folder's name",
    ):
        assert line in message, line


def test_a_key_that_cannot_be_read_hides_no_other_problem(plan_of):
    message = problems(plan_of, {**HERE, "repeats": "many", "caption_strategy": "textfil", "resolution": -4, "start_step": 9, "end_step": 3})

    for part in ("repeats is 'many'", "caption_strategy is 'textfil'; did you mean 'textfile'?", "resolution is -4", "end_step"):
        assert part in message, part


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"resolution": 1024, "resolution_type": "area"}, "resolution is 1024 in resolution_type area: area is in megapixels, under 20"),
        ({"resolution": 1.0, "resolution_type": "pixel_area"}, "resolution is 1 in resolution_type pixel_area: this is an edge in pixels"),
        ({"resolution": 0.5, "resolution_type": "pixel"}, "pixels are whole; for megapixels write resolution_type area"),
        ({"resolution": 0}, "a size is more than 0"),
        ({"resolution": 1048576}, "this is an edge in pixels, 16384 at most"),
        ({"minimum_image_size": 0.25}, "minimum_image_size is 0.25 in resolution_type pixel_area: pixels are whole"),
        ({"resolution": 32, "alignment_px": 64}, "resolution 32 x 32 px of area is less than 64 px"),
        ({"maximum_image_size": 1024}, "maximum_image_size needs target_downsample_size"),
        ({"maximum_image_size": 512, "target_downsample_size": 1024}, "target_downsample_size 1024 x 1024 px of area is over maximum_image_size 512"),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio 2 is over maximum_aspect_ratio 1"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect 'closest' needs crop_aspect_buckets"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0, {"aspect": 2, "weight": 1}]}, "mixes plain aspects with weighted ones"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [{"aspect": 2, "weight": 0.5}]}, "weights that add up to 0.5"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [-1]}, "an aspect that is not width over height"),
        ({"caption_strategy": "text"}, "caption_strategy is 'text'; did you mean 'textfile'?"),
        ({"caption_strategy": "instanceprompt"}, "caption_strategy 'instanceprompt' needs instance_prompt"),
        ({"prepend_instance_prompt": True}, "prepend_instance_prompt needs instance_prompt"),
        ({"only_instance_prompt": "yes", "instance_prompt": ""}, "only_instance_prompt needs instance_prompt"),
        ({"text_embeds": "texts"}, "text_embeds is 'texts'; Known text_embeds entries: none."),
        ({"probability": 0}, "probability is 0; it must be greater than 0"),
        ({"max_num_samples": 1.5}, "max_num_samples is 1.5; it must be a whole number"),
        ({"id": ".."}, "an id is also a folder's name"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_rule(plan_of, keys, problem):
    keys = dict(keys)
    alignment_px = keys.pop("alignment_px", 8)

    assert problem in problems(plan_of, {**HERE, "resolution": 64, **keys}, alignment_px=alignment_px)


def test_two_datasets_cannot_share_a_latent_cache(plan_of):
    message = problems(plan_of, {**HERE, "cache_dir_vae": "cache/x"}, {**HERE, "id": "two", "cache_dir_vae": "cache/y/../x"})

    assert "datasets 'set' and 'two' have the same cache_dir_vae" in message


def test_only_one_text_cache_can_be_the_default(plan_of):
    message = problems(plan_of, HERE, {**TEXTS, "default": True}, {**TEXTS, "id": "two", "default": "true"})

    assert "'texts', 'two' all say 'default: true'" in message


def test_a_plan_without_images_is_refused(plan_of):
    assert "there is no enabled dataset of images" in problems(plan_of, TEXTS)
    assert "(set: disabled)" in problems(plan_of, {**HERE, "disabled": True})


def test_the_file_must_be_a_list(workplace):
    with pytest.raises(ConfigError, match="must hold a list of datasets, not one object") as caught:
        load_text(workplace, json.dumps(HERE))
    assert "[" in str(caught.value.hint)


def test_a_slip_of_the_pen_is_named_by_line_and_column(workplace):
    with pytest.raises(ConfigError, match=r"line 2\b.*column"):
        load_text(workplace, '[{"id": "set",\n "instance_data_dir" "images"}]')


def test_missing_folders_are_named_together_and_are_a_fault_of_the_data(plan_of):
    with pytest.raises(DatasetError) as caught:
        plan_of({"id": "a", "instance_data_dir": "gone"}, HERE, {"id": "b", "instance_data_dir": "also/gone"})

    assert caught.value.exit_code == 3
    assert "dataset 'a': folder gone does not exist" in caught.value.message
    assert "dataset 'b': folder also/gone does not exist" in caught.value.message


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"disable_after_epoch_step": 3}, "disable_after_epoch_step is not available yet"),
        ({"crop": True, "crop_style": "center", "crops_per_image": 3}, "crops_per_image without effect: crop_style is not 'random'"),
        ({"skip_file_discovery": "vae,aspect"}, "skip_file_discovery has no effect"),
        ({"delete_problematic_images": "true"}, "delete_problematic_images has no effect: unusable images are skipped and counted"),
        ({"aws_secret_access_key": "hunter2"}, "aws_secret_access_key belongs to datasets of another type"),
        ({"crop_aspect": "square"}, "crop_aspect without effect: crop is off"),
        ({"crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets without effect"),
        ({"crop": True, "target_downsample_size": 64}, "target_downsample_size without effect"),
        ({"instance_prompt": "a cat"}, "instance_prompt without effect: captions come from filename"),
        ({"vae_cache_disable": True}, "vae_cache_disable is one setting for the whole run"),
    ],
)
def test_a_setting_without_effect_is_said_aloud(plan_of, keys, note):
    notes = plan_of({**HERE, **keys}).notes

    assert [line for line in notes if line.startswith(f"dataset 'set': {note}")]
    assert "hunter2" not in " ".join(notes)


def test_nothing_is_said_of_settings_that_ask_for_nothing(plan_of):
    quiet: dict[str, object] = {
        "start_epoch": 1,
        "start_step": 0,
        "end_epoch": None,
        "scan_for_errors": True,
        "conditioning": [],
        "slider_strength": 0.0,
        "hash_filenames": True,
    }

    assert plan_of({**HERE, **quiet}).notes == ()


def test_every_key_is_in_the_manual():
    manual = DOCS.read_text(encoding="utf-8")

    for key in (*LocalOptions.model_fields, *BucketTextEmbedsOptions.model_fields):
        assert f"`{key}`" in manual, key


def test_windows_and_crops_are_settled(plan_of):
    keys = {"start_epoch": 2, "end_epoch": "4", "start_step": 10, "crop": True, "crops_per_image": 3}

    [dataset] = plan_of({**HERE, **keys}).datasets
    [fresh] = plan_of({**HERE, **keys}, vae_cache_disable=True).datasets

    assert dataset.window == Window(2, 4, 10, None)
    assert (dataset.geometry.crops, fresh.geometry.crops) == (3, 0)
    assert "crop square, random, 3 places an image" in dataset.describe() and "epochs 2 to 4, steps 11 to the end" in dataset.describe()


def test_an_empty_window_is_refused(plan_of):
    with pytest.raises(ConfigError, match=r"dataset 'set': end_step 5 is not after start_step 5"):
        plan_of({**HERE, "start_step": 5, "end_step": 5})
