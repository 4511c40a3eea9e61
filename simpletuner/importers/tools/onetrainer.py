"""OneTrainer: the JSON config or preset of a training, with its concepts and samples in it or in files beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from simpletuner.errors import ConfigError, choose
from simpletuner.importers.importer import Imported, Importer
from simpletuner.importers.layers import UNETS, WITH_TRAINED_TEXT, Reach, adapt, adapt_by_lycoris
from simpletuner.importers.onetrainer_data import between, by_the_clock, use_concepts, use_samples
from simpletuner.importers.onetrainer_keys import NO_EQUAL, OLD_OF_PARTS, PART, PARTS, SILENT, TOP
from simpletuner.importers.rates import ADAM, use_optimizer, use_schedule
from simpletuner.importers.settings import Settings, read_settings

FAMILIES = {
    "STABLE_DIFFUSION_15": "sd1x",
    **dict.fromkeys(("STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE", "STABLE_DIFFUSION_21", "STABLE_DIFFUSION_21_BASE"), "sd2x"),
    "STABLE_DIFFUSION_XL_10_BASE": "sdxl",
    **dict.fromkeys(("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35"), "sd3"),
    **dict.fromkeys(("PIXART_ALPHA", "PIXART_SIGMA"), "pixart"),
    "FLUX_DEV_1": "flux",
    "FLUX_2": "flux2",
    "SANA": "sana",
    "CHROMA_1": "chroma",
    "QWEN": "qwen_image",
    "Z_IMAGE": "z_image",
}
VELOCITY = ("STABLE_DIFFUSION_20", "STABLE_DIFFUSION_21")
"""Of the U-Nets, those that predict velocity."""
METHODS = ("LORA", "FINE_TUNE")
PRECISIONS = {"NFLOAT_4": "nf4-bnb", "FLOAT_8": "fp8wo-torchao", "INT_8": "int8-quanto", "INT_W8A8": "int8-matmul", "FLOAT_W8A8": "fp8-matmul"}
PLAIN_TYPES = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "no", "TFLOAT_32": "no"}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
T5_OF = {"flux": "text_encoder_2_precision", "sd3": "text_encoder_3_precision"}
NO_DECAY = {**ADAM, "weight_decay": 0.0}
LION = {"betas": [0.9, 0.99], "weight_decay": 0.0}
PRODIGY = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "decouple": True, "use_bias_correction": False, "safeguard_warmup": False}
OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adamw": ("torch-adamw", ADAM),
    "adam": ("torch-adam", NO_DECAY),
    "adamw_8bit": ("bnb-adamw8bit", ADAM),
    "adam_8bit": ("bnb-adam8bit", NO_DECAY),
    "ademamix": ("bnb-ademamix", {"weight_decay": 0.01, "eps": 1e-8}),
    "ademamix_8bit": ("bnb-ademamix8bit", {"weight_decay": 0.01, "eps": 1e-8}),
    "lion": ("lion", LION),
    "lion_8bit": ("bnb-lion8bit", {"betas": [0.9, 0.999], "weight_decay": 0.0}),
    "sgd": ("torch-sgd", {}),
    "sgd_8bit": ("bnb-sgd8bit", {}),
    "adagrad": ("torch-adagrad", {}),
    "rmsprop": ("torch-rmsprop", {}),
    "adafactor": ("torch-adafactor", {"weight_decay": 0.0}),
    "came": ("came", {"betas": [0.9, 0.999, 0.9999], "weight_decay": 0.01}),
    "prodigy": ("prodigy", PRODIGY),
    "prodigy_plus_schedule_free": ("prodigy_schedulefree", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "schedule_free_adamw": ("adamw_schedulefree", ADAM),
    "schedule_free_sgd": ("sgd_schedulefree", {"momentum": 0.0, "weight_decay": 0.01}),
}
SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    **dict.fromkeys(("COSINE_WITH_HARD_RESTARTS", "COSINE_WITH_RESTARTS"), "cosine_with_restarts"),
}
PRESETS: Mapping[str, Reach] = {"full": "everything", "attn-mlp": "transformers", "attn-only": "attention", "blocks": "blocks"}
WHOLE_RUN = math.nextafter(1.0, 0.0)
"""As a share that is told from one step."""
MODEL_WEIGHTS = ("MIN_SNR_GAMMA", "CONSTANT")
BY_ROOT = ("SQRT_BATCH", "SQRT_GRADIENT_ACCUMULATION", "SQRT_BOTH")


class OneTrainer(Importer):
    """Reads a config that OneTrainer saved, or one of its presets."""

    example: ClassVar[str] = "config.json"

    def read(self, words: Sequence[str], environ: Mapping[str, str]) -> Imported:
        file = next((Path(word) for word in words if word.lower().endswith(".json")), None)
        if file is None:
            raise ConfigError(f"{' '.join(words)} names no .json file", hint=f"simpletuner import onetrainer {self.example}")
        content = read_settings(file)
        if not isinstance(content, Mapping) or not {"training_method", "model_type"} & content.keys():
            raise ConfigError(f"{file} is no config of OneTrainer", hint="Such a file has training_method and model_type; concepts lie beside it.")
        found, told = Imported(), Settings(content, TOP)
        parts = {name: part_of(told, name) for name in PARTS}
        translate(told, parts, file, found)
        told.refuse(str(file))
        encoders = encoders_of(found.config["model_family"])
        parts["vae"].asked |= {"train", "gradient_checkpointing", "stop_training_after", "stop_training_after_unit", "learning_rate"}
        for part in (told, main_of(told, parts), *(parts[name] for name in (*encoders, "vae"))):
            part.leave(found, NO_EQUAL, SILENT)
        return found


def encoders_of(family: str) -> tuple[str, ...]:
    """The parts that are the text encoders of a family."""
    return ENCODERS[: {"sdxl": 2, "flux": 2, "sd3": 3}.get(family, 1)]


def part_of(told: Settings, name: str) -> Settings:
    """A part of the model; in old files its keys stand at the top: train_unet, unet_learning_rate."""
    part = told.part(name, PART)
    old = {f"train_{name}" if key == "train" else f"{name}_{key}": key for key in OLD_OF_PARTS}
    given = {key: told.given[top] for top, key in old.items() if told.says(top)}
    told.asked |= {top for top in old if top in TOP}
    epochs = f"train_{name}_epochs"
    if told.says(epochs):
        given |= {"stop_training_after": told[epochs], "stop_training_after_unit": "EPOCH"}
    if given.get("weight_dtype") == "NONE" or (not part.says("weight_dtype") and not given.get("weight_dtype") and told.says("weight_dtype")):
        given["weight_dtype"] = told["weight_dtype"]
    part.given = {**given, **part.given}
    return part


def main_of(told: Settings, parts: Mapping[str, Settings]) -> Settings:
    """The part that is the denoiser; old files call a transformer prior."""
    is_unet = FAMILIES.get(told["model_type"]) in UNETS
    return parts["unet"] if is_unet else parts["transformer"] if parts["transformer"].given or not parts["prior"].given else parts["prior"]


def translate(told: Settings, parts: Mapping[str, Settings], file: Path, found: Imported) -> None:
    config, kind, method = found.config, told["model_type"], told["training_method"]
    if kind not in FAMILIES:
        raise ConfigError(f"model_type {kind} is not trained here", hint=choose(kind, FAMILIES, "model types"))
    if method not in METHODS:
        raise ConfigError(f"training_method {method} is not done here", hint=choose(method, METHODS, "methods"))
    family = FAMILIES[kind]
    main = main_of(told, parts)
    where = Path(told["output_model_destination"].replace("\\", "/"))
    config |= {"model_family": family, "pretrained_model_name_or_path": told["base_model_name"]}
    config["output_dir"] = (where.with_suffix("") if where.suffix else where).as_posix() or "output"
    if parts["vae"]["model_name"]:
        config["pretrained_vae_model_name_or_path"] = parts["vae"]["model_name"]
    if main["model_name"]:
        network = "unet" if family in UNETS else "transformer"
        config[f"pretrained_{network}_model_name_or_path"] = main["model_name"]
    precision(told, parts, main, found)
    network_of(told, parts, main, found)
    epoch = use_concepts(told, parts, file, found)
    length(told, found)
    rate(told, parts, main, epoch, found)
    objective(told, main, found)
    use_samples(told, file, found)


def precision(told: Settings, parts: Mapping[str, Settings], main: Settings, found: Imported) -> None:
    """Number formats of the parts. Frozen weights are held in mixed_precision here, unless they are quantised."""
    config, said = found.config, told["train_dtype"]
    if said not in PLAIN_TYPES:
        told.problems.append(f"train_dtype {said!r} is not one of {', '.join(PLAIN_TYPES)}")
    config["mixed_precision"] = PLAIN_TYPES.get(said, "bf16")
    options = {"base_model_precision": main}
    options |= {f"text_encoder_{number}_precision": parts[name] for number, name in enumerate(encoders_of(config["model_family"]), start=1)}
    for option, part in options.items():
        kind = part["weight_dtype"]
        if kind in PRECISIONS:
            config[option] = PRECISIONS[kind]
        elif kind not in (*PLAIN_TYPES, "NONE"):
            found.lose(f"{part.place}weight_dtype {kind}: there is no such precision; set {option}")
    if found.config.get("base_model_precision") and told["training_method"] == "FINE_TUNE":
        config.pop("base_model_precision")
        found.lose(f"{main.place}weight_dtype {main['weight_dtype']}: a model of which all weights are trained is not quantised")
    vae = parts["vae"]["weight_dtype"]
    config["vae_dtype"] = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16"}.get(vae, "fp32")
    checkpoints = str(told["gradient_checkpointing"]).upper()
    on = checkpoints not in ("OFF", "FALSE") and main["gradient_checkpointing"]
    fraction = told["layer_offload_fraction"] if checkpoints == "CPU_OFFLOADED" else main["offload_fraction"]
    config["gradient_checkpointing"] = on
    if on and (checkpoints == "CPU_OFFLOADED" or main["activation_offloading"]):
        config["gradient_checkpointing_backend"] = "offload"
    if fraction >= 1 and told["training_method"] == "LORA":
        config["enable_group_offload"] = True
    elif fraction > 0:
        found.lose(f"layer_offload_fraction {fraction:g}: blocks are counted here; set blocks_to_swap to that share of them")
    if told["compile"]:
        config["dynamo_backend"] = "inductor"


def network_of(told: Settings, parts: Mapping[str, Settings], main: Settings, found: Imported) -> None:
    """The adapter, or all weights; and whether text encoders learn too, which they do by themselves."""
    config, family = found.config, found.config["model_family"]
    trained = [name for name in encoders_of(family) if parts[name]["train"] and (parts[name].given or (name == "text_encoder" and family in UNETS))]
    for name in encoders_of(family):
        parts[name].asked |= {"stop_training_after", "stop_training_after_unit", "learning_rate", "gradient_checkpointing"}
    if not main["train"]:
        found.lose(f"{main.place}train false: the denoiser is always trained")
    if told["training_method"] == "FINE_TUNE":
        config["model_type"] = "full"
        if trained:
            found.lose(f"{', '.join(trained)}.train true: text encoders are trained by LoRA alone")
        return
    chosen = told["layer_filter_preset"] if told.says("layer_filter_preset") else told["lora_layer_preset"]
    written = told["layer_filter"] or told["lora_layers"]
    reach = "everything" if not written and chosen in ("full", "custom") else PRESETS.get(chosen)
    pattern = pattern_of(written, told["layer_filter_regex"] or told["lora_layers_regex"]) if reach is None else reach
    dropout = told["dropout_probability"]
    kind = told["peft_type"]
    trains_text = bool(trained) and family in WITH_TRAINED_TEXT
    settings: dict[str, Any] = {"algo": "lora", "linear_dim": told["lora_rank"], "linear_alpha": told["lora_alpha"]}
    if kind in ("LOHA", "LOKR", "OFT_2"):
        settings["algo"] = {"LOHA": "loha", "LOKR": "lokr", "OFT_2": "diag-oft"}[kind]
    if kind == "LOKR":
        settings |= {"linear_dim": 10000 if told["lokr_full_matrix"] else told["lokr_dim"], "factor": told["lokr_decompose_factor"]}
        settings |= {"decompose_both": told["lokr_decompose_both"], "use_tucker": told["lokr_use_tucker"]}
    else:
        told.asked |= {"lokr_dora_on_output"}
    if kind != "OFT_2":
        told.asked |= {"oft_block_share", "oft_scaled", "oft_clipped_norm", "oft_cans", "dora_oft"}
    else:
        settings = {"algo": "diag-oft", "linear_dim": told["oft_block_size"]}
        found.note("peft_type OFT_2: OFT's sizes of blocks are chosen otherwise by LyCORIS; compare the number of parameters")
    if told["lora_decompose"] or (kind == "LOKR" and told["lokr_weight_decompose"]):
        settings["weight_decompose"] = True
    settings |= {"dropout": dropout} if dropout else {}
    if kind == "LORA" and reach is not None and not (told["lora_decompose"] and family not in UNETS):
        adapt(found, reach, told["lora_rank"], told["lora_alpha"], dropout, trains_text)
        if told["lora_decompose"] and config["lora_type"] == "standard":
            config["use_dora"] = True
    else:
        if kind not in ("LORA", "LOHA", "LOKR", "OFT_2"):
            told.problems.append(f"peft_type {kind!r} is not one of LORA, LOHA, LOKR, OFT_2")
        adapt_by_lycoris(found, pattern if pattern != "everything" else "(?s:.*)", settings)
    if trained and not config.get("train_text_encoder"):
        found.lose(f"{', '.join(trained)}.train true: only CLIP text encoders are trained, by a plain LoRA")
    if config.get("train_text_encoder"):
        if len(trained) < len(encoders_of(family)) and family in ("sdxl", "sd3"):
            found.note(f"{', '.join(trained)}: trained alone there; train_text_encoder trains all CLIP text encoders")
        for key in [key for key in config if key.startswith("text_encoder_") and key.endswith("_precision") and key != T5_OF.get(family)]:
            found.lose(f"{key} {config.pop(key)}: text encoders that are trained are not quantised")
    if told["lora_model_name"]:
        config["init_lora"] = told["lora_model_name"]


def pattern_of(written: str, is_regex: bool) -> str:
    """A pattern of layers' names: those that contain one of the texts, between which commas stand."""
    texts = [text.strip() for text in written.split(",") if text.strip()]
    return ".*(?:" + "|".join(text if is_regex else re.escape(text) for text in texts) + ")"


