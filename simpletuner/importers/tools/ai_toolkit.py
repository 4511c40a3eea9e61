"""ostris' ai-toolkit: its YAML or JSON config of a job that trains a LoRA, a LoKr or a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from simpletuner.errors import ConfigError, choose
from simpletuner.importers.ai_toolkit_data import data
from simpletuner.importers.ai_toolkit_keys import (
    CONFIG,
    EMA,
    ITEM,
    JOB,
    LOGGING,
    MODEL,
    NETWORK,
    NO_EQUAL,
    PROCESS,
    SAMPLE,
    SAVE,
    SCHEDULE,
    SILENT,
    TRAIN,
)
from simpletuner.importers.hub import use_hub
from simpletuner.importers.importer import Imported, Importer
from simpletuner.importers.layers import UNETS, Reach, adapt, adapt_by_lycoris
from simpletuner.importers.pictures import Look, use_looks
from simpletuner.importers.rates import use_optimizer, use_schedule
from simpletuner.importers.settings import Settings, read_settings

ARCHITECTURES = {
    "sd1": "sd1x",
    "sd2": "sd2x",
    "sd3": "sd3",
    "sdxl": "sdxl",
    "pixart": "pixart",
    "pixart_sigma": "pixart",
    "auraflow": "auraflow",
    "flux": "flux",
    "flux2": "flux2",
    "flux2_klein_4b": "flux2",
    "flux2_klein_9b": "flux2",
    "lumina2": "lumina2",
    "chroma": "chroma",
    "qwen_image": "qwen_image",
    "zimage": "z_image",
}
OLD_ARCHITECTURES = {
    "is_v2": "sd2",
    "is_v3": "sd3",
    "is_xl": "sdxl",
    **{f"is_{name}": name for name in ("pixart", "pixart_sigma", "auraflow", "flux", "lumina2", "ssd", "vega")},
}
PROCESSES = ("sd_trainer", "diffusion_trainer", "ui_trainer")
PRECISIONS = {
    "qfloat8": "fp8-quanto",
    "float8": "fp8wo-torchao",
    "qint8": "int8-quanto",
    "qint4": "int4-quanto",
    "qint2": "int2-quanto",
    "int8": "int8-torchao",
    **dict.fromkeys(("uint8", "uint7", "uint6"), "int8-torchao"),
    **dict.fromkeys(("int4", "uint5", "uint4", "uint3"), "int4-torchao"),
    "uint2": "int2-quanto",
}
NEARLY = ("uint7", "uint6", "uint5", "uint3")
LARGEST_ENCODER = {"flux": 2, "sd3": 3}
"""The text encoder that they quantise; the only one in other families."""
WITHOUT_QUANTISED_TEXT = UNETS
ADAM = {"betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01}
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adam": ("torch-adam", {**ADAM, "weight_decay": 0.0}),
    "adamw": ("torch-adamw", ADAM),
    **dict.fromkeys(("adamw8", "adamw8bit"), ("bnb-adamw8bit", ADAM)),
    **dict.fromkeys(("adam8", "adam8bit"), ("bnb-adam8bit", {**ADAM, "weight_decay": 0.0})),
    "ademamix8bit": ("bnb-ademamix8bit", {"eps": 1e-6}),
    "lion": ("lion", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "lion8bit": ("bnb-lion8bit", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "adagrad": ("torch-adagrad", {}),
    "adafactor": ("torch-adafactor", {"weight_decay": 0.0}),
    **dict.fromkeys(("prodigy", "prodigyopt"), ("prodigy", {"betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0})),
}
SCHEDULES = {name: name for name in ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts")}
MIXED = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no", "float": "no"}
SCHEDULERS = ("flowmatch", "ddpm")
USUAL_RANK = 4
WHOLE = 10000


class AiToolkit(Importer):
    """Reads `python run.py config.yaml`'s file."""

    example: ClassVar[str] = "config.yaml"

    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        file = next((Path(word) for word in words if word.lower().endswith((".yaml", ".yml", ".json", ".jsonc"))), None)
        if file is None:
            raise ConfigError(f"{' '.join(words)} names no .yaml or .json file", hint=f"simpletuner import ai-toolkit {self.example}")
        content = read_settings(file)
        if not isinstance(content, Mapping) or not isinstance(content.get("config"), Mapping):
            raise ConfigError(f"{file} is no job of ai-toolkit", hint="Such a file has job and config, and in config a list called process.")
        found, job = Imported(), Settings(content, JOB)
        config = job.part("config", CONFIG)
        config.place = ""
        processes = config.parts("process", PROCESS)
        if not processes or processes[0]["type"] not in PROCESSES:
            kind = processes[0]["type"] if processes else "nothing"
            raise ConfigError(f"{file} asks for {kind}, which is no training of an image model", hint=choose(kind, PROCESSES, "processes"))
        if len(processes) > 1:
            found.lose(f"process: {len(processes)} of them; the first is imported")
        process = processes[0]
        process.place = ""
        job.asked.add("config")
        parts = {name: process.part(name, known) for name, known in (("network", NETWORK), ("save", SAVE), ("train", TRAIN), ("model", MODEL))}
        parts |= {"sample": process.part("sample", SAMPLE), "logging": process.part("logging", LOGGING)}
        translate(str(config["name"]), process, parts, found)
        job.refuse(str(file))
        for part in (job, config, process, *parts.values()):
            part.leave(found, NO_EQUAL, SILENT)
        return found


