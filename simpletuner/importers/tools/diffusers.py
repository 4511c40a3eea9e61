"""The training scripts of diffusers: text to image, with or without LoRA, and DreamBooth; by the command that starts them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.importers.command_line import TRUTHS, Command, choose_program, read_command, read_flags
from simpletuner.importers.diffusers_flow import PRODIGY_TRUTHS, SCHEMES, flow_looks, flow_model, flow_objective, flow_optimizer
from simpletuner.importers.diffusers_scripts import SCRIPTS, Script
from simpletuner.importers.hub import NO_TOKEN, use_hub
from simpletuner.importers.importer import Imported, Importer

PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
POLYNOMIAL_END = 1e-7
"""Where their polynomial schedule ends."""
EMA_DECAY = 0.9999
USUAL_STEP_PX, PIPELINE_STEP_PX = 64, 8
"""Multiples to which sides are rounded here, and that the models must have."""
DREAMBOOTH_OFFSET = 0.1
STABLE_DIFFUSION_2 = re.compile(r"stable-diffusion-2|(?:^|[/_-])sd-?2|v2-[01]|pseudo-flex-v2", re.IGNORECASE)
STABLE_DIFFUSION_1 = re.compile(r"CompVis/|stable-diffusion-v1|(?:^|[/_-])sd-?(?:v?1)", re.IGNORECASE)
MEANINGFUL = re.compile(r"CUDA_|HF_|WANDB_|PYTORCH_|NCCL_|OMP_|TOKENIZERS_")
"""Variables that libraries read, here as there."""
OF_LAUNCHER = {"mixed_precision", "num_processes", "multi_gpu"}
HARMLESS = {"num_cpu_threads_per_process", "main_process_port", "same_network", "rdzv_backend", "m"}
NO_EQUAL = {
    "non_ema_revision": "give the branch with --revision",
    "cache_dir": "the variable HF_HOME says where downloads go; cache_dir of config.json is another folder, for encoded images and captions",
    "dataset_config_name": "a dataset's configuration cannot be chosen; download it, and give its parquet files as dataset_name",
    "random_flip": "pictures are not mirrored; add mirrored copies to the dataset",
    "dream_training": "there is no DREAM",
    "offload_ema": "the average stays where the weights are",
    "foreach_ema": "the average is always updated so",
    "dataloader_num_workers": "batches are read ahead of training by themselves (dataloader_prefetch_qlen)",
    "enable_xformers_memory_efficient_attention": "not needed: PyTorch's own attention is used, which needs as little memory",
    "enable_npu_flash_attention": "there is no support for NPUs",
    "debug_loss": "steps are not logged with file names",
    "hub_model_id": "nothing is uploaded without --push_to_hub",
    "hub_token": NO_TOKEN,
    "train_text_encoder": "text encoders are trained by LoRA alone, here only the U-Net is",
    "text_encoder_lr": "text encoders are trained by LoRA alone",
    "adam_weight_decay_text_encoder": "everything that learns has one weight decay",
    "tokenizer_name": "the model's own tokenizer is used",
    "text_encoder_use_attention_mask": "CLIP encoders are called without a mask",
    "validation_images": "pictures are made from text alone",
    "class_labels_conditioning": "models with class labels are not trained",
    "validation_scheduler": "validation uses the model's own scheduler",
    "prior_generation_precision": "class pictures are not made by training, see with_prior_preservation",
    "sample_batch_size": "class pictures are not made by training, see with_prior_preservation",
    "crops_coords_top_left_h": "the model is told the true place of each crop",
    "crops_coords_top_left_w": "the model is told the true place of each crop",
}
"""Flags to what to do instead, or why nothing."""
SILENT = {
    *("local_rank", "dream_detail_preservation", "set_grads_to_none", "skip_save_text_encoder", "pre_compute_text_embeddings", "allow_tf32"),
    *("cache_latents", "upcast_before_saving"),
}
"""Flags that ask for what is always so here, or belong to another flag."""


class Diffusers(Importer):
    """Reads `accelerate launch train_text_to_image.py ...` and its relatives."""

    example: ClassVar[str] = "accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path ... --dataset_name ..."
    takes_file: ClassVar[bool] = False

    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        command = read_command(words, environ)
        if command.program not in SCRIPTS:
            raise choose_program(command.program, SCRIPTS)
        script = SCRIPTS[command.program]
        given = read_flags(command.words, script.flags, command.program)
        flags = {name: default for name, (_, default) in script.flags.items()} | given
        refuse(script, flags)
        found = Imported()
        parts: tuple[Callable[[Script, Mapping[str, Any], Command, Imported], None], ...] = (model, data, length, rate, objective, precision, looks)
        for part in parts:
            part(script, flags, command, found)
        unlike = {name for name, (_, default) in script.flags.items() if flags[name] != default} - found.config.keys()
        found.lost += [f"--{name}: {reason}" for name, reason in NO_EQUAL.items() if name in unlike]
        launcher(command, found)
        return found


def refuse(script: Script, flags: Mapping[str, Any]) -> None:
    """Refuse what the script itself would.

    Raises:
        ConfigError: everything at once.
    """
    problems = []
    if not flags["pretrained_model_name_or_path"]:
        problems.append("--pretrained_model_name_or_path is missing")
    if script.is_dreambooth:
        wanted = ("instance_prompt",) if flags.get("dataset_name") else ("instance_data_dir", "instance_prompt")
        problems += [f"--{name} is missing" for name in wanted if not flags[name]]
        if flags.get("dataset_name") and flags["instance_data_dir"]:
            problems.append("--dataset_name and --instance_data_dir exclude each other")
        if flags["with_prior_preservation"]:
            problems += [
                f"--{name} is missing, which --with_prior_preservation needs" for name in ("class_data_dir", "class_prompt") if not flags[name]
            ]
    elif not (flags["dataset_name"] or flags["train_data_dir"]):
        problems.append("--dataset_name or --train_data_dir is missing")
    choices = {"mixed_precision": PRECISIONS, "lr_scheduler": SCHEDULES, "prediction_type": ("epsilon", "v_prediction"), "weighting_scheme": SCHEMES}
    for name, known in choices.items():
        if flags.get(name) is not None and flags[name] not in known:
            problems.append(f"--{name} {flags[name]!r} is not one of {', '.join(known)}")
    for name in (f"prodigy_{name}" for name in PRODIGY_TRUTHS if script.flow_family):
        if flags[name].lower() not in TRUTHS:
            problems.append(f"--{name} {flags[name]!r} is not one of True, False")
    if problems:
        raise ConfigError("\n  - ".join([f"{script.name} cannot be run like this", *problems]), hint="Correct the command and import it again.")


def model(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    location = flags["pretrained_model_name_or_path"]
    family = script.flow_family or ("sdxl" if script.is_sdxl else stable_diffusion(location, found))
    found.config |= {"model_family": family, "model_type": script.trains, "pretrained_model_name_or_path": location}
    for key in ("revision", "variant", "pretrained_vae_model_name_or_path"):
        if flags.get(key):
            found.config[key] = flags[key]
    if script.trains == "lora":
        found.config |= {"lora_type": "standard", "lora_rank": flags["rank"], "lora_init_type": "gaussian"}
        if flags.get("train_text_encoder"):
            found.config["train_text_encoder"] = True
    if script.flow_family:
        flow_model(script, flags, found)
    if flags.get("tokenizer_max_length") not in (None, 77):
        found.lost.append("--tokenizer_max_length: the CLIP encoders read 77 tokens")


def stable_diffusion(location: str, found: Imported) -> str:
    """Tell Stable Diffusion 2 from 1, by the U-Net's configuration if it is here, else by the name."""
    config = Path(location).expanduser() / "unet" / "config.json"
    try:
        return "sd2x" if json.loads(config.read_text(encoding="utf-8")).get("cross_attention_dim") == 1024 else "sd1x"
    except (OSError, ValueError):
        pass
    if STABLE_DIFFUSION_2.search(location):
        return "sd2x"
    if not STABLE_DIFFUSION_1.search(location):
        found.notes.append(f"{location} is taken for a Stable Diffusion 1; if it is a 2, set model_family to sd2x")
    return "sd1x"


