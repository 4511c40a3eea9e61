"""The training scripts of kohya's sd-scripts: what each trains, and their flags with types and defaults, of 2025.

Facts from the argument parsers of the scripts and of their library. A key of `config_file` is a flag by the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from simpletuner.importers.hub import NO_TOKEN

Flags = Mapping[str, tuple[Any, Any]]


def _all(kind: Any, names: str, default: Any = None) -> dict[str, tuple[Any, Any]]:
    return dict.fromkeys(names.split(), (kind, default))


SUBSET: Flags = {
    **_all(str, "image_dir class_tokens metadata_file conditioning_data_dir caption_prefix caption_suffix keep_tokens_separator secondary_separator"),
    **_all(bool, "is_reg shuffle_caption enable_wildcard color_aug flip_aug random_crop cache_info alpha_mask", False),
    **_all(object, "face_crop_aug_range custom_attributes validation_split validation_seed resize_interpolation"),
    **_all(int, "keep_tokens caption_dropout_every_n_epochs", 0),
    **_all(float, "caption_dropout_rate caption_tag_dropout_rate token_warmup_step", 0.0),
    **_all(int, "num_repeats token_warmup_min", 1),
    "caption_extension": (str, ".caption"),
    "caption_separator": (str, ","),
}
DATASET: Flags = {
    **SUBSET,
    **_all(bool, "enable_bucket bucket_no_upscale skip_image_resolution", False),
    "resolution": (object, None),
    "batch_size": (int, 1),
    "min_bucket_reso": (int, 256),
    "max_bucket_reso": (int, 1024),
    "bucket_reso_steps": (int, 64),
    "network_multiplier": (float, 1.0),
    "subsets": (object, None),
}
"""Keys of a dataset_config, each of which may stand in [general], in a dataset, and most in a subset."""
RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "caption_extention": "caption_extension"}
"""Flags to the keys of a dataset_config that they are."""

EVERY: Flags = {
    **{name: row for name, row in DATASET.items() if name not in ("image_dir", "class_tokens", "is_reg", "subsets", "batch_size", "num_repeats")},
    **_all(str, "train_data_dir reg_data_dir in_json dataset_config dataset_class config_file caption_extention"),
    **_all(str, "pretrained_model_name_or_path tokenizer_cache_dir vae output_dir output_name save_precision resume save_model_as"),
    **_all(str, "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility"),
    **_all(str, "logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config wandb_api_key training_comment"),
    **_all(str, "sample_prompts lr_scheduler_type metadata_title metadata_author metadata_description metadata_license metadata_tags"),
    **_all(str, "console_log_level console_log_file dynamo_mode noise_offset_type"),
    **_all(bool, "v2 v_parameterization save_state_to_huggingface resume_from_huggingface async_upload save_state save_state_on_train_end"),
    **_all(bool, "mem_eff_attn torch_compile xformers sdpa persistent_data_loader_workers gradient_checkpointing full_fp16 full_bf16 fp8_base"),
    **_all(bool, "ddp_gradient_as_bucket_view ddp_static_graph log_config noise_offset_random_strength ip_noise_gamma_random_strength"),
    **_all(bool, "zero_terminal_snr lowram highvram sample_at_first output_config no_half_vae cache_latents cache_latents_to_disk skip_cache_check"),
    **_all(bool, "scale_v_pred_loss_like_noise_pred debiased_estimation_loss weighted_captions masked_loss use_8bit_adam use_lion_optimizer"),
    **_all(bool, "deepspeed no_metadata fused_backward_pass disable_mmap_load_safetensors console_log_simple debug_dataset initial_epoch_from_state"),
    **_all(bool, "cpu_offload_checkpointing unsloth_offload_checkpointing skip_until_initial_step offload_optimizer_device fp8_base_unet"),
    **_all(int, "save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state save_last_n_steps"),
    **_all(int, "save_last_n_steps_state max_token_length max_train_epochs seed ddp_timeout clip_skip multires_noise_iterations min_timestep"),
    **_all(int, "max_timestep sample_every_n_steps sample_every_n_epochs fused_optimizer_groups blocks_to_swap initial_epoch initial_step"),
    **_all(float, "noise_offset ip_noise_gamma adaptive_noise_scale min_snr_gamma v_pred_like_loss lr_scheduler_min_lr_ratio"),
    **_all((str,), "optimizer_args lr_scheduler_args"),
    **_all(int, "vae_batch_size train_batch_size gradient_accumulation_steps dataset_repeats", 1),
    **_all(float, "max_grad_norm prior_loss_weight huber_scale lr_scheduler_power", 1.0),
    "max_train_steps": (int, 1600),
    "max_data_loader_n_workers": (int, 8),
    "mixed_precision": (str, "no"),
    "dynamo_backend": (str, "inductor"),
    "multires_noise_discount": (float, 0.3),
    "loss_type": (str, "l2"),
    "huber_schedule": (str, "snr"),
    "huber_c": (float, 0.1),
    "sample_sampler": (str, "ddim"),
    "optimizer_type": (str, ""),
    "learning_rate": (float, 2e-6),
    "lr_scheduler": (str, "constant"),
    "lr_warmup_steps": (float, 0.0),
    "lr_decay_steps": (float, 0.0),
    "lr_scheduler_num_cycles": (int, 1),
    "lr_scheduler_timescale": (int, None),
    "zero_stage": (int, 2),
}
NETWORK: Flags = {
    **_all(str, "network_weights network_module"),
    **_all(bool, "network_train_unet_only network_train_text_encoder_only dim_from_weights no_token_padding"),
    **_all(float, "unet_lr network_dropout scale_weight_norms"),
    **_all((str,), "network_args base_weights"),
    **_all((float,), "base_weights_multiplier text_encoder_lr"),
    **_all(int, "validate_every_n_steps validate_every_n_epochs max_validation_steps"),
    "network_dim": (int, 4),
    "network_alpha": (float, 1.0),
}
"""Of the scripts that train an adapter."""
WHOLE: Flags = {
    **_all(str, "diffusers_xformers block_lr"),
    **_all(bool, "train_text_encoder no_train_text_encoder mem_eff_save cache_text_encoder_outputs cache_text_encoder_outputs_to_disk"),
    **_all(float, "learning_rate_te learning_rate_te1 learning_rate_te2"),
    "stop_text_encoder_training": (int, None),
}
"""Of those that train all weights."""
TEXT_CACHES = _all(bool, "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk")
FLOW: Flags = {
    **TEXT_CACHES,
    **_all(str, "clip_l t5xxl ae"),
    **_all(bool, "apply_t5_attn_mask split_mode blockwise_fused_optimizers"),
    **_all(int, "t5xxl_max_token_length text_encoder_batch_size"),
    "weighting_scheme": (str, "none"),
    "logit_mean": (float, 0.0),
    "logit_std": (float, 1.0),
    "mode_scale": (float, 1.29),
    "sigmoid_scale": (float, 1.0),
}
FLUX: Flags = {
    **FLOW,
    "guidance_scale": (float, 3.5),
    "timestep_sampling": (str, "sigma"),
    "model_prediction_type": (str, "sigma_scaled"),
    "discrete_flow_shift": (float, 3.0),
    "model_type": (str, "flux"),
    **_all(int, "double_blocks_to_swap single_blocks_to_swap"),
}
SD3: Flags = {
    **FLOW,
    **_all(str, "clip_g t5xxl_device t5xxl_dtype"),
    **_all(bool, "save_clip save_t5xxl apply_lg_attn_mask enable_scaled_pos_embed train_t5xxl use_t5xxl_cache_only"),
    **_all(float, "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate pos_emb_random_crop_rate", 0.0),
    "weighting_scheme": (str, "uniform"),
    "training_shift": (float, 1.0),
}
LUMINA: Flags = {
    **FLOW,
    **_all(str, "gemma2 system_prompt"),
    **_all(bool, "use_flash_attn use_sage_attn"),
    "gemma2_max_token_length": (int, 256),
    "timestep_sampling": (str, "shift"),
    "model_prediction_type": (str, "raw"),
    "discrete_flow_shift": (float, 6.0),
}


@dataclass(frozen=True, slots=True)
class Script:
    """A script that can be imported."""

    name: str
    family: str
    trains: Literal["full", "lora"]
    flags: Flags

    @property
    def is_flow(self) -> bool:
        return "weighting_scheme" in self.flags


SCRIPTS = {
    script.name: script
    for script in (
        Script("train_network.py", "sd1x", "lora", {**EVERY, **NETWORK}),
        Script("sdxl_train_network.py", "sdxl", "lora", {**EVERY, **NETWORK, **TEXT_CACHES}),
        Script("flux_train_network.py", "flux", "lora", {**EVERY, **NETWORK, **FLUX}),
        Script("sd3_train_network.py", "sd3", "lora", {**EVERY, **NETWORK, **SD3}),
        Script("lumina_train_network.py", "lumina2", "lora", {**EVERY, **NETWORK, **LUMINA}),
        Script("train_db.py", "sd1x", "full", {**EVERY, **WHOLE}),
        Script("fine_tune.py", "sd1x", "full", {**EVERY, **WHOLE}),
        Script("sdxl_train.py", "sdxl", "full", {**EVERY, **WHOLE}),
        Script("flux_train.py", "flux", "full", {**EVERY, **WHOLE, **FLUX}),
        Script("sd3_train.py", "sd3", "full", {**EVERY, **WHOLE, **SD3}),
        Script("lumina_train.py", "lumina2", "full", {**EVERY, **WHOLE, **LUMINA}),
    )
}

NO_EQUAL: Mapping[str, str] = {
    "flip_aug": "pictures are not mirrored; add mirrored copies to the dataset",
    "color_aug": "colours are not varied; add varied copies to the dataset",
    "face_crop_aug_range": "crops have one size; with crop and crop_style face they are laid around faces",
    "min_bucket_reso": "sides have no bounds of their own; minimum_aspect_ratio and maximum_aspect_ratio leave out extreme shapes",
    "max_bucket_reso": "sides have no bounds of their own; minimum_aspect_ratio and maximum_aspect_ratio leave out extreme shapes",
    "bucket_no_upscale": "small pictures are enlarged to their bucket; minimum_image_size leaves them out",
    "keep_tokens_separator": "the tags that stay in front are counted: caption_shuffle.position_start",
    "secondary_separator": "captions have one separator; replace the other by caption_filter_list",
    "caption_suffix": "captions have no common end; add it to the files",
    "caption_dropout_every_n_epochs": "captions are dropped at random: caption_dropout_probability",
    "token_warmup_min": "all tags are trained from the start",
    "token_warmup_step": "all tags are trained from the start",
    "metadata_file": "captions are read from .txt files; write those of the file into them",
    "in_json": "captions are read from .txt files; write those of the file into them",
    "conditioning_data_dir": "ControlNets are not trained",
    "alpha_mask": "transparency is laid on white; a dataset of masks says what counts (dataset_type conditioning)",
    "masked_loss": "a dataset of masks says what counts: dataset_type conditioning, conditioning_type mask",
    "network_multiplier": "all datasets train the adapter at strength 1",
    "weighted_captions": "brackets in captions are letters",
    "max_token_length": "the CLIP encoders read 77 tokens",
    "clip_skip": "the text encoder's last layer is read, as the model's pipeline does",
    "prior_loss_weight": "all datasets count alike; probability in the dataset's entry shows one more often",
    "multires_noise_iterations": "noise has one resolution; offset_noise is there",
    "adaptive_noise_scale": "noise_offset is the same for all pictures",
    "noise_offset_random_strength": "noise_offset is the same at each step",
    "ip_noise_gamma_random_strength": "input_perturbation is the same at each step",
    "debiased_estimation_loss": "noise levels are weighed by snr_gamma or alike",
    "scale_v_pred_loss_like_noise_pred": "noise levels are weighed by snr_gamma or alike",
    "v_pred_like_loss": "noise levels are weighed by snr_gamma or alike",
    "min_timestep": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "max_timestep": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "huber_scale": "a Huber loss is not multiplied",
    "lr_scheduler_type": "there are schedules by name alone: lr_scheduler",
    "lr_scheduler_args": "there are schedules by name alone: lr_scheduler",
    "lr_decay_steps": "schedules have no plateau before they fall",
    "block_lr": "all blocks learn at one rate",
    "scale_weight_norms": "the length of weights is not limited",
    "base_weights": "merge the file into the base first: simpletuner merge",
    "base_weights_multiplier": "merge the file into the base first: simpletuner merge",
    "dim_from_weights": "set lora_rank to the rank of that file",
    "network_train_text_encoder_only": "the denoiser is always trained",
    "resume": "states of sd-scripts cannot be continued here",
    "save_n_epoch_ratio": "how many epochs there are is not said; set checkpoint_epoch_interval",
    "full_fp16": "what is trained stays in float32, or bf16 with full training",
    "fused_backward_pass": "with model_type full there is optimizer_release_gradients",
    "blockwise_fused_optimizers": "with model_type full there is optimizer_release_gradients",
    "fused_optimizer_groups": "with model_type full there is optimizer_release_gradients",
    "deepspeed": "DeepSpeed is not used",
    "apply_t5_attn_mask": "the family reads its prompts as its pipeline does; flux_attention_masked_training hides padding of Flux",
    "apply_lg_attn_mask": "the family reads its prompts as its pipeline does",
    "t5_dropout_rate": "captions are dropped as a whole: caption_dropout_probability",
    "clip_l_dropout_rate": "captions are dropped as a whole: caption_dropout_probability",
    "clip_g_dropout_rate": "captions are dropped as a whole: caption_dropout_probability",
    "train_t5xxl": "a T5 stays frozen",
    "save_precision": "adapters are saved in float32",
    "huggingface_token": NO_TOKEN,
    "huggingface_path_in_repo": "files lie at the top of the repository",
    "save_state_to_huggingface": "what a run needs to go on is not uploaded",
    "resume_from_huggingface": "states of sd-scripts cannot be continued here",
    "wandb_api_key": "log in by wandb login, or set WANDB_API_KEY",
    "log_tracker_config": "trackers have no further settings",
    "sample_sampler": "pictures are made by the model's own scheduler",
    "clip_l": "it is taken from the base model",
    "clip_g": "it is taken from the base model",
    "system_prompt": "the family's own instruction stands before each caption",
    "stop_text_encoder_training": "text encoders are trained by LoRA alone",
    "train_text_encoder": "text encoders are trained by LoRA alone",
    **dict.fromkeys(("learning_rate_te", "learning_rate_te1", "learning_rate_te2"), "text encoders are trained by LoRA alone"),
    "validation_split": "held-out pictures are a dataset of dataset_type eval",
    "validation_seed": "held-out pictures are a dataset of dataset_type eval",
    "max_validation_steps": "num_eval_images says how many held-out pictures are looked at",
    "no_token_padding": "captions are padded, as the family's pipeline does",
    "t5xxl_dtype": "frozen parts are held in mixed_precision; text_encoder_2_precision or text_encoder_3_precision quantises a T5",
    "resize_interpolation": "pictures are resized by Lanczos",
    "unsloth_offload_checkpointing": "gradient_checkpointing_backend offload is there",
}
"""Flags to what to do instead, or why nothing."""
SILENT = frozenset(
    _all(
        object,
        "cache_info debug_dataset dataset_class tokenizer_cache_dir xformers sdpa mem_eff_attn persistent_data_loader_workers "
        "max_data_loader_n_workers cache_latents cache_latents_to_disk skip_cache_check cache_text_encoder_outputs "
        "cache_text_encoder_outputs_to_disk lowram highvram save_state save_state_on_train_end output_config log_config no_metadata "
        "disable_mmap_load_safetensors console_log_level console_log_file console_log_simple ddp_timeout ddp_gradient_as_bucket_view "
        "ddp_static_graph metadata_title metadata_author metadata_description metadata_license metadata_tags log_prefix "
        "save_last_n_epochs_state save_last_n_steps_state mem_eff_save diffusers_xformers dynamo_mode t5xxl_device "
        "save_clip save_t5xxl multires_noise_discount save_model_as subsets logit_mean no_train_text_encoder",
    )
)
"""Flags that ask for what is always so here, that belong to another flag, or that concern nothing but how their program works."""