def translate(name: str, process: Settings, parts: Mapping[str, Settings], found: Imported) -> None:
    train = parts["train"]
    found.config["output_dir"] = f"{process['training_folder'] or 'output'}/{name}"
    model(parts["model"], train, found)
    adapter(process, parts["network"], train, found)
    data(process, train, found)
    steps = length(parts["save"], train, found)
    optimizer(train, found)
    objective(train, found)
    looks(process, parts["sample"], train, steps, found)
    if parts["save"]["push_to_hub"]:
        use_hub(found, parts["save"]["hf_repo_id"], parts["save"]["hf_private"])
    if parts["logging"]["use_wandb"]:
        found.config |= {"report_to": "wandb", "tracker_project_name": parts["logging"]["project_name"]}
        found.config |= {"tracker_run_name": parts["logging"]["run_name"]} if parts["logging"]["run_name"] else {}
    if process["training_seed"] is None:
        found.note("there is no seed; here there always is one, 42, which also makes a resumed run the same as one that was not stopped")
    else:
        found.config["seed"] = process["training_seed"]


def model(told: Settings, train: Settings, found: Imported) -> None:
    """The family, the precision of its parts, and what waits in main memory."""
    old = [name for key, name in OLD_ARCHITECTURES.items() if told[key]]
    arch, _, tag = str(told["arch"] or (old[-1] if old else "sd1")).partition(":")
    family = ARCHITECTURES.get({"flex1": "flux"}.get(arch, arch))
    if family is None:
        raise ConfigError(f"model.arch {arch} is not trained here", hint=choose(arch, ARCHITECTURES, "architectures"))
    if arch == "flex1" or "flex" in str(told["name_or_path"]).lower():
        found.note("Flex is taken for a Flux.1, of which it has fewer blocks")
    if not told["name_or_path"]:
        told.problems.append("model.name_or_path is missing")
    config = found.config
    config |= {"model_family": family, "pretrained_model_name_or_path": told["name_or_path"]}
    config |= {"pretrained_vae_model_name_or_path": told["vae_path"]} if told["vae_path"] else {}
    if tag == "turbo":
        config["model_flavour"] = "turbo"
    if family in UNETS:
        config["prediction_type"] = "v_prediction" if told["is_v_pred"] else "epsilon"
    if told["assistant_lora_path"]:
        config["assistant_lora_path"] = told["assistant_lora_path"]
    if told["attn_masking"] and family == "flux":
        config["flux_attention_masked_training"] = True
    if told["quantize"]:
        config["base_model_precision"] = precision(told, "qtype", found)
    quantizes_text = told["quantize"] if told["quantize_te"] is None else told["quantize_te"]
    if quantizes_text and family not in WITHOUT_QUANTISED_TEXT:
        config[f"text_encoder_{LARGEST_ENCODER.get(family, 1)}_precision"] = precision(told, "qtype_te", found)
    elif quantizes_text and told.says("quantize_te"):
        found.lose("model.quantize_te true: CLIP text encoders are small; text_encoder_1_precision quantises them")
    if told["low_vram"] and told["quantize"]:
        config["quantize_via"] = "cpu"
    if told["compile"]:
        config["dynamo_backend"] = "inductor"
    offload(told, found)
    said = MIXED.get(train["dtype"])
    if said is None:
        told.problems.append(f"train.dtype {train['dtype']!r} is not one of {', '.join(MIXED)}")
    vae = MIXED.get(told["vae_dtype"]) if told["vae_dtype"] else said
    config |= {"mixed_precision": said or "bf16", "vae_dtype": "fp32" if vae == "no" else vae or "bf16"}


def precision(told: Settings, key: str, found: Imported) -> str:
    kind, _, repair = told[key].partition("|")
    if repair:
        found.lose(f"model.{key} ...|{repair}: {NO_EQUAL['accuracy_recovery_adapter']}")
    if kind not in PRECISIONS or kind in NEARLY:
        found.lose(f"model.{key} {kind}: there is no such precision; it is {PRECISIONS.get(kind, 'fp8-quanto')} now")
    return PRECISIONS.get(kind, "fp8-quanto")