def length(told: Settings, found: Imported) -> None:
    """Epochs, batches, checkpoints, the average."""
    config = found.config
    config |= {
        "num_train_epochs": told.positive("epochs"),
        "train_batch_size": told.positive("batch_size"),
        "gradient_accumulation_steps": told.positive("gradient_accumulation_steps"),
        "max_grad_norm": told["clip_grad_norm"] if told.says("clip_grad_norm") or "clip_grad_norm" not in told.given else 0.0,
    }
    told.asked.add("clip_grad_norm")
    saves = "save_every" if told.says("save_every") else "save_after"
    for name in ("backup_after",) if told[f"{saves}_unit"] == "NEVER" or not told[saves] else (saves, "backup_after"):
        every = between(told, name, "checkpoint_step_interval", "checkpoint_epoch_interval")
        if every is not None:
            config |= every
            break
        if told.says(name):
            found.lose(by_the_clock(told, name, "checkpoint_step_interval"))
    config["checkpoints_total_limit"] = told["rolling_backup_count"] if told["rolling_backup"] else 0
    if told["ema"] != "OFF":
        config |= {"use_ema": True, "ema_decay": told["ema_decay"], "ema_update_interval": told["ema_update_step_interval"]}
        config |= {"ema_device": "cpu"} if told["ema"] == "CPU" else {}
        config |= {"ema_validation": "comparison"} if told["non_ema_sampling"] else {}
    if told["tensorboard"]:
        config["report_to"] = "tensorboard"
    found.note("there is no seed; here there always is one, 42, which also makes a resumed run the same as one that was not stopped")


