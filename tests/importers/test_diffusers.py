"""`simpletuner import diffusers`: the same numbers under our names, and a line for all that has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.cli.choices import family_defaults, idle_of, known_names
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError
from simpletuner.importers.diffusers_scripts import SCRIPTS
from simpletuner.importers.importer import Imported
from simpletuner.importers.tools.diffusers import NO_EQUAL, SILENT, Diffusers
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from tests.builders.run import add_pictures
from tests.training.families import model

MODEL = "--pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4"
NEEDED = {
    True: f"{MODEL} --instance_data_dir=dog --instance_prompt 'a photo of sks dog'",
    False: f"{MODEL} --dataset_name=lambdalabs/naruto-blip-captions",
}


def read(line: str, script: str = "train_text_to_image.py", launcher: str = "accelerate launch", needed: bool = True) -> Imported:
    told = NEEDED[SCRIPTS[script].is_dreambooth] if needed else ""
    return Diffusers().read([f"{launcher} {script} {told} {line}"], {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_is_told_at_least_makes_a_config_of_which_every_option_has_an_effect(script):
    found = read("--validation_prompt 'a cat'" if "validation_prompt" in SCRIPTS[script].flags else "--validation_prompts 'a cat'", script)

    loaded = load_config([Setting(key, value, "x") for key, value in found.config.items()], family_defaults, idle_of=idle_of, choices=known_names())

    assert not [note for note in loaded.notes if "no effect" in note]
    assert loaded.config.models.model_family == next((name for name in ("sdxl", "flux", "sd3") if name in script), "sd1x")
    assert loaded.config.adapters.model_type == ("lora" if "lora" in script else "full")


def test_numbers_that_the_script_has_by_itself_are_written_where_ours_are_others():
    config = read("").config

    assert config["train_batch_size"] == 16 and config["num_train_epochs"] == 100 and config["resolution"] == 512
    assert config["caption_dropout_probability"] == 0 and config["gradient_checkpointing"] is False
    assert config["disable_segmented_timestep_sampling"] is True and config["checkpoints_total_limit"] == 0
    assert config["lr_scheduler"] == "constant" and config["lr_warmup_steps"] == 0  # which their constant ignores, and ours would not
    assert (config["mixed_precision"], config["vae_dtype"]) == ("no", "fp32")
    assert config["optimizer_config"] == {"betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--max_train_steps=15000", {"max_train_steps": 15000}),
        ("--train_batch_size 2 --gradient_accumulation_steps 4 --learning_rate 1e-5 --scale_lr", {"learning_rate": 8e-5}),
        ("--lr_scheduler cosine --lr_warmup_steps 7", {"lr_scheduler": "cosine", "lr_warmup_steps": 7}),
        ("--lr_scheduler polynomial", {"lr_end": 1e-7, "lr_power": 1.0, "lr_warmup_steps": 500}),
        ("--snr_gamma=5.0 --input_perturbation 0.1", {"snr_gamma": 5.0, "input_perturbation": 0.1}),
        ("--noise_offset 0.05", {"offset_noise": True, "noise_offset": 0.05, "noise_offset_probability": 1.0}),
        ("--use_ema", {"use_ema": True, "ema_decay": 0.9999}),
        ("--use_8bit_adam --adam_beta2 .99", {"optimizer": "bnb-adamw8bit"}),
        ("--prediction_type v_prediction", {"prediction_type": "v_prediction"}),
        ("--resolution 520", {"resolution": 520, "aspect_bucket_alignment": 8}),
        ("--mixed_precision bf16", {"mixed_precision": "bf16", "vae_dtype": "bf16"}),
        ("--checkpointing_steps 10 --checkpoints_total_limit 3", {"checkpoint_step_interval": 10, "checkpoints_total_limit": 3}),
        ("--validation_prompts cat", {"validation_prompt": "cat", "validation_num_inference_steps": 20, "validation_negative_prompt": ""}),
    ],
)
def test_a_flag_means_the_same_number(line, expected):
    config = read(line).config

    assert {key: config[key] for key in expected} == expected


def test_the_launcher_says_precision_and_processes_and_the_script_wins():
    launcher = "CUDA_VISIBLE_DEVICES=0,1 accelerate launch --mixed_precision=fp16 --multi_gpu --num_processes 2 --use_deepspeed"

    found = read("--scale_lr --train_batch_size 1", launcher=launcher)

    assert (found.config["mixed_precision"], found.config["num_processes"], found.config["learning_rate"]) == ("fp16", 2, 2e-4)
    assert any("--use_deepspeed of the launcher" in line for line in found.lost)
    assert any("CUDA_VISIBLE_DEVICES=0,1" in line for line in found.notes)
    assert read("--mixed_precision bf16", launcher=launcher).config["mixed_precision"] == "bf16"
    assert any("--multi_gpu without" in line for line in read("", launcher="accelerate launch --multi_gpu").lost)


def test_sdxl_keeps_its_vae_in_float32_unless_it_has_another():
    script, half = "train_text_to_image_lora_sdxl.py", "--mixed_precision fp16"

    assert read(half, script).config["vae_dtype"] == "fp32"
    assert read(f"{half} --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix", script).config["vae_dtype"] == "fp16"


def test_time_bias_and_empty_prompts_of_sdxl():
    line = (
        "--timestep_bias_strategy range --timestep_bias_begin 100 --timestep_bias_end 300 --timestep_bias_multiplier 2 --proportion_empty_prompts 0.2"
    )

    config = read(line, "train_text_to_image_sdxl.py").config

    assert config["caption_dropout_probability"] == 0.2
    biased = {key.removeprefix("timestep_bias_"): value for key, value in config.items() if key.startswith("timestep_bias")}
    assert biased == {"strategy": "range", "multiplier": 2, "begin": 100, "end": 300}


@pytest.mark.parametrize(
    ("location", "family"),
    [("stabilityai/stable-diffusion-2-1", "sd2x"), ("runwayml/stable-diffusion-v1-5", "sd1x"), ("me/sd-2-photo", "sd2x"), ("me/something", "sd1x")],
)
def test_stable_diffusion_2_is_told_from_1_by_its_name(location, family):
    found = read(f"--pretrained_model_name_or_path {location} --dataset_name x/y", needed=False)

    assert found.config["model_family"] == family
    assert any("is taken for" in note for note in found.notes) == (location == "me/something")


OTHER_VALUES = {
    "lr_scheduler": "cosine",
    "mixed_precision": "bf16",
    "prediction_type": "epsilon",
    "report_to": "wandb",
    "timestep_bias_strategy": "later",
    "with_prior_preservation": "--class_data_dir c --class_prompt c",
    "weighting_scheme": "mode",
    "optimizer": "prodigy",
    "precondition_outputs": "0",
    **dict.fromkeys(("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"), "False"),
}
NEEDS = {
    **dict.fromkeys(("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"), "--with_prior --class_data a --class_prompt b"),
    **dict.fromkeys(("timestep_bias_multiplier", "timestep_bias_portion"), "--timestep_bias_strategy earlier"),
    **dict.fromkeys(("timestep_bias_begin", "timestep_bias_end"), "--timestep_bias_strategy range"),
    **dict.fromkeys(("lr_warmup_steps", "lr_power"), "--lr_scheduler polynomial"),
    "lr_num_cycles": "--lr_scheduler cosine_with_restarts",
    **dict.fromkeys(("logit_mean", "logit_std"), "--weighting_scheme logit_normal"),
    "mode_scale": "--weighting_scheme mode",
    **dict.fromkeys(("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"), "--optimizer prodigy"),
    **dict.fromkeys(("text_encoder_lr", "adam_weight_decay_text_encoder"), "--train_text_encoder"),
}
"""Flags without which another has no effect."""
OF_TABLES = {"dataset_name", "dataset_config_name", "image_column", "caption_column"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_carried_over_or_said_to_be_lost(script):
    """Each flag, set to something else than its default, changes the config, the datasets, or a line."""
    flags, unsaid = SCRIPTS[script].flags, []
    for name, (kind, default) in flags.items():
        if name in OF_TABLES and SCRIPTS[script].is_dreambooth:
            continue  # in place of a folder: in a test of their own
        around = f"--validation_prompt{'s' if 'validation_prompts' in flags else ''} old {NEEDS.get(name, '')}"
        number = str((default or 0) + 3) if kind in (int, float) else "other"
        before, after = read(around, script), read(f"{around} --{name} {OTHER_VALUES.get(name, '' if kind is bool else number)}", script)
        if before == after and name not in SILENT:
            unsaid.append(name)

    assert not unsaid


def test_text_encoders_are_trained_by_lora_alone():
    lora, full = (read("--train_text_encoder", script) for script in ("train_dreambooth_lora.py", "train_dreambooth.py"))

    assert lora.config["train_text_encoder"] is True and not any("train_text_encoder" in line for line in lora.lost)
    assert "train_text_encoder" not in full.config and any("by LoRA alone" in line for line in full.lost)


def test_no_token_is_written_or_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"HF_TOKEN=hf_secret accelerate launch train_text_to_image.py {NEEDED[False]} --push_to_hub --hub_token=hf_secret --output_dir run"

    assert main(["import", "diffusers", "--", line]) == 0

    said = capsys.readouterr().out
    assert "secret" not in said + "".join(path.read_text() for path in (tmp_path / "config" / "run").iterdir())
    assert "--hub_token" in said and "set the variable HF_TOKEN" in " ".join(said.split())
    assert json.loads((tmp_path / "config/run/config.json").read_text())["push_to_hub"] is True


def test_dreambooth_becomes_one_dataset_or_two():
    kind = "--with_prior_preservation --class_data_dir dogs --class_prompt 'a photo of dog' --num_class_images 200"

    found = read(f"{kind} --prior_loss_weight 0.5 --offset_noise", "train_dreambooth.py")

    subject, kind, text = found.datasets
    assert (subject["instance_data_dir"], subject["instance_prompt"], subject["crop_style"]) == ("dog", "a photo of sks dog", "random")
    assert (kind["instance_data_dir"], kind["instance_prompt"], kind["max_num_samples"]) == ("dogs", "a photo of dog", 200)
    assert text["dataset_type"] == "text_embeds"
    assert found.config["noise_offset"] == 0.1 and any("--prior_loss_weight 0.5" in line for line in found.lost)
    assert any('simpletuner generate "a photo of dog"' in line for line in found.notes)


FLUX = """
export MODEL_NAME="black-forest-labs/FLUX.1-dev"
export INSTANCE_DIR="dog"
export OUTPUT_DIR="trained-flux-lora"

