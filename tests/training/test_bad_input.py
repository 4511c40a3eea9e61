"""What bad input gets: an exit code, a sentence that names the thing, a hint; never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.errors import SimpleTunerError
from simpletuner.training.run_folder import locked
from tests.builders.run import ROOT, add_pictures, train_in_process, write_run


def refused(folder: Path, capfd, *arguments: str) -> tuple[int, str]:
    code = train_in_process(folder, *arguments)
    out, err = capfd.readouterr()
    said = " ".join((out + err).split())
    assert "Traceback" not in said
    assert "hint:" in said, said
    return code, said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lerning_rate": 1e-4}, ["lerning_rate", "learning_rate"]),
        ({"train_batch_size": "two"}, ["train_batch_size", "two"]),
        ({"optimizer": "torch-adamv"}, ["torch-adamv", "torch-adamw"]),
        ({"model_family": "aurafow"}, ["aurafow", "auraflow"]),
        ({"model_flavour": "v9"}, ["v9"]),
        ({"lr_scheduler": "cosin"}, ["cosin", "cosine"]),
        ({"num_train_epochs": 2}, ["num_train_epochs", "max_train_steps"]),
        ({"lycoris_config": "nowhere.json"}, ["nowhere.json"]),
        ({"data_backend_config": "nowhere.json"}, ["nowhere.json"]),
        ({"report_to": "tensorbord"}, ["tensorbord", "tensorboard"]),
        ({"validation_prompt": "a", "validation_resolution": "big"}, ["validation_resolution", "big"]),
        ({"init_lora": "nowhere"}, ["nowhere"]),
        ({"base_model_precision": "int9-quanto"}, ["int9-quanto"]),
        ({"pretrained_model_name_or_path": "./nowhere"}, ["nowhere"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_a_configuration_error_that_names_it(tmp_path, capfd, options, words):
    write_run(tmp_path, **options)

    code, said = refused(tmp_path, capfd)

    assert code == 2
    assert all(word in said for word in words), said


def test_every_problem_is_said_at_once(tmp_path, capfd):
    write_run(tmp_path, lerning_rate=1, train_batch_size="two", lr_scheduler="cosin")

    code, said = refused(tmp_path, capfd)

    assert code == 2
    assert all(word in said for word in ("lerning_rate", "train_batch_size", "lr_scheduler"))


def test_broken_json_is_named_with_line_and_column(tmp_path, capfd):
    write_run(tmp_path)
    (tmp_path / "config.json").write_text('{\n  "seed": 1\n  "resolution": 2\n}')

    code, said = refused(tmp_path, capfd)

    assert code == 2 and "config.json" in said and "3" in said


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "transformer", "scheduler"])
def test_a_model_folder_without_a_part_is_refused_before_anything_is_loaded(tmp_path, capfd, part):
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "model" / part)

    code, said = refused(tmp_path, capfd)

    assert code == 2 and part in said


def test_a_folder_of_another_family_is_named(tmp_path, capfd):
    write_run(tmp_path)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))

    code, said = refused(tmp_path, capfd)

    assert code == 2 and "StableDiffusionXLPipeline" in said


def test_a_preset_that_matches_nothing_lists_what_there_is(tmp_path, capfd):
    write_run(tmp_path)
    file = tmp_path / "lycoris_config.json"
    file.write_text(file.read_text().replace('"Attention"', '"Flux2Attention"'))

    code, said = refused(tmp_path, capfd)

    assert code == 2 and "Flux2Attention" in said and "AuraFlowFeedForward" in said


def test_a_missing_dataset_folder_is_a_data_error(tmp_path, capfd):
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "pictures")

    code, said = refused(tmp_path, capfd)

    assert code == 3 and "pictures" in said


def test_an_empty_dataset_folder_is_a_data_error(tmp_path, capfd):
    write_run(tmp_path, pictures=0)
    (tmp_path / "pictures").mkdir()

    code, said = refused(tmp_path, capfd)

    assert code == 3 and "pictures" in said


def test_fewer_pictures_than_a_step_needs_says_which_repeats_would_do(tmp_path, capfd):
    write_run(tmp_path, pictures=3, train_batch_size=4, gradient_accumulation_steps=2)

    code, said = refused(tmp_path, capfd)

    assert code == 3 and "repeats" in said and "pictures" in said


def test_duplicate_dataset_ids_are_a_configuration_error(tmp_path, capfd):
    one = {"id": "same", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename"}
    add_pictures(tmp_path / "pictures", 4)
    write_run(tmp_path, datasets=[one, one])

    code, said = refused(tmp_path, capfd)

    assert code == 2 and "same" in said


def test_broken_pictures_are_counted_by_rule_and_the_rest_is_trained_on(tmp_path, capfd):
    write_run(tmp_path)
    (tmp_path / "pictures" / "zero.png").write_bytes(b"")
    (tmp_path / "pictures" / "text.png").write_bytes(b"not a picture at all")
    whole = (tmp_path / "pictures" / "picture_000.png").read_bytes()
    (tmp_path / "pictures" / "half.png").write_bytes(whole[: len(whole) // 2])

    assert train_in_process(tmp_path) == 0

    said = " ".join(capfd.readouterr().out.split())
    assert "6 images" in said and "skipped" in said


def test_captions_over_the_token_limit_are_counted(tmp_path, capfd):
    write_run(tmp_path)
    (tmp_path / "pictures" / ("long_" * 20 + ".png")).write_bytes((tmp_path / "pictures" / "picture_000.png").read_bytes())

    assert train_in_process(tmp_path) == 0
    cold = " ".join(capfd.readouterr().out.split())
    assert train_in_process(tmp_path) == 0
    warm = " ".join(capfd.readouterr().out.split())

    for said in (cold, warm):
        assert "1 caption is longer than the 24 tokens" in said


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, capfd):
    write_run(tmp_path, output_dir="file/output")
    (tmp_path / "file").write_text("")

    code, said = refused(tmp_path, capfd)

    assert code == 2 and "output_dir" in said


def test_a_second_run_in_the_same_output_folder_is_refused(tmp_path, capfd):
    write_run(tmp_path)
    (tmp_path / "output").mkdir()

    with locked(tmp_path / "output"):
        code, said = refused(tmp_path, capfd)

    assert code == 2 and "another run" in said


def test_what_can_be_refused_is_refused_before_anything_is_encoded(tmp_path, capfd):
    for options in (
        {"resume_from_checkpoint": "checkpoint-77"},
        {"init_lora": "nowhere"},
        {"train_batch_size": 50},
        {"validation_resolution": "big"},
    ):
        write_run(tmp_path, **options)

        refused(tmp_path, capfd)

        assert not list((tmp_path / "cache").rglob("shard-*"))


def test_a_nan_stops_the_run_names_step_and_samples_and_keeps_the_last_checkpoint(tmp_path, capfd):
    write_run(tmp_path, max_train_steps=3, train_batch_size=3)
    assert train_in_process(tmp_path) == 0
    name = next((tmp_path / "cache").rglob("*.safetensors"))
    broken = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(broken)
    weights["proj_out.weight"] = torch.full_like(weights["proj_out.weight"], float("nan"))
    save_file(weights, broken, {"format": "pt"})
    assert name.is_file()

    code, said = refused(tmp_path, capfd, "--max_train_steps", "9")

    assert code == 1
    assert "step 4" in said and "pictures/picture_" in said and "checkpoint-3" in said
    assert (tmp_path / "output" / "checkpoint-3" / "manifest.json").is_file()
    assert not (tmp_path / "output" / "checkpoint-6").exists()


@pytest.mark.parametrize("where", ["cache", "output"])
def test_a_full_disk_is_a_memory_error_that_keeps_what_was_written(tmp_path, where):
    """A real file system of a few kilobytes, mounted where only this process sees it."""
    write_run(tmp_path, resolution=64)
    (tmp_path / where).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kilobytes = {"cache": 60, "output": 24}[where]
    script = f"mount -t tmpfs -o size={kilobytes}k none {where} && exec {sys.executable} -m simpletuner train --config config.json"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path / where)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")

    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    said = result.stdout + result.stderr
    assert result.returncode == 4, said
    assert ("space" in said or "disk full" in said) and "hint:" in said and "Traceback" not in said


def test_debug_shows_the_traceback(tmp_path, capfd):
    write_run(tmp_path, model_flavour="v9")

    train_in_process(tmp_path, "--debug")

    out, err = capfd.readouterr()
    assert "Traceback" in out + err


def test_every_error_has_an_exit_code_of_the_documented_set():
    def all_below(kind):
        return {kind, *(sub for child in kind.__subclasses__() for sub in all_below(child))}

    assert {kind.exit_code for kind in all_below(SimpleTunerError)} <= {1, 2, 3, 4}
