"""`simpletuner train`, as far as nothing is loaded: reading the config and saying what would be done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from simpletuner.cli.main import main


def dry_run(capsys, *words):
    code = main(["train", "--dry-run", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def line_of(shown, key):
    return next(line.split() for line in shown.splitlines() if line.split()[:1] == [key])


def test_it_shows_each_value_with_its_source(write_config, capsys, monkeypatch):
    write_config(learning_rate="4e-5", lr_warmup_steps=5)
    monkeypatch.setenv("GRADIENT_ACCUMULATION_STEPS", "3")

    code, shown, _ = dry_run(capsys, "--seed", "7", "--no-gradient_checkpointing")

    assert code == 0
    assert line_of(shown, "learning_rate") == ["learning_rate", "4e-05", "config/config.json"]
    assert line_of(shown, "gradient_accumulation_steps") == ["gradient_accumulation_steps", "3", "environment", "GRADIENT_ACCUMULATION_STEPS"]
    assert line_of(shown, "seed") == ["seed", "7", "flag", "--seed"]
    assert line_of(shown, "gradient_checkpointing")[1] == "false"
    assert line_of(shown, "flow_schedule_shift")[2:] == ["family", "auraflow"]
    assert line_of(shown, "lr_scheduler")[1] == "constant_with_warmup"
    assert "lora_rank " not in shown


def test_on_demand_it_shows_the_defaults_too(write_config, capsys):
    write_config()

    _, shown, _ = dry_run(capsys, "--all")

    assert line_of(shown, "lora_rank") == ["lora_rank", "16", "default"]


def test_it_names_the_datasets_and_what_would_be_loaded(write_config, capsys):
    write_config(model_flavour="pony", lora_type="lycoris", base_model_precision="int8-quanto", validation_prompt="a cat")

    code, shown, _ = dry_run(capsys)

    assert code == 0
    assert "purplesmartai/pony-v7-base" in shown
    assert "int8-quanto" in shown
    assert "lycoris lokr" in shown
    assert "pictures: images in pictures" in shown
    assert "1 every 100 steps" in shown


def test_it_writes_nothing(write_config, capsys, tmp_path):
    write_config()
    before = sorted(tmp_path.rglob("*"))

    dry_run(capsys)

    assert sorted(tmp_path.rglob("*")) == before


def test_notes_are_printed(write_config, capsys):
    write_config(validation_torch_compile="false", lr_end=1e-5)

    _, shown, _ = dry_run(capsys)

    assert "note: validation_torch_compile" in shown
    assert "note: lr_end" in shown


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"lerning_rate": 1}, 2, ["lerning_rate", "learning_rate"]),
        ({"optimizer": "torch-adamv"}, 2, ["torch-adamv", "did you mean 'torch-adam"]),
        ({"model_family": "aurafow"}, 2, ["aurafow", "'auraflow'"]),
        ({"model_flavour": "v0.4"}, 2, ["v0.4", "v0.3"]),
        ({"base_model_precision": "int9-quanto"}, 2, ["int9-quanto", "int8-quanto"]),
        ({"report_to": "tensorbord"}, 2, ["tensorbord", "tensorboard"]),
        ({"lora_type": "lycoris", "lycoris_config": "nowhere.json"}, 2, ["nowhere.json"]),
        ({"data_backend_config": "nowhere.json"}, 2, ["nowhere.json"]),
        ({"user_prompt_library": "nowhere.json"}, 2, ["nowhere.json"]),
        ({"validation_prompt": "a", "validation_resolution": "big"}, 2, ["validation_resolution", "big"]),
        ({"pretrained_model_name_or_path": "./nowhere"}, 2, ["nowhere"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_run_would_refuse_is_refused(write_config, capsys, options, code, words):
    write_config(**options)

    answered, _, said = dry_run(capsys)

    assert answered == code
    assert all(word in said for word in words), said
    assert "hint:" in said


def test_a_missing_dataset_folder_is_a_data_error(write_config, capsys):
    write_config()
    Path("pictures").rmdir()

    code, _, said = dry_run(capsys)

    assert code == 3
    assert "pictures" in said
    assert "learning_rate" not in said


@pytest.mark.parametrize("words", [["--env", "mine"], ["env=mine"], ["--config", "config/mine/config.json"], ["config=config/mine"]])
def test_a_config_may_be_asked_for_in_several_ways(write_config, capsys, words):
    write_config("config/mine/config.json", seed=77)

    code, shown, _ = dry_run(capsys, *words)

    assert code == 0
    assert line_of(shown, "seed")[1] == "77"


def test_toml_and_variables_do_as_well(write_config, capsys, monkeypatch):
    write_config("unused.json")
    Path("config.toml").write_text('model_family = "auraflow"\ndata_backend_config = "datasets.json"\nseed = 5\n')
    Path("config.env").write_text("export MODEL_FAMILY=auraflow\nexport DATALOADER_CONFIG=datasets.json\nexport TRAINING_SEED=6\n")

    assert line_of(dry_run(capsys, "--config", "config.env")[1], "seed")[1] == "6"
    Path("config.env").unlink()
    assert line_of(dry_run(capsys)[1], "seed")[1] == "5"


def test_variables_beside_the_config_are_read_and_said_and_the_rest_is_for_libraries(write_config, capsys, monkeypatch):
    write_config(seed=1)
    Path("config/config.env").write_text("export TRAINING_SEED=6\nexport SOME_LIBRARYS_SWITCH=on\n")
    monkeypatch.setenv("SOME_LIBRARYS_SWITCH", "")
    monkeypatch.delenv("SOME_LIBRARYS_SWITCH")

    _, shown, _ = dry_run(capsys)

    assert line_of(shown, "seed")[1] == "6"
    assert "note: seed '6' is taken from config/config.env TRAINING_SEED in place of 1 from config/config.json" in shown
    assert os.environ["SOME_LIBRARYS_SWITCH"] == "on"


def test_the_shipped_configs_are_a_plan_that_holds(capsys):
    shipped = Path(__file__).parents[3] / "config"
    Path("config").mkdir()
    for path in shipped.glob("*.example"):
        (Path("config") / path.stem).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    Path("datasets/my-subject").mkdir(parents=True)

    code, shown, said = dry_run(capsys)

    assert code == 0, said
    assert "note:" not in shown
    assert "4 every 250 steps" in shown


def test_a_number_of_processes_below_1_is_refused(write_config, capsys):
    write_config(num_processes=0)

    code, _, said = dry_run(capsys)

    assert code == 2
    assert "num_processes 0" in said


def test_the_launchers_number_of_processes_is_the_one_that_counts(write_config, capsys, monkeypatch):
    write_config(num_processes=4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    _, shown, _ = dry_run(capsys)

    assert line_of(shown, "num_processes")[1] == "2"
    assert "in place of 4" in shown


def test_auraflows_quickstart_is_a_plan_that_holds(capsys):
    """Its three files as they stand, in the places that they name each other by; the adapter's file has trailing commas."""
    quickstart = Path(__file__).parents[2] / "options" / "quickstarts" / "auraflow"
    Path("config/auraflow").mkdir(parents=True)
    shutil.copy(quickstart / "config.json", "config")
    shutil.copy(quickstart / "lycoris_config.json", "config")
    shutil.copy(quickstart / "multidatabackend.json", "config/auraflow")
    for name in ("pseudo-camera-10k", "dreambooth-subject"):
        (Path("datasets") / name).mkdir(parents=True)

    code, shown, said = dry_run(capsys)

    assert code == 0, said
    assert line_of(shown, "learning_rate") == ["learning_rate", "4e-05", "config/config.json"]
    assert "pseudo-camera-10k-auraflow: images in datasets/pseudo-camera-10k" in shown
    assert "lycoris lokr by config/lycoris_config.json" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("note: ") and "dataset" not in line] == [
        "validation_torch_compile",
        "lr_scheduler",
    ]


def test_what_is_trained_in_full_is_held_in_float32_and_pixels_without_a_cache_are_in_none(capsys):
    shown = dry_run(capsys, "--example", "text-to-image", "--vae_cache_disable=true")[1]

    assert "weights in float32, computed with in fp16" in shown
    assert "encoded anew at every step" in shown and "latents in" not in shown


def test_an_example_whose_files_are_not_there_names_the_page_that_tells_how_to_make_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, _, said = dry_run(capsys, "--example", "lesson35-mnist")

    assert code == 2 and "lesson35-mnist/README.md" in said.replace("\n", "")


def test_the_assistant_of_a_distilled_model_is_named(write_config, capsys):
    write_config(model_family="flux", model_flavour="schnell", pretrained_model_name_or_path=None)

    code, shown, said = dry_run(capsys)

    assert code == 0, said
    assert "the frozen adapter ostris/FLUX.1-schnell-training-adapter stands beside the base" in " ".join(shown.split())