accelerate launch train_dreambooth_lora_flux.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --mixed_precision="bf16" \\
  --instance_prompt="a photo of sks dog" \\
  --resolution=512 \\
  --train_batch_size=1 \\
  --guidance_scale=1 \\
  --gradient_accumulation_steps=4 \\
  --optimizer="prodigy" \\
  --learning_rate=1. \\
  --report_to="wandb" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --max_train_steps=500 \\
  --validation_prompt="A photo of sks dog in a bucket" \\
  --validation_epochs=25 \\
  --seed="0" \\
  --push_to_hub
"""


def test_the_line_of_the_readme_for_flux_is_the_same_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert main(["import", "diffusers", "--", FLUX]) == 0

    config = json.loads((tmp_path / "config/trained-flux-lora/config.json").read_text())
    told = {
        "model_family": "flux",
        "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "tokenizer_max_length": 512,
        "seed": 0,
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "max_train_steps": 500,
        "gradient_accumulation_steps": 4,
        "mixed_precision": "bf16",
        "flow_use_uniform_schedule": True,
        "flow_schedule_shift": 1.0,
        "distilled_guidance": 1.0,
        "validation_guidance": 3.5,
        "lora_rank": 4,
        "validation_num_inference_steps": 28,
        "validation_resolution": "1024",
        "vae_dtype": "bf16",
        "push_to_hub": True,
        "validation_step_interval": 0,
        "validation_epoch_interval": 25,
    }
    assert {key: config[key] for key in told} == told
    assert config["optimizer_config"] | {"decouple": True, "safeguard_warmup": True} == config["optimizer_config"]
    assert "ff_context.net.2" in config["peft_lora_target_modules"] and "disable_segmented_timestep_sampling" not in config


def test_sd3_trains_the_noise_levels_of_its_own_schedule_on_a_dataset_of_the_hub_too():
    script = "train_dreambooth_lora_sd3.py"
    line = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3-medium-diffusers --dataset_name=x/y --instance_prompt 'a TOK'"

    found = read(f"{line} --lora_blocks 1,2 --lora_layers attn.to_k --repeats 3", script, needed=False)

    assert (found.config["flow_schedule_shift"], found.config["flow_sigmoid_scale"], found.config["vae_dtype"]) == (3.0, 1.0, "fp32")
    assert found.config["peft_lora_target_modules"] == ["transformer_blocks.1.attn.to_k", "transformer_blocks.2.attn.to_k"]
    subject = found.datasets[0]
    assert (subject["type"], subject["dataset_name"], subject["instance_prompt"], subject["repeats"]) == ("huggingface", "x/y", "a TOK", 2)
    assert any("precondition_outputs" in note for note in found.notes)
    captioned = read(f"{line} --caption_column words", script, needed=False).datasets[0]
    assert captioned["caption_column"] == "words" and "instance_prompt" not in captioned


def test_several_prompts_become_a_library():
    found = read("--validation_prompts 'a cat' 'a dog'")

    assert found.prompts == {"prompt_1": "a cat", "prompt_2": "a dog"} and "validation_prompt" not in found.config


def test_what_the_script_would_refuse_is_refused_at_once():
    with pytest.raises(ConfigError) as refused:
        read("--mixed_precision fp8 --lr_scheduler cosin", needed=False)

    assert all(
        said in refused.value.message
        for said in ("--pretrained_model_name_or_path is missing", "--dataset_name or --train_data_dir is missing", "'fp8' is not one of", "'cosin'")
    )
    with pytest.raises(ConfigError, match="--prodigy_decouple 'flase' is not one of True, False"):
        read(f"{MODEL} --instance_data_dir dog --instance_prompt dog --prodigy_decouple flase", "train_dreambooth_lora_flux.py", needed=False)
    with pytest.raises(ConfigError, match="instance_prompt is missing"):
        read(f"{MODEL} --instance_data_dir dog", "train_dreambooth_lora.py", needed=False)
    with pytest.raises(ConfigError, match="not a script that can be imported"):
        Diffusers().read(["accelerate", "launch", "train_controlnet.py"], {})


def test_no_reason_is_given_for_a_flag_that_no_script_has():
    known = {name for script in SCRIPTS.values() for name in script.flags}

    assert NO_EQUAL.keys() <= known and known >= SILENT


def test_the_command_overwrites_nothing_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["import", "diffusers", "--output", "here/", "--", *f"accelerate launch train_text_to_image.py {MODEL} --dataset_name x/y".split()]
    assert main(line) == 0
    (tmp_path / "here" / "config.json").write_text("mine")

    assert main(line) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "here" / "config.json").read_text() == "mine"
    assert main([*line[:3], "there", "--force", *line[4:]]) == 0
    assert main([*line[:2], "--force", *line[2:]]) == 0
    assert json.loads((tmp_path / "here" / "config.json").read_text())["data_backend_config"] == "here/multidatabackend.json"


def test_a_value_that_no_trainer_would_take_writes_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main(["import", "diffusers", "--", f"accelerate launch train_text_to_image.py {NEEDED[False]} --learning_rate 0"]) == 2

    assert "learning_rate" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which tool's settings"),
        (["difusers"], "did you mean 'diffusers'"),
        (["diffusers"], "there is no command"),
        (["diffusers", "--outputt", "x", "--", "a.py"], "does not take '--outputt'"),
    ],
)
def test_what_the_command_lacks_is_said(words, said, capsys):
    assert main(["import", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_its_table_is_trained_as_imported(tmp_path, monkeypatch):
    """`--train_data_dir` with metadata.jsonl, as the scripts want it; two captions for one picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    add_pictures(Path("pictures"), 4, (70, 50))
    rows = [{"file_name": f"picture_{number:03d}.png", "text": ["a cat", "a dog"] if number else "noise"} for number in range(4)]
    Path("pictures/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    told = f"--pretrained_model_name_or_path {model('sd1x')} --train_data_dir pictures --resolution 32 --center_crop --train_batch_size 2"
    line = f"accelerate launch train_text_to_image_lora.py {told} --max_train_steps 2 --snr_gamma 5 --seed 3 --output_dir run"

    assert main(["import", "diffusers", line]) == 0
    assert main(["train", "--env", "run"]) == 0

    assert Path("run/pytorch_lora_weights.safetensors").is_file()