def data(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    found.config |= {"resolution": flags["resolution"], "resolution_type": "pixel"}
    if flags["resolution"] % USUAL_STEP_PX:
        found.config["aspect_bucket_alignment"] = PIPELINE_STEP_PX
    found.config["caption_dropout_probability"] = flags.get("proportion_empty_prompts", 0.0)
    crop = {"crop": True, "crop_aspect": "square", "crop_style": "center" if flags["center_crop"] else "random"}
    if not flags["center_crop"]:
        found.notes.append("crops are random, as there, but each image keeps its place; crops_per_image in multidatabackend.json gives it several")
    if script.is_dreambooth:
        subject(flags, crop, found)
        resampling = "bilinear" if script.flow_family is None else "lanczos"
    else:
        found.datasets.append({"id": "train", **place(flags, found), **crop})
        resampling = flags["image_interpolation_mode"]
    if flags.get("max_train_samples"):
        found.datasets[0]["max_num_samples"] = flags["max_train_samples"]
        found.notes.append("max_train_samples: as many images, but others: here they are chosen by their names")
    if resampling != "lanczos":
        found.notes.append(f"images are resized by Lanczos, not {resampling}")
    found.datasets.append({"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"})


def place(flags: Mapping[str, Any], found: Imported) -> dict[str, Any]:
    """Where the images of a text-to-image script lie, and their captions."""
    name, folder, columns = flags["dataset_name"], flags["train_data_dir"], (flags["image_column"], flags["caption_column"])
    if name:
        if folder:
            found.lost.append("--train_data_dir: with --dataset_name it chooses a part of the dataset there; here all of it is used")
        return {
            "type": "huggingface",
            "dataset_name": name,
            "split": "train",
            "image_column": columns[0],
            "caption_strategy": "huggingface",
            "caption_column": columns[1],
        }
    if columns[0] != "image":
        found.lost.append(f"--image_column {columns[0]}: a folder has files, named in the column file_name of its metadata.jsonl")
    table = {"path": "metadata.jsonl", "filename_column": "file_name", "identifier_includes_extension": True, "caption_column": columns[1]}
    return {"type": "local", "instance_data_dir": folder, "caption_strategy": "jsonl", "parquet": table}


def subject(flags: Mapping[str, Any], crop: Mapping[str, Any], found: Imported) -> None:
    """DreamBooth: a few images of one thing, all with one caption, and on demand images of its kind beside them."""
    told = {"type": "local", "caption_strategy": "instanceprompt"}
    found.datasets.append({"id": "subject", **instances(flags), **crop})
    if flags.get("repeats", 1) > 1:
        found.datasets[-1]["repeats"] = flags["repeats"] - 1  # besides the first time
    if not flags["with_prior_preservation"]:
        return
    found.datasets.append({"id": "class", **told, "instance_data_dir": flags["class_data_dir"], "instance_prompt": flags["class_prompt"], **crop})
    found.datasets[-1]["max_num_samples"] = flags["num_class_images"]
    found.notes += [
        "with_prior_preservation: a second dataset. There each step sees as many class images as others; here a batch is of either, so the same "
        "number of steps sees half as many: max_train_steps is left as it was",
        f"class images are not made by training; make those that are missing: simpletuner generate {json.dumps(flags['class_prompt'])} "
        f"--model_family {found.config['model_family']} --pretrained_model_name_or_path {flags['pretrained_model_name_or_path']} "
        f"--size {flags['resolution']} -n {flags['num_class_images']} --output {flags['class_data_dir']}",
    ]
    if flags["prior_loss_weight"] != 1:
        found.lost.append(
            f"--prior_loss_weight {flags['prior_loss_weight']:g}: both datasets count alike; probability in its entry shows one more often"
        )


def instances(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Where the images of a DreamBooth script lie, and what they are called."""
    prompt = {"caption_strategy": "instanceprompt", "instance_prompt": flags["instance_prompt"]}
    if not flags.get("dataset_name"):
        return {"type": "local", **prompt, "instance_data_dir": flags["instance_data_dir"]}
    column = flags["caption_column"]
    captions = {"caption_strategy": "huggingface", "caption_column": column} if column else prompt
    return {"type": "huggingface", "dataset_name": flags["dataset_name"], "split": "train", "image_column": flags["image_column"], **captions}


def length(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    key, value = ("max_train_steps", flags["max_train_steps"]) if flags["max_train_steps"] else ("num_train_epochs", flags["num_train_epochs"])
    found.config |= {
        key: value,
        "train_batch_size": flags["train_batch_size"],
        "gradient_accumulation_steps": flags["gradient_accumulation_steps"],
        "gradient_checkpointing": flags["gradient_checkpointing"],
        "output_dir": flags["output_dir"],
        "checkpoint_step_interval": flags["checkpointing_steps"],
        "checkpoints_total_limit": flags["checkpoints_total_limit"] or 0,
        "num_processes": processes(command, found),
    }
    if flags["seed"] is None:
        found.notes.append("there is no seed; here there always is one, 42, which also makes a resumed run the same as one that was not stopped")
    else:
        found.config["seed"] = flags["seed"]
    if flags["resume_from_checkpoint"] not in (None, "latest"):
        found.lost.append(f"--resume_from_checkpoint {flags['resume_from_checkpoint']}: checkpoints of the script cannot be continued here")
    if flags.get("use_ema"):
        found.config |= {"use_ema": True, "ema_decay": EMA_DECAY}


def processes(command: Command, found: Imported) -> int:
    """Accelerators that train together, as the launcher was told."""
    said = command.launcher.get("num_processes", "")
    if said.isdigit():
        return max(1, int(said))
    if "multi_gpu" in command.launcher:
        found.lost.append("--multi_gpu without --num_processes: set num_processes to the number of GPUs; it is 1 now")
    return 1


def rate(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    config = found.config
    batch = config["train_batch_size"] * config["gradient_accumulation_steps"] * config["num_processes"]
    learning_rate, schedule = flags["learning_rate"], flags["lr_scheduler"]
    if flags["scale_lr"]:
        found.notes.append(f"scale_lr: learning_rate is {learning_rate:g} x {batch}, the images of a step")
        learning_rate = float(f"{learning_rate * batch:.12g}")
    config |= {
        "learning_rate": learning_rate,
        "lr_scheduler": schedule,
        "lr_warmup_steps": 0 if schedule == "constant" else flags["lr_warmup_steps"],
        "optimizer": "bnb-adamw8bit" if flags["use_8bit_adam"] else "torch-adamw",
        "optimizer_config": {
            "betas": [flags["adam_beta1"], flags["adam_beta2"]],
            "weight_decay": flags["adam_weight_decay"],
            "eps": flags["adam_epsilon"],
        },
        "max_grad_norm": flags["max_grad_norm"],
    }
    if script.flow_family:
        flow_optimizer(flags, found)
    if schedule == "polynomial":
        config |= {"lr_end": POLYNOMIAL_END, "lr_power": flags.get("lr_power", 1.0)}
    if schedule == "cosine_with_restarts":
        config["lr_num_cycles"] = flags.get("lr_num_cycles", 1)
    if not script.clips:
        found.notes.append(f"max_grad_norm {flags['max_grad_norm']:g} has an effect here; that script clips nothing by mistake, which 0 repeats")


def objective(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    config = found.config
    if script.flow_family:
        flow_objective(script, flags, found)
        return
    config["disable_segmented_timestep_sampling"] = True  # all steps alike, drawn independently
    for key in ("prediction_type", "snr_gamma", "input_perturbation"):
        if flags.get(key):
            config[key] = flags[key]
    offset = DREAMBOOTH_OFFSET if flags.get("offset_noise") else flags.get("noise_offset", 0.0)
    if offset:
        config |= {"offset_noise": True, "noise_offset": offset, "noise_offset_probability": 1.0}
    strategy = flags.get("timestep_bias_strategy", "none")
    if strategy != "none":
        keys = ("begin", "end") if strategy == "range" else ("portion",)
        config |= {f"timestep_bias_{key}": flags[f"timestep_bias_{key}"] for key in ("strategy", "multiplier", *keys)}


def precision(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    said = flags["mixed_precision"] or command.launcher.get("mixed_precision") or command.variables.get("ACCELERATE_MIXED_PRECISION")
    if said not in PRECISIONS:
        found.notes.append(
            "neither the script nor its launcher is told a mixed_precision; no is assumed, which is what accelerate does without its own config"
        )
        said = "no"
    found.config["mixed_precision"] = said
    keeps_float32 = script.is_sdxl and (script.is_dreambooth or not flags.get("pretrained_vae_model_name_or_path"))
    keeps_float32 = keeps_float32 or script.flow_family == "sd3"
    found.config["vae_dtype"] = "fp32" if said == "no" or keeps_float32 else said
    if flags["allow_tf32"] and said == "no":
        found.lost.append("--allow_tf32: mixed_precision no is float32 throughout; with bf16 or fp16 TF32 is on")


def looks(script: Script, flags: Mapping[str, Any], command: Command, found: Imported) -> None:
    config = found.config
    prompts = flags.get("validation_prompts") or [prompt for prompt in (flags.get("validation_prompt"),) if prompt]
    if len(prompts) > 1:
        found.prompts = {f"prompt_{number}": prompt for number, prompt in enumerate(prompts, start=1)}
    if prompts:
        config |= {"validation_prompt": prompts[0]} if len(prompts) == 1 else {}
        config |= {
            "validation_negative_prompt": "",
            "validation_resolution": {"sd1x": "512", "sd2x": "768"}.get(config["model_family"], "1024"),
            "validation_num_inference_steps": script.validation_steps,
            "num_validation_images": flags.get("num_validation_images", 1),
        }
        if script.flow_family:
            flow_looks(script, found)
        if "validation_steps" in flags:
            config["validation_step_interval"] = flags["validation_steps"]
        else:
            config |= {"validation_step_interval": 0, "validation_epoch_interval": flags["validation_epochs"]}
    if flags["push_to_hub"]:
        use_hub(found, flags["hub_model_id"], None)
    if flags["report_to"] != "none":
        config |= {key: flags[key] for key in ("report_to", "logging_dir", "tracker_project_name") if key in flags}


def launcher(command: Command, found: Imported) -> None:
    """Name what the launcher was told and is not needed, or not known."""
    for name, value in command.launcher.items():
        if name not in OF_LAUNCHER | HARMLESS and (name, value) not in (("num_machines", "1"), ("dynamo_backend", "no")):
            found.lost.append(f"--{name}{'' if value == 'true' else f' {value}'} of the launcher: `simpletuner train` starts its processes itself")
    kept = [f"{name}={value}" for name, value in command.variables.items() if MEANINGFUL.match(name) and "TOKEN" not in name and "KEY" not in name]
    if kept:
        found.notes.append(f"set these before `simpletuner train` too: {' '.join(kept)}")