def offload(told: Settings, found: Imported) -> None:
    if not told["layer_offloading"]:
        return
    share = told["layer_offloading_transformer_percent"]
    if share >= 1:
        found.config["enable_group_offload"] = True
    elif share > 0:
        found.lose(f"model.layer_offloading_transformer_percent {share:g}: blocks are counted here; set blocks_to_swap to that share of them")


def adapter(process: Settings, network: Settings, train: Settings, found: Imported) -> None:
    """A LoRA, a LoKr, or with no network all weights."""
    config = found.config
    config["learning_rate"] = train["unet_lr"] or train["lr"]
    if not network.given:
        config["model_type"] = "full"
        config.pop("base_model_precision", None)
        if train["train_text_encoder"]:
            found.lose("train.train_text_encoder true: text encoders are trained by LoRA alone")
        return
    kind, family = network["type"].lower(), config["model_family"]
    rank = network["rank"] or network["linear"] or USUAL_RANK
    alpha = network["linear_alpha"] if network.says("linear_alpha") else network["alpha"]
    conv = network["conv"]
    reach: Reach = "everything" if conv and family in UNETS else "blocks"
    told = network["network_kwargs"] or {}
    if kind == "lokr":
        whole = network["lokr_full_rank"]
        settings = {"algo": "lokr", "linear_dim": WHOLE if whole else rank, "linear_alpha": float(WHOLE) if whole else alpha}
        settings |= {"factor": network["lokr_factor"], **({"dropout": network["dropout"]} if network["dropout"] else {})}
        adapt_by_lycoris(found, "convolutions" if conv and family in UNETS else "blocks", settings)
        if train["train_text_encoder"]:
            found.lose("train.train_text_encoder true: LyCORIS adapts the denoiser alone")
    else:
        if kind not in ("lora", "locon"):
            network.problems.append(f"network.type {kind!r} is not one of lora, locon, lokr")
        adapt(found, reach, rank, alpha, network["dropout"] or 0.0, train["train_text_encoder"])
    if conv and family in UNETS and conv != rank:
        found.lose(f"network.conv {conv}: convolutions have the rank of the other layers, {rank}")
    for key, value in told.items():
        if value:
            found.lose(f"network.network_kwargs.{key} {value}: name the layers in peft_lora_target_modules, or in lycoris_config")
    if network["pretrained_lora_path"]:
        config["init_lora"] = network["pretrained_lora_path"]
    if config.get("train_text_encoder"):
        config["text_encoder_lr"] = train["text_encoder_lr"] or train["lr"]
    if not train["train_unet"]:
        found.lose("train.train_unet false: the denoiser is always trained")


def length(save: Settings, train: Settings, found: Imported) -> int:
    """Steps, batches and checkpoints.

    Returns:
        Their steps that make one of the optimizer.
    """
    counted, config = train["gradient_accumulation_steps"], found.config
    if counted < 1:
        found.lose(f"train.gradient_accumulation_steps {counted}: a whole epoch; it is 1 now")
        counted = 1
    accumulated = max(counted, train["gradient_accumulation"])
    if counted > 1:
        found.note(
            f"train.gradient_accumulation_steps {counted}: each batch is a step there; here steps are those of the optimizer, {counted} times fewer"
        )
    config |= {
        "max_train_steps": math.ceil(train.positive("steps") / counted),
        "gradient_accumulation_steps": accumulated,
        "gradient_checkpointing": train["gradient_checkpointing"],
        "checkpoint_step_interval": math.ceil(save["save_every"] / counted),
        "checkpoints_total_limit": max(0, save["max_step_saves_to_keep"]),
        "max_grad_norm": train["max_grad_norm"],
    }
    ema = train.part("ema_config", EMA)
    if ema["use_ema"]:
        config |= {"use_ema": True, "ema_decay": ema["ema_decay"]}
    ema.leave(found, NO_EQUAL, SILENT)
    return counted


def optimizer(train: Settings, found: Imported) -> None:
    config, asked, schedule = found.config, train["optimizer"], train["lr_scheduler"]
    told, of_schedule = train["optimizer_params"] or {}, train.part("lr_scheduler_params", SCHEDULE)
    ours = use_optimizer(found, asked, OPTIMIZERS, told, "train.optimizer")
    if ours == "prodigy" and config["learning_rate"] < 0.1:
        config["learning_rate"] = 1.0  # as they do
    if schedule not in SCHEDULES:
        reason = "it rises there from a third of the rate" if schedule == "linear" else "there is no such schedule"
        found.lose(f"train.lr_scheduler {schedule}: {reason}; it is constant now")
    warmup = of_schedule["num_warmup_steps"]
    use_schedule(found, SCHEDULES.get(schedule, "constant"), warmup, config["max_train_steps"], "lr_scheduler_params.num_warmup_steps")
    if schedule.startswith("cosine") and of_schedule["eta_min"]:
        config["lr_end"] = of_schedule["eta_min"]
    of_schedule.leave(found, NO_EQUAL, {"total_iters"})


