"""A stopped and resumed run gives the bytes of one that never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders.run import adapter_bytes, add_pictures, command, train_in_process, write_run

PICTURES = {"id": "pictures", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "crop_style": "center"}
WINDOW = {"maximum_image_size": 1024, "target_downsample_size": 512}
"""The crop is taken out of the whole picture."""
VARIANTS = {
    "lokr": {},
    "bf16 base": {"mixed_precision": "bf16"},
    "lora with dropout": {"lora_type": "standard", "lora_dropout": 0.3, "lycoris_config": None},
    "accumulation and averages": {"gradient_accumulation_steps": 2, "use_ema": True, "pictures": 7},
    "datasets that come and go": {"datasets": [PICTURES, {**PICTURES, "id": "late", "start_step": 2, "end_step": 5}], "pictures": 5},
    "crops in turn": {"datasets": [{**PICTURES, "crop_style": "random", "crops_per_image": 3, **WINDOW}]},
    "fresh crops": {"datasets": [{**PICTURES, "crop_style": "random", **WINDOW}], "vae_cache_disable": True},
    "a base multiplied in 8 bits": {"base_model_precision": "int8-rotated", "mixed_precision": "bf16", "gradient_checkpointing": True},
    "all weights": {"model_type": "full", "lora_type": None, "lycoris_config": None, "learning_rate": 1e-3, "pictures": 5},
    "all weights in bf16": {
        "model_type": "full",
        "lora_type": None,
        "lycoris_config": None,
        "learning_rate": 1e-3,
        "pictures": 5,
        "mixed_precision": "bf16",
        "optimizer": "adamw_bf16",
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def result(folder: Path) -> bytes:
    pipeline = folder / "output" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    return pipeline.read_bytes() if pipeline.exists() else adapter_bytes(folder)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_run_that_went_on_from_a_checkpoint_gives_the_same_bytes(tmp_path, options):
    write_run(tmp_path / "whole", **options)
    assert train_in_process(tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    for finished in ("pytorch_lora_weights.safetensors", "pipeline"):
        path = tmp_path / "resumed" / "output" / finished
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    assert train_in_process(tmp_path / "resumed") == 0

    assert result(tmp_path / "resumed") == result(tmp_path / "whole")


def test_a_schedule_free_run_saves_and_shows_its_average_and_goes_on_from_what_it_stepped_on(tmp_path):
    pytest.importorskip("schedulefree")
    looking = {"validation_prompt": "a picture", "validation_step_interval": 2, "validation_num_inference_steps": 1, "validation_resolution": "32"}
    for name, options in {"plain": {}, "looking": looking}.items():
        write_run(tmp_path / name, optimizer="adamw_schedulefree", **options)
        assert train_in_process(tmp_path / name) == 0
    whole = adapter_bytes(tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "output" / "checkpoint-6")

    assert train_in_process(tmp_path / "plain") == 0

    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "looking") == whole
    checkpoint = tmp_path / "plain" / "output" / "checkpoint-6"
    stepped_on = torch.load(checkpoint / "optimizer.pt", weights_only=True)["trained"]
    saved = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    assert load_file(tmp_path / "plain" / "output" / "pytorch_lora_weights.safetensors").keys() == saved.keys()
    assert not any(one.shape == other.shape and torch.equal(one, other) for one in stepped_on for other in saved.values() if one.ndim)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path):
    write_run(tmp_path / "whole", max_train_steps=40, checkpoint_step_interval=4)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "killed", max_train_steps=40, checkpoint_step_interval=4)
    moments = random.Random(0)

    for _ in range(3):
        process = command(tmp_path / "killed")
        deadline = time.monotonic() + 60
        wanted = len(list((tmp_path / "killed" / "output").glob("checkpoint-*"))) + 1
        while len(list((tmp_path / "killed" / "output").glob("checkpoint-*"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.wait()
    last = command(tmp_path / "killed")
    output, _ = last.communicate(timeout=120)

    assert last.returncode == 0, output
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_says_how_to_go_on_and_the_same_command_does(tmp_path, number, code):
    options = {"max_train_steps": 60, "checkpoint_step_interval": 5, "checkpoints_total_limit": 2}
    write_run(tmp_path / "whole", **options)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "stopped", **options)

    process = command(tmp_path / "stopped")
    while not list((tmp_path / "stopped" / "output").glob("checkpoint-*[0-9]")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == code, output
    assert "same command" in output
    assert train_in_process(tmp_path / "stopped") == 0
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_gives_the_same_bytes(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    whole = adapter_bytes(tmp_path)
    optimizer = tmp_path / "output" / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    capsys.readouterr()

    assert train_in_process(tmp_path) == 0

    assert "checkpoint-6 is damaged" in capsys.readouterr().out.replace("\n", " ")
    assert adapter_bytes(tmp_path) == whole


def test_validation_changes_nothing(tmp_path):
    write_run(tmp_path / "plain")
    looking = {"validation_prompt": "a picture", "validation_step_interval": 2, "validation_num_inference_steps": 2, "validation_resolution": "32"}
    write_run(tmp_path / "looking", report_to="tensorboard,jsonl", **looking)

    assert train_in_process(tmp_path / "plain") == train_in_process(tmp_path / "looking") == 0

    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "looking")
    assert (tmp_path / "looking" / "output" / "validation_images" / "grid.png").is_file()


def test_a_cold_and_a_warm_cache_and_none_give_the_same_bytes(tmp_path):
    results = []
    for name, options in {"cold": {}, "ondemand": {"vae_cache_ondemand": True}, "none": {"vae_cache_disable": True}}.items():
        write_run(tmp_path / name, **options)
        assert train_in_process(tmp_path / name) == 0
        results.append(adapter_bytes(tmp_path / name))
    shutil.rmtree(tmp_path / "cold" / "output")
    assert train_in_process(tmp_path / "cold") == 0  # warm now

    assert len({*results, adapter_bytes(tmp_path / "cold")}) == 1


def test_going_on_with_more_steps_and_more_pictures_is_said(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    add_pictures(tmp_path / "pictures", 3, first=50)
    capsys.readouterr()

    assert train_in_process(tmp_path, "--max_train_steps", "8") == 0

    said = capsys.readouterr().out
    assert "changed since the checkpoint" in said
    assert json.loads((tmp_path / "output" / "checkpoint-8" / "training_state.json").read_text())["step"] == 8


def test_averaging_that_begins_at_a_resume_begins_from_the_trained_weights(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0

    assert train_in_process(tmp_path, "--use_ema", "--max_train_steps", "7", "--learning_rate", "1e-12") == 0

    assert "the average starts from the trained ones" in capsys.readouterr().out
    average, trained = (load_file(tmp_path / "output" / name / "pytorch_lora_weights.safetensors") for name in ("ema", "."))
    assert all(torch.allclose(average[name], trained[name], atol=1e-6) for name in trained)


def test_a_resume_that_fails_leaves_every_checkpoint_where_it_was(tmp_path):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    lokr = tmp_path / "lycoris_config.json"
    lokr.write_text(lokr.read_text().replace('"factor": 4', '"factor": 2'))

    assert train_in_process(tmp_path, "--resume_from_checkpoint", "checkpoint-3") == 2

    assert (tmp_path / "output" / "checkpoint-6").is_dir() and not (tmp_path / "output" / "superseded-1").exists()


def test_a_fresh_start_moves_the_old_checkpoints_aside(tmp_path):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    first = adapter_bytes(tmp_path)

    assert train_in_process(tmp_path, "--resume_from_checkpoint", "", "--seed", "8") == 0

    assert (tmp_path / "output" / "superseded-1" / "checkpoint-6").is_dir()
    assert adapter_bytes(tmp_path) != first


def test_no_saved_file_holds_a_path_of_this_machine(tmp_path):
    write_run(tmp_path, output_dir=str(tmp_path / "output"), pretrained_model_name_or_path=str(tmp_path / "model"))
    assert train_in_process(tmp_path) == 0

    needle = str(tmp_path).encode()
    for path in [*(tmp_path / "output").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        if path.is_file():
            assert needle not in path.read_bytes(), path
