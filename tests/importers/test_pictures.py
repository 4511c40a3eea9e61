"""Sample prompts of other trainers, their intervals, and publishing: one setting a prompt, epochs as epochs, tokens nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.importers.importer import Imported
from simpletuner.importers.pictures import Look, use_looks
from simpletuner.importers.tools.ai_toolkit import AiToolkit
from simpletuner.importers.tools.kohya import Kohya
from simpletuner.importers.tools.onetrainer import OneTrainer
from simpletuner.training.prompts import read_library

SDXL = "sdxl_train_network.py"
JOB = {"name_or_path": "x", "arch": "sdxl"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kohya(script: str = SDXL, **told: Any) -> Imported:
    told = {"pretrained_model_name_or_path": "x", "train_data_dir": "far", "resolution": 512, "network_module": "networks.lora", **told}
    Path("a.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
    return Kohya().read(["python", script, "--config_file", "a.toml"], {})


def kohya_prompts(script: str, *lines: str) -> Imported:
    Path("p.txt").write_text("\n".join(lines))
    return kohya(script, sample_prompts="p.txt")


def ai_toolkit(**parts: Any) -> Imported:
    process = {"type": "sd_trainer", "model": JOB, "network": {"type": "lora"}, "datasets": [{"folder_path": "far"}], **parts}
    Path("a.json").write_text(json.dumps({"job": "extension", "config": {"name": "run", "process": [process]}}))
    return AiToolkit().read(["a.json"], {})


def onetrainer(**told: Any) -> Imported:
    told = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE", "concepts": [{"path": "far"}], **told}
    Path("a.json").write_text(json.dumps(told))
    return OneTrainer().read(["a.json"], {})


def interval(found: Imported, what: str) -> tuple[Any, Any]:
    return found.config.get(f"{what}_step_interval"), found.config.get(f"{what}_epoch_interval")


def test_each_prompt_of_a_library_says_what_is_different_for_it_and_is_read_by_a_run(here):
    found, first = Imported(), Look("a cat", "blurry", 1024, 768, 30, 7.5, 1)

    use_looks(found, [first, Look("a dog", "blurry", 1024, 768, 30, 7.5, 1), Look("a cow", None, 512, 512, 20, 5.0, 9, 2.0, 0.5)])

    assert found.config["validation_resolution"] == "1024x768" and found.config["validation_seed"] == 1 and found.lost == []
    assert found.prompts["prompt_1"] == "a cat" and found.prompts["prompt_2"] == "a dog"
    Path("library.json").write_text(json.dumps(found.prompts))
    assert read_library(Path("library.json"))["prompt_3"].changes == {
        "validation_negative_prompt": "",
        "validation_resolution": "512x512",
        "validation_seed": 9,
        "validation_guidance": 5.0,
        "validation_guidance_real": 2.0,
        "validation_num_inference_steps": 20,
        "validation_lycoris_strength": 0.5,
    }


@pytest.mark.parametrize("line", ["a cat --g 4 --l 2.5 --n ugly", "a cat --l 2.5 --n ugly --g 4"])
def test_flux_is_told_a_guidance_and_has_a_real_one_beside_it(line):
    found = kohya_prompts("flux_train_network.py", line, "a dog")

    assert (found.config["validation_guidance"], found.config["validation_guidance_real"]) == (4.0, 2.5)
    assert found.prompts["prompt_2"] == {"prompt": "a dog", "negative_prompt": "", "guidance": 3.5, "guidance_real": 1.0}


def test_a_model_that_is_told_no_guidance_heeds_l_alone():
    found = kohya_prompts("sd3_train_network.py", "a cat --l 5 --g 2")

    assert found.config["validation_guidance"] == 5.0 and "validation_guidance_real" not in found.config
    assert kohya_prompts("sd3_train_network.py", "a cat --g 2").config["validation_guidance"] == 7.5


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"save_every_n_epochs": 2, "save_last_n_epochs": 3}, 3),
        ({"save_every_n_epochs": 2}, 0),
        ({"save_every_n_steps": 10, "save_last_n_steps": 30}, 4),
        ({"save_every_n_steps": 10, "save_last_n_steps": 5}, 1),
        ({"save_every_n_steps": 10, "save_last_n_steps": 30, "save_every_n_epochs": 1, "save_last_n_epochs": 2}, 6),
        ({"save_every_n_steps": 10, "save_last_n_steps": 30, "save_every_n_epochs": 1}, 0),
    ],
)
def test_as_many_checkpoints_of_sd_scripts_are_kept(told, kept):
    assert kohya(**told).config["checkpoints_total_limit"] == kept


def test_epochs_of_sd_scripts_stay_epochs_though_no_picture_is_here():
    found = kohya(save_every_n_epochs=2, max_train_epochs=9, validate_every_n_epochs=3)

    assert interval(found, "checkpoint") == (0, 2) and not any("epoch" in line for line in found.lost)
    assert (found.config["eval_steps_interval"], found.config["eval_epoch_interval"]) == (0, 3)
    assert interval(kohya(save_n_epoch_ratio=4, max_train_epochs=9), "checkpoint") == (0, 2)
    assert any(line.startswith("save_n_epoch_ratio 4") for line in kohya(save_n_epoch_ratio=4).lost)
    Path("p.txt").write_text("a cat")
    assert interval(kohya(sample_prompts="p.txt", sample_every_n_epochs=2, sample_every_n_steps=50), "validation") == (0, 2)
    assert interval(kohya(sample_prompts="p.txt", sample_every_n_steps=50), "validation") == (50, None)


@pytest.mark.parametrize(
    ("amount", "unit", "expected"),
    [(50, "STEP", (25, None)), (2, "EPOCH", (0, 2)), (0.5, "EPOCH", (0, None)), (3, "NEVER", (0, None)), (3, "ALWAYS", (1, None))],
)
def test_intervals_of_onetrainer_are_batches_or_whole_epochs(amount, unit, expected):
    sample = {"sample_after": amount, "sample_after_unit": unit, "samples": [{"prompt": "a cat"}]}
    backup = {"backup_after": amount, "backup_after_unit": unit}

    found = onetrainer(gradient_accumulation_steps=2, **sample, **backup)

    assert interval(found, "validation") == interval(found, "checkpoint") == expected
    assert not any("_after" in line for line in found.lost)
    assert any(line.startswith("backup_after 30 minutes") for line in onetrainer(backup_after=30, backup_after_unit="MINUTE").lost)


def test_onetrainer_looks_at_held_out_pictures_when_it_is_told_to():
    concepts = [{"path": "far"}, {"path": "further", "validation_concept": True}]

    found = onetrainer(concepts=concepts, validation=True, validate_after=2, validate_after_unit="EPOCH")

    assert (found.config["eval_steps_interval"], found.config["eval_epoch_interval"]) == (0, 2)
    assert onetrainer(concepts=concepts).config["eval_loss_disable"] is True
    assert any(
        line.startswith("validate_after 5 minutes")
        for line in onetrainer(concepts=concepts, validation=True, validate_after=5, validate_after_unit="MINUTE").lost
    )


def test_a_warm_up_of_onetrainer_is_counted_in_batches_or_is_a_share_up_to_the_whole():
    (Path("far")).mkdir()
    for number in range(8):
        Path(f"far/{number}.png").touch()
    told = {"epochs": 10, "gradient_accumulation_steps": 2}

    steps = [onetrainer(learning_rate_warmup_steps=warmup, **told).config["lr_warmup_steps"] for warmup in (201, 0.5, 1, 0)]

    assert steps == [100, 20, 40, 0]


def test_prompts_of_ai_toolkit_have_seeds_that_walk_and_strengths_of_their_own():
    samples = [{"prompt": "a cat"}, {"prompt": "a dog", "network_multiplier": 0.5}, {"prompt": "a cow", "seed": 3}]

    found = ai_toolkit(sample={"samples": samples, "seed": 10, "walk_seed": True, "guidance_rescale": 0.7, "sample_start_step": 200})

    assert found.config["validation_seed"] == 10 and found.config["validation_lycoris_strength"] == 1.0
    assert found.prompts["prompt_2"] == {"prompt": "a dog", "seed": 11, "lycoris_strength": 0.5}
    assert found.prompts["prompt_3"] == {"prompt": "a cow", "seed": 3}
    assert found.config["validation_guidance_rescale"] == 0.7 and found.config["validate_after_step"] == 200
    assert found.lost == []


def test_a_lora_of_ai_toolkit_that_says_no_rank_has_four():
    assert ai_toolkit().config["lora_rank"] == 4


def test_results_are_published_without_a_token():
    told = {"huggingface_repo_id": "me/cat", "huggingface_repo_visibility": "public", "huggingface_token": "hf_secret", "async_upload": True}
    found, toolkit = kohya(**told, save_every_n_steps=5), ai_toolkit(save={"push_to_hub": True, "hf_repo_id": "me/dog", "hf_private": True})

    assert {"push_to_hub": True, "hub_model_id": "me/cat", "model_card_private": False}.items() <= found.config.items()
    assert found.config["push_checkpoints_to_hub"] is found.config["push_to_hub_background"] is True
    assert "secret" not in repr(found) and any(line.startswith("huggingface_token (not shown)") for line in found.lost)
    assert {"push_to_hub": True, "hub_model_id": "me/dog", "model_card_private": True}.items() <= toolkit.config.items()
    assert kohya(huggingface_repo_id="me/cat").config["model_card_private"] is True


def test_what_changes_training_is_named():
    found = ai_toolkit(datasets=[{"folder_path": "far", "standardize_images": True}], model={**JOB, "te_dtype": "float32", "vae_dtype": "fp32"})

    assert [line.split(":")[0] for line in found.lost] == ["datasets.standardize_images true", "model.te_dtype float32"]
    assert found.config["vae_dtype"] == "fp32"
    assert any(line.startswith("lora_weight_dtype BFLOAT_16") for line in onetrainer(lora_weight_dtype="BFLOAT_16").lost)
    assert onetrainer(ema="GPU").config["ema_validation"] == "comparison"
    assert "ema_validation" not in onetrainer(ema="GPU", non_ema_sampling=False).config