def objective(train: Settings, found: Imported) -> None:
    """Noise levels, and how errors count."""
    config, kind, scheduler = found.config, train["timestep_type"], train["noise_scheduler"]
    if scheduler not in SCHEDULERS:
        found.lose(f"train.noise_scheduler {scheduler}: the model's own training is used, as by {' or '.join(SCHEDULERS)}")
    if train["noise_offset"]:
        config |= {"offset_noise": True, "noise_offset": train["noise_offset"], "noise_offset_probability": 1.0}
    if train["loss_type"] not in ("mse", "l2"):
        found.lose(f"train.loss_type {train['loss_type']}: there are l2, huber and smooth_l1; it is l2 now")
    if train["content_or_style"] != "balanced":
        bias = "later" if train["content_or_style"] == "style" else "earlier"
        found.lose(
            f"train.content_or_style {train['content_or_style']}: all noise levels alike; on a U-Net timestep_bias_strategy {bias} is near to it"
        )
    if config["model_family"] in UNETS:
        config["disable_segmented_timestep_sampling"] = True
        gamma = train["min_snr_gamma"] or train["snr_gamma"]
        config |= {"snr_gamma": gamma} if gamma else {}
        train.asked.add("timestep_type")
        return
    if kind in ("sigmoid", "linear", "weighted"):
        config["flow_schedule_shift"] = 1.0
        config |= {"flow_sigmoid_scale": 1.0} if kind == "sigmoid" else {"flow_use_uniform_schedule": True}
    elif kind in ("shift", "flux_shift", "lumina2_shift"):
        config |= {"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True}
    else:
        config |= {"flow_sigmoid_scale": 1.0, "flow_schedule_shift": 1.0}
        found.lose(f"train.timestep_type {kind}: noise levels are drawn as by sigmoid now")
    if kind == "weighted" or train["linear_timesteps"] or train["linear_timesteps2"]:
        told = next(name for name in ("linear_timesteps", "linear_timesteps2", "timestep_type") if train[name] is True or train[name] == "weighted")
        found.lose(f"train.{told} {train[told]}: all noise levels count alike")


def looks(process: Settings, sample: Settings, train: Settings, counted: int, found: Imported) -> None:
    """Sample prompts and when they are rendered: before the first step too, unless it is said otherwise."""
    trigger, train_adapter = process["trigger_word"] or "", found.config.get("model_type") != "full"
    prompts = sample["prompts"] or []
    items = (
        sample.parts("samples", ITEM)
        if sample.says("samples")
        else [Settings({"prompt": text}, ITEM, "sample.", sample.problems) for text in prompts]
    )
    usual = {name: sample[name] for name in ("width", "height", "sample_steps", "guidance_scale")}
    negative = sample["neg"] if isinstance(sample["neg"], str) else ""
    is_scaled = train_adapter and any(part["network_multiplier"] not in (None, 1.0) for part in (sample, *items))
    found_looks = []
    for number, item in enumerate(items):
        own = {name: item[name] if item.says(name) else value for name, value in usual.items()}
        text = str(item["prompt"] or "").replace("[trigger]", trigger).strip()
        seed = item["seed"] if item["seed"] is not None else sample["seed"] + (number if sample["walk_seed"] else 0)
        strength = (item if item.says("network_multiplier") else sample)["network_multiplier"] if is_scaled else None
        told = item["neg"] if item.says("neg") else negative
        look = Look(text, told, own["width"], own["height"], own["sample_steps"], own["guidance_scale"], max(0, seed), strength=strength)
        found_looks.append(look)
        item.leave(found, NO_EQUAL, SILENT)
    use_looks(found, found_looks)
    if sample.given.get("sampler") in SCHEDULERS:
        sample.asked.add("sampler")
    if found_looks and sample["guidance_rescale"]:
        found.config["validation_guidance_rescale"] = sample["guidance_rescale"]
    if found_looks:
        interval = math.ceil(sample["sample_every"] / counted)
        found.config |= {"validation_step_interval": interval, "validation_on_startup": not train["skip_first_sample"]}
        if sample["sample_start_step"]:
            found.config["validate_after_step"] = math.ceil(sample["sample_start_step"] / counted)
    if train["disable_sampling"]:
        found.config["validation_disable"] = True