def rate(told: Settings, parts: Mapping[str, Settings], main: Settings, epoch: int, found: Imported) -> None:
    config, base = found.config, told["learning_rate"]
    learning_rate = main["learning_rate"] or base
    scaler = told["learning_rate_scaler"]
    if scaler != "NONE":
        factor = (told.positive("batch_size") if not scaler.endswith("ACCUMULATION") else 1) * (
            1 if scaler.endswith("BATCH") else told.positive("gradient_accumulation_steps")
        )
        factor = math.sqrt(factor) if scaler in BY_ROOT else factor
        found.note(f"learning_rate_scaler {scaler}: rates are multiplied by {factor:g}")
        learning_rate, base = float(f"{learning_rate * factor:.12g}"), float(f"{base * factor:.12g}")
    config["learning_rate"] = learning_rate
    if config.get("train_text_encoder"):
        encoder = parts["text_encoder"]
        config["text_encoder_lr"] = encoder["learning_rate"] or base
        stop = 30.0 if encoder["stop_training_after"] is None else encoder["stop_training_after"]
        unit = encoder["stop_training_after_unit"] if encoder.says("stop_training_after_unit") else "EPOCH"
        if unit == "EPOCH" and 0 < stop < told["epochs"]:
            config["text_encoder_limit"] = round(100 * stop / told["epochs"], 3)
        elif unit not in ("EPOCH", "NEVER"):
            found.lose(f"text_encoder.stop_training_after {stop:g} {unit.lower()}s: set text_encoder_limit, a share of the run")
    said = told["learning_rate_scheduler"]
    if said not in SCHEDULES or said == "COSINE_WITH_RESTARTS":
        found.lose(
            f"learning_rate_scheduler {said}: {'its waves go up again there; here they begin anew' if said in SCHEDULES else 'it is constant now'}"
        )
    warmup = told["learning_rate_warmup_steps"]  # batches, or at most 1 a share of the run
    warmup = warmup // told.positive("gradient_accumulation_steps") if warmup > 1 else min(max(0.0, warmup), WHOLE_RUN)
    use_schedule(found, SCHEDULES.get(said, "constant"), warmup, epoch * told["epochs"], "learning_rate_warmup_steps")
    if said.startswith("COSINE_WITH"):
        config["lr_num_cycles"] = max(1, round(told["learning_rate_cycles"]))
    if told["learning_rate_min_factor"]:
        config["lr_end"] = float(f"{learning_rate * told['learning_rate_min_factor']:.12g}")
    optimizer(told, found)


