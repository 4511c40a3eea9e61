"""What kohya's sd-scripts train: `network_module` with its arguments as an adapter, or all weights; and how they draw and weigh noise."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.importers.importer import Imported
from simpletuner.importers.kohya_flags import Script
from simpletuner.importers.layers import UNETS, WITH_TRAINED_TEXT, Reach, adapt, adapt_by_lycoris
from simpletuner.importers.settings import Settings

PLAIN = ("networks.lora", "networks.lora_fa", "networks.dylora", "networks.lora_flux", "networks.lora_sd3", "networks.lora_lumina")
LYCORIS = ("lycoris.kohya", "lycoris.locon_kohya")
OF_PLAIN = ("conv_dim", "conv_alpha", "dropout")
ALGORITHMS = {
    **{name: name for name in ("lokr", "loha", "lora", "ia3", "dylora", "full", "glora", "diag-oft", "boft", "tlora")},
    "locon": "lora",
}
NUMBERS = {
    **dict.fromkeys(("conv_dim", "factor", "block_size"), int),
    **dict.fromkeys(("conv_alpha", "dropout", "rank_dropout", "module_dropout", "constraint"), float),
    **dict.fromkeys(("use_tucker", "use_cp", "decompose_both", "full_matrix", "dora_wd", "rescaled", "bypass_mode", "rs_lora"), bool),
}
"""Arguments of LyCORIS that mean the same in lycoris_config.json."""
FULL_RANK = 10000
PRESETS: Mapping[str, Reach] = {
    "full": "convolutions",
    "full-lin": "blocks",
    "attn-mlp": "transformers",
    "unet-transformer-only": "transformers",
    "attn-only": "attention",
}
SCHEMES = ("none", "uniform", "logit_normal")
SCHEMES_LOST = ("sigma_sqrt", "mode", "cosmap")


def arguments(words: Sequence[str] | None) -> dict[str, Any]:
    """Read `key=value` words, values as Python writes them, else as text."""
    found: dict[str, Any] = {}
    for word in words or []:
        key, _, value = word.partition("=")
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[key.strip()] = {"true": True, "false": False, "none": None}.get(value.strip().lower(), value.strip())
    return found


def use_network(script: Script, flags: Settings, found: Imported) -> None:
    """The adapter, or all weights, and with which rates."""
    rate = flags["learning_rate"]
    if script.trains == "full":
        found.config |= {"model_type": "full", "learning_rate": rate}
        if flags["full_bf16"]:
            found.lose("full_bf16: bf16 weights lose small updates unless the optimizer rounds by chance: optimizer adamw_bf16 trains them so")
        if script.name == "train_db.py" and not flags["no_train_text_encoder"]:
            found.lose("text encoder: train_db.py trains it too; here text encoders are trained by LoRA alone")
        return
    module, told = flags["network_module"], arguments(flags["network_args"])
    text_rate = text_learning_rate(script, flags, found)
    found.config["learning_rate"] = flags["unet_lr"] or rate
    if flags["full_bf16"]:
        found.lose("full_bf16: adapters are trained in float32")
    if module in LYCORIS:
        lycoris(flags, told, found)
    else:
        if module not in PLAIN:
            flags.problems.append(f"network_module {module!r} is not one of {', '.join((*PLAIN, *LYCORIS))}")
        elif module in ("networks.lora_fa", "networks.dylora"):
            found.lose(f"network_module {module}: it is a plain LoRA now")
        plain(flags, told, text_rate, found)
    if flags["network_weights"]:
        found.config["init_lora"] = flags["network_weights"]
    if found.config.get("train_text_encoder"):
        found.config["text_encoder_lr"] = text_rate


def text_learning_rate(script: Script, flags: Settings, found: Imported) -> float:
    """The rate of the text encoders, 0 if they stay frozen; a cache of what they say leaves nothing to train."""
    rates = flags["text_encoder_lr"]
    rate = float(rates[0] if rates else flags["learning_rate"])
    if rates and len(set(rates)) > 1:
        found.lose(f"text_encoder_lr {', '.join(f'{each:g}' for each in rates)}: one for all text encoders here, {rate:g}")
    cached = script.family in UNETS and "cache_text_encoder_outputs" in script.flags and flags["cache_text_encoder_outputs"]
    if flags["network_train_unet_only"] or cached or script.family not in WITH_TRAINED_TEXT:
        return 0.0
    return rate


def plain(flags: Settings, told: Mapping[str, Any], text_rate: float, found: Imported) -> None:
    """A LoRA of sd-scripts itself: in U-Nets on the transformers, on convolutions too where they have a rank."""
    rank, alpha, conv = flags["network_dim"], flags["network_alpha"], told.get("conv_dim")
    is_unet = found.config["model_family"] in UNETS
    reach: Reach = "convolutions" if conv and is_unet else "transformers"
    adapt(found, reach, rank, alpha, flags["network_dropout"] or told.get("dropout") or 0.0, text_rate > 0)
    if conv and is_unet and (conv, told.get("conv_alpha", 1.0)) != (rank, alpha):
        found.lose(
            f"network_args conv_dim={conv} conv_alpha={told.get('conv_alpha', 1.0):g}: convolutions have the rank and alpha of the other layers, "
            f"{rank} and {alpha:g}"
        )
    for key, value in told.items():
        if key not in OF_PLAIN and value not in (None, False):
            found.lose(f"network_args {key}={value}: all layers have one rank, one rate, and no such setting")


def lycoris(flags: Settings, told: Mapping[str, Any], found: Imported) -> None:
    """An adapter of the LyCORIS library, which is the same library here."""
    algo = str(told.get("algo", "lora")).lower()
    settings: dict[str, Any] = {"algo": ALGORITHMS.get(algo, "lora")}
    if algo not in ALGORITHMS:
        found.lose(f"network_args algo={algo}: there is no such algorithm; it is lora now")
    rank = flags["network_dim"]
    if algo not in ("full", "ia3"):
        whole = algo == "lokr" and (rank >= FULL_RANK or told.get("full_matrix"))
        settings |= {"linear_dim": FULL_RANK if algo == "lokr" and rank >= FULL_RANK else rank, "linear_alpha": flags["network_alpha"]}
        settings |= {"linear_alpha": float(settings["linear_dim"])} if whole else {}
    if algo == "lokr":
        settings["factor"] = -1
    if flags["network_dropout"]:
        settings["dropout"] = flags["network_dropout"]
    for key, value in told.items():
        if key in NUMBERS and value is not None:
            try:
                settings[key] = NUMBERS[key](value)
            except (TypeError, ValueError):
                flags.problems.append(f"network_args {key}={value} is no number")
        elif key not in ("algo", "preset") and value not in (None, False):
            found.lose(f"network_args {key}={value}: there is no such setting")
    settings = {
        key: value for key, value in settings.items() if value is not False and (value or key not in ("dropout", "rank_dropout", "module_dropout"))
    }
    preset = str(told.get("preset", "full"))
    if preset not in PRESETS:
        found.lose(f"network_args preset={preset}: it is full now; write its targets into lycoris_config.json")
    adapt_by_lycoris(found, PRESETS.get(preset, "convolutions"), settings)
    if not flags["network_train_unet_only"] and found.config["model_family"] in WITH_TRAINED_TEXT and preset != "unet-transformer-only":
        found.lose("text encoders: they are trained too there; LyCORIS adapts the denoiser alone here")


def use_objective(script: Script, flags: Settings, found: Imported) -> None:
    """Noise levels, targets and how errors count."""
    config = found.config
    kind = flags["loss_type"]
    if kind in ("huber", "smooth_l1"):
        config |= {"loss_type": kind, "huber_schedule": flags["huber_schedule"], "huber_c": flags["huber_c"]}
    elif kind != "l2":
        found.lose(f"loss_type {kind}: there are l2, huber and smooth_l1; it is l2 now")
    if flags["noise_offset"]:
        config |= {"offset_noise": True, "noise_offset": flags["noise_offset"], "noise_offset_probability": 1.0}
    if flags["ip_noise_gamma"]:
        config["input_perturbation"] = flags["ip_noise_gamma"]
    if script.is_flow:
        flow(script, flags, found)
        return
    config["disable_segmented_timestep_sampling"] = True  # all steps alike, drawn independently
    config["prediction_type"] = "v_prediction" if flags["v_parameterization"] else "epsilon"
    if flags["zero_terminal_snr"]:
        config["rescale_betas_zero_snr"] = True
        if not flags["v_parameterization"]:
            flags.problems.append("zero_terminal_snr needs v_parameterization: a picture cannot be found in pure noise by predicting the noise")
    if flags["min_snr_gamma"]:
        config["snr_gamma"] = flags["min_snr_gamma"]


def flow(script: Script, flags: Settings, found: Imported) -> None:
    """Which noise levels a model is trained at that learns by flow matching."""
    config = found.config
    scheme = flags["weighting_scheme"]
    sampling = flags["timestep_sampling"] if "timestep_sampling" in script.flags else "sigma"
    shift = flags["training_shift"] if script.family == "sd3" else flags["discrete_flow_shift"]
    if sampling in ("flux_shift", "nextdit_shift"):
        config |= {"flow_schedule_auto_shift": True, "flow_sigmoid_scale": flags["sigmoid_scale"]}
    elif sampling in ("sigmoid", "shift"):
        config |= {"flow_sigmoid_scale": flags["sigmoid_scale"], "flow_schedule_shift": shift if sampling == "shift" else 1.0}
    elif sampling == "uniform":
        config |= {"flow_use_uniform_schedule": True, "flow_schedule_shift": 1.0}
    elif sampling == "sigma" and scheme == "logit_normal":
        config |= {"flow_sigmoid_scale": flags["logit_std"], "flow_schedule_shift": shift}
        if flags["logit_mean"]:
            found.lose(f"logit_mean {flags['logit_mean']:g}: the middle of the noise levels is moved by flow_schedule_shift")
    elif sampling == "sigma":
        config |= {"flow_use_uniform_schedule": True, "flow_schedule_shift": shift}
    else:
        flags.problems.append(f"timestep_sampling {sampling!r} is not one of sigma, uniform, sigmoid, shift, flux_shift, nextdit_shift")
    if scheme not in (*SCHEMES, *SCHEMES_LOST):
        flags.problems.append(f"weighting_scheme {scheme!r} is not one of {', '.join((*SCHEMES, *SCHEMES_LOST))}")
    if scheme in SCHEMES_LOST:
        found.lose(f"weighting_scheme {scheme}: noise levels are drawn as above and count alike")
    prediction = flags["model_prediction_type"] if "model_prediction_type" in script.flags else "sigma_scaled"
    if prediction == "sigma_scaled":
        found.note("model_prediction_type sigma_scaled: an error counts by the square of its noise level there, and alike at all levels here")
    elif prediction != "raw":
        found.lose(f"model_prediction_type {prediction}: the model answers the velocity, as raw does")
    if "guidance_scale" in script.flags and script.family == "flux":
        config["distilled_guidance"] = flags["guidance_scale"]
    tokens = next((name for name in ("t5xxl_max_token_length", "gemma2_max_token_length") if name in script.flags and flags.says(name)), None)
    if tokens:
        config["tokenizer_max_length"] = flags[tokens]
