"""The keys of ostris' ai-toolkit, with types and defaults, of 2025; and what becomes of those that have no equal.

Facts from its config classes and its example configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, tuple[Any, Any]]


def _all(kind: Any, names: str, default: Any = None) -> dict[str, tuple[Any, Any]]:
    return dict.fromkeys(names.split(), (kind, default))


JOB: Keys = {"job": (str, "extension"), "config": (dict, None), "meta": (object, None)}
CONFIG: Keys = {"name": (str, "imported"), "process": (object, None)}
PROCESS: Keys = {
    **_all(str, "training_folder trigger_word device sqlite_db_path log_dir"),
    **_all(dict, "network save train model sample logging"),
    **_all(object, "datasets adapter embedding decorator slider guidance first_sample ema extra"),
    **_all(int, "performance_log_every training_seed"),
    "type": (str, "sd_trainer"),
}
NETWORK: Keys = {
    "type": (str, "lora"),
    **_all(int, "rank linear conv"),
    **_all(float, "linear_alpha conv_alpha dropout"),
    "alpha": (float, 1.0),
    "transformer_only": (bool, True),
    "lokr_full_rank": (bool, False),
    "lokr_factor": (int, -1),
    "network_kwargs": (dict, None),
    "lorm": (object, None),
    **_all(bool, "normalize old_lokr_format"),
    "split_multistage_loras": (bool, True),
    "pretrained_lora_path": (str, None),
}
SAVE: Keys = {
    "save_every": (int, 1000),
    "max_step_saves_to_keep": (int, 5),
    "dtype": (str, "float16"),
    "save_format": (str, "safetensors"),
    **_all(bool, "push_to_hub hf_private"),
    "hf_repo_id": (str, None),
}
LOGGING: Keys = {
    "log_every": (int, 100),
    **_all(bool, "verbose use_wandb use_ui_logger"),
    "project_name": (str, "ai-toolkit"),
    "run_name": (str, None),
}
DATASET: Keys = {
    **_all(str, "folder_path dataset_path default_caption trigger_word caption_type poi mask_path unconditional_path clip_image_path"),
    **_all(object, "random_triggers augments augmentations replacements extra_values controls control_path inpaint_path clip_image_augmentations"),
    **_all(object, "control_path_1 control_path_2 control_path_3 control_transparent_color"),
    **_all(bool, "random_scale random_crop is_reg shuffle_tokens flip_x flip_y alpha_mask invert_mask use_short_captions cache_latents"),
    **_all(bool, "cache_latents_to_disk cache_clip_vision_to_disk cache_text_embeddings standardize_images shuffle_augmentations square_crop"),
    **_all(bool, "clip_image_from_same_folder clip_image_shuffle_augmentations debug fast_image_size do_audio"),
    **_all(bool, "buckets full_size_control_images replay_transforms shrink_video_to_frames do_i2v auto_frame_count", True),
    **_all(float, "scale network_weight loss_multiplier", 1.0),
    **_all(float, "token_dropout_rate caption_dropout_rate mask_min_value", 0.0),
    **_all(int, "num_repeats num_frames random_triggers_max", 1),
    "caption_ext": (str, ".txt"),
    "resolution": (object, 512),
    "bucket_tolerance": (int, 64),
    "keep_tokens": (int, 0),
    "type": (str, "image"),
    "guidance_type": (str, "targeted"),
    **_all(int, "num_workers prefetch_factor", 2),
    "fps": (int, 16),
}
TRAIN: Keys = {
    "noise_scheduler": (str, "ddpm"),
    "content_or_style": (str, "balanced"),
    "content_or_style_reg": (str, "balanced"),
    "steps": (int, 1000),
    "lr": (float, 1e-6),
    **_all(float, "unet_lr text_encoder_lr refiner_lr embedding_lr adapter_lr min_snr_gamma snr_gamma cfg_rescale target_norm_std"),
    "optimizer": (str, "adamw"),
    "optimizer_params": (dict, None),
    "lr_scheduler": (str, "constant"),
    "lr_scheduler_params": (dict, None),
    "min_denoising_steps": (int, 0),
    "max_denoising_steps": (int, 999),
    **_all(int, "batch_size gradient_accumulation gradient_accumulation_steps optimal_noise_pairing_samples max_negative_prompts", 1),
    **_all(int, "switch_boundary_every", 1),
    "num_train_timesteps": (int, 1000),
    "dtype": (str, "fp32"),
    "train_unet": (bool, True),
    "gradient_checkpointing": (bool, True),
    "max_grad_norm": (float, 1.0),
    "noise_offset": (float, 0.0),
    "loss_type": (str, "mse"),
    "loss_target": (str, "noise"),
    "timestep_type": (str, "sigmoid"),
    "ema_config": (dict, None),
    "next_sample_timesteps": (int, 8),
    **_all(bool, "train_text_encoder train_turbo show_turbo_outputs learnable_snr_gos skip_first_sample force_first_sample merge_network_on_save"),
    **_all(bool, "xformers sdp free_u adaptive_scaling_factor match_noise_norm short_and_long_captions short_and_long_captions_encoder_split"),
    **_all(bool, "single_item_batching match_adapter_assist inverted_mask_prior diff_output_preservation standardize_images standardize_latents"),
    **_all(bool, "dynamic_noise_offset do_cfg do_random_cfg correct_pred_norm do_prior_divergence linear_timesteps linear_timesteps2"),
    **_all(bool, "disable_sampling unload_text_encoder cache_text_embeddings do_paramiter_swapping bypass_guidance_embedding"),
    **_all(bool, "force_consistent_noise blended_blur_noise do_guidance_loss blank_prompt_preservation do_differential_guidance"),
    "train_refiner": (bool, True),
    **_all(float, "weight_jitter random_noise_multiplier random_noise_shift prompt_dropout_prob match_adapter_chance prompt_saturation_chance", 0.0),
    **_all(float, "noise_multiplier target_noise_multiplier img_multiplier noisy_latent_multiplier latent_multiplier reg_weight cfg_scale", 1.0),
    **_all(float, "max_cfg_scale correct_pred_norm_multiplier pred_scaler target_norm_std_value diff_output_preservation_multiplier", 1.0),
    **_all(float, "latent_feature_loss_weight diffusion_feature_extractor_weight blank_prompt_preservation_multiplier", 1.0),
    **_all(float, "inverted_mask_prior_multiplier", 0.5),
    **_all(str, "adapter_assist_name_or_path negative_prompt diff_output_preservation_class latent_feature_extractor_path"),
    **_all(str, "diffusion_feature_extractor_path unconditional_prompt"),
    "adapter_assist_type": (str, "t2i"),
    **_all(float, "guidance_loss_target differential_guidance_scale", 3.0),
    "paramiter_swapping_factor": (float, 0.1),
    "start_step": (int, None),
}
EMA: Keys = {"use_ema": (bool, False), "ema_decay": (float, 0.999), "use_feedback": (bool, False), "param_multiplier": (float, 1.0)}
MODEL: Keys = {
    **_all(str, "name_or_path arch vae_path refiner_name_or_path lora_path assistant_lora_path inference_lora_path latent_space_version unet_path"),
    **_all(str, "te_name_or_path extras_name_or_path accuracy_recovery_adapter vae_device te_device vae_dtype te_dtype"),
    **_all(bool, "is_v2 is_xl is_pixart is_pixart_sigma is_auraflow is_v3 is_flux is_lumina2 use_flux_cfg is_ssd is_vega is_v_pred experimental_xl"),
    **_all(bool, "quantize low_vram attn_masking split_model_over_gpus compile layer_offloading"),
    "quantize_te": (bool, None),
    **_all(bool, "use_text_encoder_1 use_text_encoder_2", True),
    **_all(str, "qtype qtype_te", "qfloat8"),
    "dtype": (str, "float16"),
    "text_encoder_bits": (int, 16),
    "refiner_start_at": (float, 0.5),
    **_all(float, "layer_offloading_transformer_percent layer_offloading_text_encoder_percent", 1.0),
    **_all(object, "ignore_if_contains only_if_contains quantize_kwargs model_kwargs unet_sample_size split_model_other_module_param_count_scale"),
}
SAMPLE: Keys = {
    "sampler": (str, "ddpm"),
    "sample_every": (int, 100),
    **_all(int, "width height", 512),
    **_all((str,), "prompts"),
    **_all(object, "samples extra_values"),
    "neg": (object, ""),
    "seed": (int, 0),
    "walk_seed": (bool, False),
    "guidance_scale": (float, 7.0),
    "sample_steps": (int, 20),
    **_all(float, "network_multiplier adapter_conditioning_scale", 1.0),
    "guidance_rescale": (float, 0.0),
    "format": (str, "jpg"),
    "ext": (str, "jpg"),
    "refiner_start_at": (float, 0.5),
    "num_frames": (int, 1),
    "fps": (int, 16),
    "sample_start_step": (int, 0),
}
SCHEDULE: Keys = {"eta_min": (float, 0.0), "num_warmup_steps": (float, 0.0), "total_iters": (object, None)}
ITEM: Keys = {
    **_all(str, "prompt neg ctrl_img ctrl_img_1 ctrl_img_2 ctrl_img_3"),
    **_all(int, "width height seed sample_steps fps num_frames ctrl_idx"),
    **_all(float, "guidance_scale network_multiplier"),
}

NO_EQUAL: Mapping[str, str] = {
    "adapter": "IP adapters, ControlNets and the like are not trained",
    "embedding": "textual inversion is not trained",
    "slider": "sliders are not trained",
    "flip_x": "pictures are not mirrored; add mirrored copies to the dataset",
    "flip_y": "pictures are not mirrored; add mirrored copies to the dataset",
    "augments": "pictures are not varied; add varied copies to the dataset",
    "augmentations": "pictures are not varied; add varied copies to the dataset",
    "random_crop": "with buckets only what rounding leaves over is cropped; crop and crop_style random cut elsewhere",
    "random_scale": "pictures have one size a dataset; list a folder at several resolutions",
    "scale": "pictures are resized to resolution alone",
    "mask_min_value": "black of a mask does not count at all; lighten the masks",
    "invert_mask": "white of a mask is learned; invert the files",
    "alpha_mask": "transparency is laid on white; write it into masks (dataset_type conditioning)",
    "inverted_mask_prior": "what a mask hides is not trained",
    "network_weight": "all datasets train the adapter at strength 1",
    "loss_multiplier": "all datasets count alike; probability shows one more often",
    "reg_weight": "all datasets count alike; probability shows one more often",
    "random_triggers": "captions have no random words; caption_wildcards takes one of several",
    "use_short_captions": "captions are read from .txt files",
    "replacements": "words are replaced by caption_filter_list of a text_embeds entry",
    "num_frames": "films are not trained",
    "control_path": "only flux2 is trained with references here: dataset_type conditioning",
    "dataset_path": "folders are read: folder_path",
    "dtype": "adapters are saved in float32",
    "standardize_images": "pictures keep their brightness and contrast",
    "te_dtype": "frozen parts are held in mixed_precision",
    "log_every": "figures are logged at every step",
    "min_denoising_steps": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "max_denoising_steps": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "loss_target": "the target is that of the model's own training",
    "diff_output_preservation": "regularise by pictures: is_regularisation_data keeps them as the base model has them",
    "blank_prompt_preservation": "regularise by pictures: is_regularisation_data keeps them as the base model has them",
    "bypass_guidance_embedding": "the model is told distilled_guidance",
    "do_guidance_loss": "there is no such loss",
    "do_differential_guidance": "there is no such loss",
    "do_cfg": "training is without classifier-free guidance",
    "train_turbo": "turbo models are not distilled",
    "short_and_long_captions": "a picture has one caption a draw; a caption file may list several",
    "single_item_batching": "gradient_accumulation_steps does the same",
    "refiner_lr": "one model is trained at a time",
    "refiner_name_or_path": "one model is trained at a time",
    "use_feedback": "the average is a plain one",
    "param_multiplier": "the average is a plain one",
    "lora_path": "merge it into the base first: simpletuner merge",
    "inference_lora_path": "pictures are made with the trained adapter alone",
    "te_name_or_path": "text encoders are the base model's; pretrained_t5_model_name_or_path names a T5",
    "extras_name_or_path": "other parts are the base model's; single_file_base_model names another",
    "unet_path": "set pretrained_unet_model_name_or_path or pretrained_transformer_model_name_or_path",
    "accuracy_recovery_adapter": "there are no adapters that repair quantisation",
    "split_model_over_gpus": "a model is held by each accelerator as a whole; blocks_to_swap saves memory",
    "use_text_encoder_1": "both text encoders are read",
    "use_text_encoder_2": "both text encoders are read",
    "network_multiplier": "there is no adapter",
    "sampler": "pictures are made by the model's own scheduler",
    "ctrl_img": "pictures are made from words alone",
    "lorm": "there is no LoRM",
    "conv_alpha": "convolutions have the rank and alpha of the other layers",
    "transformer_only": "blocks alone are adapted; peft_lora_target_modules or lycoris_config name others",
    "num_train_timesteps": "the model's own number",
}
SILENT = frozenset(
    _all(
        object,
        "job meta device performance_log_every sqlite_db_path log_dir verbose hf_repo_id hf_private cache_latents cache_latents_to_disk "
        "cache_text_embeddings num_workers prefetch_factor debug fast_image_size xformers sdp unload_text_encoder force_first_sample "
        "format ext train_refiner vae_device te_device split_multistage_loras extra "
        "fps shrink_video_to_frames full_size_control_images replay_transforms do_i2v auto_frame_count do_audio "
        "diff_output_preservation_class diff_output_preservation_multiplier use_ui_logger old_lokr_format save_format "
        "layer_offloading_text_encoder_percent",
    )
)
"""Keys that ask for what is always so here, that belong to another key, or that concern nothing but how their program works."""