def optimizer(told: Settings, found: Imported) -> None:
    """The optimizer and its numbers; a number that is not told is its own."""
    said = told["optimizer"]
    of = {"optimizer": said} if isinstance(said, str) else dict(said) if isinstance(said, Mapping) else {}
    if said is not None and not isinstance(said, (str, Mapping)):
        told.problems.append(f"optimizer {said} is neither a name nor a part with names of its own")
    name = str(of.pop("optimizer", "ADAMW"))
    if told.says("weight_decay"):
        of.setdefault("weight_decay", told["weight_decay"])
    of.pop("__version", None)
    betas = [of.pop(key, None) for key in ("beta1", "beta2")]
    defaults = OPTIMIZERS.get(name.lower(), ("", {}))[1].get("betas", ADAM["betas"])
    given = {key: value for key, value in of.items() if value not in (None, False, "") or key in ("decouple", "use_bias_correction")}
    if any(beta is not None for beta in betas) and name.lower() != "came":
        given["betas"] = [beta if beta is not None else usual for beta, usual in zip(betas, defaults)]
    is_adaptive = name.upper().startswith("PRODIGY")
    for key in ("decouple", "use_bias_correction"):
        if not is_adaptive:
            given.pop(key, None)
    known = {key: value for key, value in given.items() if key not in UNTOLD or value != UNTOLD[key]}
    use_optimizer(found, name, OPTIMIZERS, known, "optimizer")


