"""The training scripts of diffusers: what each trains, and its flags with their types and defaults, of 2025.

Facts from the scripts in examples/text_to_image and examples/dreambooth of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Flags = Mapping[str, tuple[Any, Any]]
"""Name to type and default; bool is a switch, a tuple of a type a list."""

EVERY: Flags = {
    "pretrained_model_name_or_path": (str, None),
    "revision": (str, None),
    "variant": (str, None),
    "output_dir": (str, "sd-model-finetuned"),
    "seed": (int, None),
    "resolution": (int, 512),
    "center_crop": (bool, False),
    "train_batch_size": (int, 16),
    "num_train_epochs": (int, 100),
    "max_train_steps": (int, None),
    "gradient_accumulation_steps": (int, 1),
    "gradient_checkpointing": (bool, False),
    "learning_rate": (float, 1e-4),
    "scale_lr": (bool, False),
    "lr_scheduler": (str, "constant"),
    "lr_warmup_steps": (int, 500),
    "use_8bit_adam": (bool, False),
    "adam_beta1": (float, 0.9),
    "adam_beta2": (float, 0.999),
    "adam_weight_decay": (float, 1e-2),
    "adam_epsilon": (float, 1e-8),
    "max_grad_norm": (float, 1.0),
    "allow_tf32": (bool, False),
    "dataloader_num_workers": (int, 0),
    "mixed_precision": (str, None),
    "local_rank": (int, -1),
    "enable_xformers_memory_efficient_attention": (bool, False),
    "checkpointing_steps": (int, 500),
    "checkpoints_total_limit": (int, None),
    "resume_from_checkpoint": (str, None),
    "report_to": (str, "tensorboard"),
    "logging_dir": (str, "logs"),
    "push_to_hub": (bool, False),
    "hub_token": (str, None),
    "hub_model_id": (str, None),
}
TABLES: Flags = {
    "dataset_name": (str, None),
    "dataset_config_name": (str, None),
    "train_data_dir": (str, None),
    "image_column": (str, "image"),
    "caption_column": (str, "text"),
    "max_train_samples": (int, None),
    "cache_dir": (str, None),
    "random_flip": (bool, False),
    "image_interpolation_mode": (str, "lanczos"),
    "prediction_type": (str, None),
    "snr_gamma": (float, None),
    "noise_offset": (float, 0.0),
}
"""Of the text-to-image scripts."""
ONE_PROMPT: Flags = {"validation_prompt": (str, None), "num_validation_images": (int, 4), "validation_epochs": (int, 1)}
LORA: Flags = {"rank": (int, 4)}
FULL_SD: Flags = {
    "non_ema_revision": (str, None),
    "input_perturbation": (float, 0.0),
    "dream_training": (bool, False),
    "dream_detail_preservation": (float, 1.0),
    "use_ema": (bool, False),
    "offload_ema": (bool, False),
    "foreach_ema": (bool, False),
    "validation_prompts": ((str,), None),
    "validation_epochs": (int, 5),
    "tracker_project_name": (str, "text2image-fine-tune"),
}
FULL_SDXL: Flags = {
    **ONE_PROMPT,
    "pretrained_vae_model_name_or_path": (str, None),
    "proportion_empty_prompts": (float, 0.0),
    "use_ema": (bool, False),
    "timestep_bias_strategy": (str, "none"),
    "timestep_bias_multiplier": (float, 1.0),
    "timestep_bias_begin": (int, 0),
    "timestep_bias_end": (int, 1000),
    "timestep_bias_portion": (float, 0.25),
    "enable_npu_flash_attention": (bool, False),
    "output_dir": (str, "sdxl-model-finetuned"),
    "resolution": (int, 1024),
}
LORA_SDXL: Flags = {
    **ONE_PROMPT,
    **LORA,
    "pretrained_vae_model_name_or_path": (str, None),
    "train_text_encoder": (bool, False),
    "enable_npu_flash_attention": (bool, False),
    "debug_loss": (bool, False),
    "output_dir": (str, "sd-model-finetuned-lora"),
    "resolution": (int, 1024),
}
SUBJECT: Flags = {
    "instance_data_dir": (str, None),
    "instance_prompt": (str, None),
    "class_data_dir": (str, None),
    "class_prompt": (str, None),
    "with_prior_preservation": (bool, False),
    "prior_loss_weight": (float, 1.0),
    "num_class_images": (int, 100),
    "sample_batch_size": (int, 4),
    "prior_generation_precision": (str, None),
    "train_text_encoder": (bool, False),
    "lr_num_cycles": (int, 1),
    "lr_power": (float, 1.0),
    "validation_prompt": (str, None),
    "num_validation_images": (int, 4),
    "train_batch_size": (int, 4),
    "num_train_epochs": (int, 1),
}
"""Of the DreamBooth scripts."""
SUBJECT_SD: Flags = {
    "tokenizer_name": (str, None),
    "pre_compute_text_embeddings": (bool, False),
    "tokenizer_max_length": (int, None),
    "text_encoder_use_attention_mask": (bool, False),
    "validation_images": ((str,), None),
    "class_labels_conditioning": (str, None),
}
SUBJECT_FULL: Flags = {
    "validation_steps": (int, 100),
    "set_grads_to_none": (bool, False),
    "offset_noise": (bool, False),
    "snr_gamma": (float, None),
    "skip_save_text_encoder": (bool, False),
    "validation_scheduler": (str, "DPMSolverMultistepScheduler"),
    "output_dir": (str, "text-inversion-model"),
    "learning_rate": (float, 5e-6),
}
SUBJECT_LORA: Flags = {
    "validation_epochs": (int, 50),
    "output_dir": (str, "lora-dreambooth-model"),
    "learning_rate": (float, 5e-4),
    **LORA,
}
SUBJECT_SDXL: Flags = {
    "pretrained_vae_model_name_or_path": (str, None),
    "crops_coords_top_left_h": (int, 0),
    "crops_coords_top_left_w": (int, 0),
    "resolution": (int, 1024),
}
SUBJECT_FLOW: Flags = {
    **SUBJECT,
    "dataset_name": (str, None),
    "dataset_config_name": (str, None),
    "image_column": (str, "image"),
    "caption_column": (str, None),
    "cache_dir": (str, None),
    "repeats": (int, 1),
    "random_flip": (bool, False),
    "max_sequence_length": (int, 77),
    "validation_epochs": (int, 50),
    "text_encoder_lr": (float, 5e-6),
    "weighting_scheme": (str, "logit_normal"),
    "logit_mean": (float, 0.0),
    "logit_std": (float, 1.0),
    "mode_scale": (float, 1.29),
    "optimizer": (str, "AdamW"),
    "prodigy_beta3": (float, None),
    "prodigy_decouple": (str, "True"),
    "prodigy_use_bias_correction": (str, "True"),
    "prodigy_safeguard_warmup": (str, "True"),
    "adam_weight_decay": (float, 1e-4),
    "adam_weight_decay_text_encoder": (float, 1e-3),
    "upcast_before_saving": (bool, False),
}
"""Of the DreamBooth scripts for models that learn by flow matching."""
FLOW_LORA: Flags = {
    **LORA,
    "lora_layers": (str, None),
    "lora_alpha": (int, None),
    "lora_dropout": (float, 0.0),
    "cache_latents": (bool, False),
    "output_dir": (str, "flux-dreambooth-lora"),
}
FLUX: Flags = {**SUBJECT_FLOW, "max_sequence_length": (int, 512), "guidance_scale": (float, 3.5), "weighting_scheme": (str, "none")}
SD3: Flags = {**SUBJECT_FLOW, "precondition_outputs": (int, 1)}


@dataclass(frozen=True, slots=True)
class Script:
    """A script that can be imported."""

    name: str
    is_sdxl: bool
    trains: Literal["full", "lora"]
    flags: Flags
    validation_steps: int
    """Sampling steps of its validation pictures."""
    clips: bool = True
    """Whether its max_grad_norm has an effect."""
    flow_family: str | None = None
    """The family here, of models that learn by flow matching."""

    @property
    def is_dreambooth(self) -> bool:
        return "instance_data_dir" in self.flags


SCRIPTS = {
    script.name: script
    for script in (
        Script("train_text_to_image.py", False, "full", {**EVERY, **TABLES, **FULL_SD}, 20),
        Script(
            "train_text_to_image_lora.py",
            False,
            "lora",
            {**EVERY, **TABLES, **ONE_PROMPT, **LORA, "output_dir": (str, "sd-model-finetuned-lora")},
            30,
            False,
        ),
        Script("train_text_to_image_sdxl.py", True, "full", {**EVERY, **TABLES, **FULL_SDXL}, 25),
        Script("train_text_to_image_lora_sdxl.py", True, "lora", {**EVERY, **TABLES, **LORA_SDXL}, 30),
        Script("train_dreambooth.py", False, "full", {**EVERY, **SUBJECT, **SUBJECT_SD, **SUBJECT_FULL}, 25),
        Script("train_dreambooth_lora.py", False, "lora", {**EVERY, **SUBJECT, **SUBJECT_SD, **SUBJECT_LORA}, 25),
        Script("train_dreambooth_lora_sdxl.py", True, "lora", {**EVERY, **SUBJECT, **SUBJECT_LORA, **SUBJECT_SDXL}, 25),
        Script("train_dreambooth_flux.py", False, "full", {**EVERY, **FLUX, "output_dir": (str, "flux-dreambooth")}, 28, flow_family="flux"),
        Script("train_dreambooth_lora_flux.py", False, "lora", {**EVERY, **FLUX, **FLOW_LORA}, 28, flow_family="flux"),
        Script("train_dreambooth_sd3.py", False, "full", {**EVERY, **SD3, "output_dir": (str, "sd3-dreambooth")}, 28, flow_family="sd3"),
        Script(
            "train_dreambooth_lora_sd3.py",
            False,
            "lora",
            {**EVERY, **SD3, **FLOW_LORA, "lora_blocks": (str, None), "output_dir": (str, "sd3-dreambooth-lora")},
            28,
            flow_family="sd3",
        ),
    )
}
