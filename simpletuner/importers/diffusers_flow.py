"""What diffusers' DreamBooth scripts for Flux.1 and Stable Diffusion 3 do otherwise than those for U-Nets: noise levels, targets, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.importers.command_line import TRUTHS
from simpletuner.importers.diffusers_scripts import Script
from simpletuner.importers.importer import Imported

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
TARGETS = {"flux": (*(f"attn.{name}" for name in ATTENTION), *FEED_FORWARD), "sd3": tuple(f"attn.{name}" for name in ATTENTION)}
"""What their LoRA adapts where `lora_layers` does not say it."""
SHIFT = {"flux": 1.0, "sd3": 3.0}
"""Of the noise levels that are trained: the script for Flux trains the schedule of dev, which is shifted for pictures alone."""
GUIDANCE = {"flux": 3.5, "sd3": 7.0}
"""Of their validation pictures: the pipelines' own."""
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")
USUAL_ALPHA = 4
"""lora_alpha of the scripts that have such a flag, whatever the rank."""
PRODIGY_TRUTHS = ("decouple", "use_bias_correction", "safeguard_warmup")
"""Of prodigy: each a flag, with True or False behind it."""


def flow_model(script: Script, flags: Mapping[str, Any], found: Imported) -> None:
    """Targets and scale of the LoRA, and how much text is read."""
    family = str(script.flow_family)
    found.config["tokenizer_max_length"] = flags["max_sequence_length"]
    if script.trains == "full":
        return
    layers = [layer.strip() for layer in (flags["lora_layers"] or "").split(",") if layer.strip()]
    layers = layers or list(TARGETS[family])
    blocks = [block.strip() for block in (flags.get("lora_blocks") or "").split(",") if block.strip()]
    found.config["peft_lora_target_modules"] = [f"transformer_blocks.{block}.{layer}" for block in blocks for layer in layers] or layers
    if flags["train_text_encoder"]:
        found.config["text_encoder_lr"] = flags["text_encoder_lr"]
    found.config |= {key: flags[key] for key in ("lora_alpha", "lora_dropout") if flags[key]}
    if flags["lora_alpha"] is None and flags["rank"] != USUAL_ALPHA:
        found.notes.append(f"the LoRA is scaled by 1, as by older releases of the script; those with --lora_alpha scale it by {USUAL_ALPHA} / rank")


def flow_objective(script: Script, flags: Mapping[str, Any], found: Imported) -> None:
    """Which noise levels are trained, and how errors count."""
    config, scheme = found.config, flags["weighting_scheme"]
    config["flow_schedule_shift"] = SHIFT[str(script.flow_family)]
    if scheme == "logit_normal":
        config["flow_sigmoid_scale"] = flags["logit_std"]
        if flags["logit_mean"]:
            found.lost.append(f"--logit_mean {flags['logit_mean']:g}: the middle of the noise levels is moved by flow_schedule_shift")
    else:
        config["flow_use_uniform_schedule"] = True
    if scheme not in ("none", "logit_normal"):
        scale = f", mode_scale {flags['mode_scale']:g}" if scheme == "mode" else ""
        found.lost.append(f"--weighting_scheme {scheme}{scale}: all noise levels are trained and count alike")
    if flags.get("precondition_outputs"):
        found.notes.append("an error counts by the square of its noise level there (precondition_outputs), and alike at all levels here")
    if "guidance_scale" in flags:
        config["distilled_guidance"] = flags["guidance_scale"]


def flow_optimizer(flags: Mapping[str, Any], found: Imported) -> None:
    """Prodigy, where it is asked for."""
    if str(flags["optimizer"]).lower() != "prodigy":
        return
    found.config["optimizer"] = "prodigy"
    for name in PRODIGY_TRUTHS:
        found.config["optimizer_config"][name] = TRUTHS[flags[f"prodigy_{name}"].lower()]
    if flags["prodigy_beta3"] is not None:
        found.config["optimizer_config"]["beta3"] = flags["prodigy_beta3"]
    if flags["use_8bit_adam"]:
        found.lost.append("--use_8bit_adam: with prodigy it has no effect there either")


def flow_looks(script: Script, found: Imported) -> None:
    """Guidance and size of validation pictures, which the scripts leave to the pipelines."""
    if "validation_num_inference_steps" in found.config:
        found.config |= {"validation_guidance": GUIDANCE[str(script.flow_family)], "validation_resolution": "1024"}