UNTOLD: Mapping[str, Any] = {
    **dict.fromkeys(("weight_decay_by_lr", "factored", "use_stableadamw", "d_limiter", "use_schedulefree", "rms_rescaling", "adam_debias"), True),
    "orthogonal_gradient": "disabled",
    "centered_wd": 0.0,
    "centered_wd_mode": "full",
    "state_precision": "auto",
    "muon_adam_config": {},
    "prodigy_steps": 0,
}
"""What the config of every optimizer holds, whether it heeds it or not."""


def objective(told: Settings, main: Settings, found: Imported) -> None:
    """Noise levels, and how errors count."""
    config, family, drawn = found.config, found.config["model_family"], told["timestep_distribution"]
    if told["huber_strength"] and not told["mse_strength"]:
        config |= {"loss_type": "huber", "huber_schedule": "constant", "huber_c": min(1.0, told["huber_delta"])}
    elif told["huber_strength"]:
        found.lose(f"huber_strength {told['huber_strength']:g}: one loss at a time; it is l2")
    if told["offset_noise_weight"]:
        config |= {"offset_noise": True, "noise_offset": told["offset_noise_weight"], "noise_offset_probability": 1.0}
    if told["perturbation_noise_weight"]:
        found.lose(
            f"perturbation_noise_weight {told['perturbation_noise_weight']:g}: the target tells of it there; input_perturbation here is not in it"
        )
    if family in UNETS:
        config["disable_segmented_timestep_sampling"] = True
        velocity = told["force_v_prediction"] or (told["model_type"] in VELOCITY and not told["force_epsilon_prediction"])
        config["prediction_type"] = "v_prediction" if velocity else "epsilon"
        if told["rescale_noise_scheduler_to_zero_terminal_snr"]:
            config |= {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        if drawn != "UNIFORM":
            found.lose(f"timestep_distribution {drawn}: all noise levels alike on a U-Net; timestep_bias_strategy moves them")
    else:
        if drawn == "LOGIT_NORMAL":
            config["flow_sigmoid_scale"] = told["noising_weight"] + 1
        else:
            config["flow_use_uniform_schedule"] = True
            if drawn != "UNIFORM":
                found.lose(f"timestep_distribution {drawn}: it is uniform now")
        if drawn == "LOGIT_NORMAL" and told["noising_bias"]:
            found.lose(f"noising_bias {told['noising_bias']:g}: the middle of the noise levels is moved by flow_schedule_shift")
        config |= {"flow_schedule_auto_shift": True} if told["dynamic_timestep_shifting"] else {"flow_schedule_shift": told["timestep_shift"]}
        if family in ("flux", "flux2"):
            config["distilled_guidance"] = main["guidance_scale"]
    weigh, strength = told["loss_weight_fn"], told["loss_weight_strength"]
    if told["min_snr_gamma"] or weigh == "MIN_SNR_GAMMA":
        if family in UNETS:
            config["snr_gamma"] = told["min_snr_gamma"] or strength
        else:
            found.lose("loss_weight_fn MIN_SNR_GAMMA: all noise levels count alike in flow matching")
    elif weigh not in MODEL_WEIGHTS:
        found.lose(f"loss_weight_fn {weigh} {strength:g}: noise levels are weighed by snr_gamma or alike")
