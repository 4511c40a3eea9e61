"""The keys of OneTrainer's configs and presets, with types and defaults, of 2025; and what becomes of those that have no equal.

Facts from its config classes and its presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, tuple[Any, Any]]


def _all(kind: Any, names: str, default: Any = None) -> dict[str, tuple[Any, Any]]:
    return dict.fromkeys(names.split(), (kind, default))


PARTS = (
    *("unet", "prior", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "vae"),
    *("unconditional_transformer", "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan"),
)
TOP: Keys = {
    **_all(dict, " ".join(PARTS)),
    **_all(
        object, "optimizer optimizer_defaults concepts samples scheduler_params embedding embeddings additional_embeddings quantization cloud secrets"
    ),
    **_all(object, "__version custom_learning_rate_scheduler"),
    "training_method": (str, "FINE_TUNE"),
    "model_type": (str, "STABLE_DIFFUSION_15"),
    "base_model_name": (str, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "output_model_destination": (str, "models/model.safetensors"),
    "output_model_format": (str, "SAFETENSORS"),
    "output_dtype": (str, "FLOAT_32"),
    "workspace_dir": (str, "workspace/run"),
    "concept_file_name": (str, "training_concepts/concepts.json"),
    "sample_definition_file_name": (str, "training_samples/samples.json"),
    **_all(str, "cache_dir debug_dir train_device temp_device device_indexes include_train_config gradient_reduce_precision extra_model_name"),
    **_all(str, "sample_image_format sample_video_format sample_audio_format save_filename_prefix frames fallback_train_dtype"),
    **_all(bool, "debug_mode tensorboard_expose tensorboard_always_on continue_last_backup prevent_overwrites multi_gpu compile only_cache"),
    **_all(bool, "force_circular_padding generalized_offset_noise force_v_prediction force_epsilon_prediction dynamic_timestep_shifting"),
    **_all(bool, "rescale_noise_scheduler_to_zero_terminal_snr masked_training normalize_masked_area_loss custom_conditioning_image rolling_backup"),
    **_all(bool, "layer_filter_regex lora_layers_regex lora_decompose lora_decompose_output_axis preserve_embedding_norm oft_block_share dora_oft"),
    **_all(bool, "oft_scaled oft_cans lokr_decompose_both lokr_use_tucker lokr_weight_decompose lokr_full_matrix circular_mask_generation"),
    **_all(bool, "random_rotate_and_crop validation train_text_encoder_or_embedding"),
    **_all(bool, "tensorboard async_offloading fused_gradient_reduce async_gradient_reduce aspect_ratio_bucketing image_caching text_caching", True),
    **_all(bool, "latent_caching clear_cache_before_training prefetch_next_batch enable_autocast_cache samples_to_tensorboard", True),
    **_all(bool, "non_ema_sampling backup_before_save lora_decompose_norm_epsilon bundle_additional_embeddings lokr_dora_on_output", True),
    **_all(bool, "lokr_vec_trick enable_activation_offloading enable_async_offloading", True),
    "tensorboard_port": (int, 6006),
    "validate_after": (float, 1.0),
    "validate_after_unit": (str, "EPOCH"),
    "async_gradient_reduce_buffer": (int, 100),
    "latent_caching_epochs": (int, 1),
    "learning_rate": (float, 3e-6),
    "learning_rate_scheduler": (str, "CONSTANT"),
    "learning_rate_warmup_steps": (float, 200.0),
    "learning_rate_cycles": (float, 1.0),
    "learning_rate_min_factor": (float, 0.0),
    "learning_rate_scaler": (str, "NONE"),
    "epochs": (int, 100),
    **_all(int, "batch_size gradient_accumulation_steps", 1),
    "ema": (str, "OFF"),
    "ema_decay": (float, 0.999),
    "ema_update_step_interval": (int, 5),
    **_all(int, "caching_threads dataloader_threads", 2),
    "train_dtype": (str, "FLOAT_16"),
    "weight_dtype": (str, "FLOAT_32"),
    "resolution": (object, "512"),
    "attention_mechanism": (str, "SDP"),
    "mse_strength": (float, 1.0),
    **_all(float, "mae_strength log_cosh_strength huber_strength offset_noise_weight perturbation_noise_weight min_noising_strength cep_gamma", 0.0),
    **_all(float, "noising_weight noising_bias dropout_probability masked_prior_preservation_weight", 0.0),
    **_all(float, "huber_delta vb_loss_strength timestep_shift max_noising_strength lora_alpha", 1.0),
    "loss_weight_fn": (str, "CONSTANT"),
    "loss_weight_strength": (float, 5.0),
    "min_snr_gamma": (float, 0.0),
    "loss_scaler": (str, "NONE"),
    "clip_grad_norm": (float, 1.0),
    "timestep_distribution": (str, "UNIFORM"),
    "gradient_checkpointing": (str, "ON"),
    "layer_offload_fraction": (float, 0.0),
    **_all(int, "text_encoder_layer_skip text_encoder_2_layer_skip text_encoder_3_layer_skip text_encoder_4_layer_skip", 0),
    "text_encoder_sequence_length": (int, 512),
    "text_encoder_2_sequence_length": (int, 77),
    **_all(float, "unmasked_probability unmasked_weight", 0.1),
    **_all(str, "layer_filter lora_layers", ""),
    **_all(str, "layer_filter_preset lora_layer_preset", "full"),
    "embedding_learning_rate": (float, None),
    "embedding_weight_dtype": (str, "FLOAT_32"),
    "peft_type": (str, "LORA"),
    "lora_model_name": (str, ""),
    "lora_rank": (int, 16),
    "lora_weight_dtype": (str, "FLOAT_32"),
    "oft_block_size": (int, 32),
    "oft_clipped_norm": (float, 0.95),
    "lokr_dim": (int, 16),
    "lokr_decompose_factor": (int, -1),
    "sample_after": (float, 10.0),
    "sample_after_unit": (str, "MINUTE"),
    "sample_skip_first": (int, 0),
    "backup_after": (float, 30.0),
    "backup_after_unit": (str, "MINUTE"),
    "rolling_backup_count": (int, 3),
    "save_every": (float, 0.0),
    "save_every_unit": (str, "NEVER"),
    "save_after": (float, 0.0),
    "save_after_unit": (str, "NEVER"),
    "save_skip_first": (int, 0),
    **_all(float, "weight_decay unet_learning_rate text_encoder_learning_rate text_encoder_2_learning_rate prior_learning_rate"),
    **_all(bool, "train_unet train_text_encoder train_text_encoder_2 train_prior"),
    **_all(int, "train_unet_epochs train_text_encoder_epochs train_text_encoder_2_epochs train_prior_epochs token_count"),
    **_all(str, "unet_weight_dtype text_encoder_weight_dtype text_encoder_2_weight_dtype vae_weight_dtype prior_weight_dtype vae_model_name"),
    **_all(str, "prior_model_name initial_embedding_text"),
}
PART: Keys = {
    "model_name": (str, ""),
    **_all(bool, "include train train_embedding gradient_checkpointing", True),
    **_all(bool, "attention_mask activation_offloading", False),
    "stop_training_after": (float, None),
    "stop_training_after_unit": (str, "NEVER"),
    "learning_rate": (float, None),
    "weight_dtype": (str, "FLOAT_32"),
    **_all(float, "dropout_probability offload_fraction", 0.0),
    "guidance_scale": (float, 1.0),
}
OLD_OF_PARTS = ("train", "learning_rate", "weight_dtype", "model_name")
"""Keys of parts that stood at the top once: train_unet, unet_learning_rate, unet_weight_dtype, vae_model_name."""
CONCEPT: Keys = {
    **_all(str, "name path", ""),
    **_all(int, "seed __version"),
    "enabled": (bool, True),
    **_all(bool, "validation_concept include_subdirectories", False),
    "type": (str, "STANDARD"),
    **_all(int, "image_variations text_variations", 1),
    "balancing": (float, 1.0),
    "repeats": (float, 1.0),
    "balancing_strategy": (str, "REPEATS"),
    "loss_weight": (float, 1.0),
    "image": (dict, None),
    "text": (dict, None),
    "concept_stats": (object, None),
}
IMAGE: Keys = {
    **_all(bool, "enable_crop_jitter enable_random_flip", True),
    **_all(bool, "enable_fixed_flip enable_random_rotate enable_fixed_rotate enable_random_brightness enable_fixed_brightness", False),
    **_all(bool, "enable_random_contrast enable_fixed_contrast enable_random_saturation enable_fixed_saturation enable_random_hue", False),
    **_all(bool, "enable_fixed_hue enable_resolution_override enable_random_circular_mask_shrink enable_random_mask_rotate_crop", False),
    **_all(float, "random_rotate_max_angle random_brightness_max_strength random_contrast_max_strength random_saturation_max_strength", 0.0),
    "random_hue_max_strength": (float, 0.0),
    "resolution_override": (object, "512"),
}
TEXT: Keys = {
    "prompt_source": (str, "sample"),
    "prompt_path": (str, ""),
    **_all(bool, "enable_tag_shuffling tag_dropout_enable tag_dropout_special_tags_regex caps_randomize_enable caps_randomize_lowercase", False),
    "tag_delimiter": (str, ","),
    "keep_tags_count": (int, 1),
    "tag_dropout_mode": (str, "FULL"),
    **_all(float, "tag_dropout_probability caps_randomize_probability", 0.0),
    "tag_dropout_special_tags_mode": (str, "NONE"),
    "tag_dropout_special_tags": (str, ""),
    "caps_randomize_mode": (str, "capslock, title, first, random"),
}
SAMPLE: Keys = {
    "enabled": (bool, True),
    **_all(str, "prompt negative_prompt base_image_path mask_image_path", ""),
    **_all(int, "height width", 512),
    "frames": (int, 1),
    "length": (float, 10.0),
    "seed": (int, 42),
    **_all(bool, "random_seed transformer_attention_mask force_last_timestep sample_inpainting", False),
    "diffusion_steps": (int, 20),
    "cfg_scale": (float, 7.0),
    "noise_scheduler": (str, "DDIM"),
    "__version": (int, None),
    **_all(int, "text_encoder_1_layer_skip text_encoder_2_layer_skip text_encoder_3_layer_skip text_encoder_4_layer_skip", 0),
}

NO_EQUAL: Mapping[str, str] = {
    "validation": "give a dataset of dataset_type eval, or mark a concept as validation_concept",
    "multi_gpu": "set num_processes to the number of GPUs",
    "output_dtype": "adapters are saved in float32",
    "force_circular_padding": "pictures do not tile",
    "mae_strength": "there are l2, huber and smooth_l1",
    "log_cosh_strength": "there are l2, huber and smooth_l1",
    "mse_strength": "a loss is not multiplied",
    "vb_loss_strength": "the predicted variance is not trained",
    "loss_scaler": "the loss is the mean over the pictures of a step",
    "min_noising_strength": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "max_noising_strength": "all noise levels are trained; timestep_bias_strategy range trains some more often",
    "generalized_offset_noise": "offset_noise is the same at all noise levels",
    "cep_gamma": "captions are not disturbed",
    "text_encoder_layer_skip": "the text encoder's last layer is read, as the model's pipeline does",
    "text_encoder_2_layer_skip": "the text encoder's last layer is read, as the model's pipeline does",
    "unmasked_weight": "what is black in a mask does not count at all; lighten the masks",
    "normalize_masked_area_loss": "the mean is over the whole picture",
    "masked_prior_preservation_weight": "what a mask hides is not trained",
    "custom_conditioning_image": "models with further inputs are not trained",
    "additional_embeddings": "embeddings are not trained",
    "embeddings": "embeddings are not trained",
    "lora_decompose_output_axis": "DoRA has one axis",
    "quantization": "all Linear layers are quantised",
    "custom_learning_rate_scheduler": "there are schedules by name alone: lr_scheduler",
    "scheduler_params": "there are schedules by name alone: lr_scheduler",
    "rolling_backup": "checkpoints_total_limit says how many are kept",
    **dict.fromkeys(("circular_mask_generation", "random_rotate_and_crop"), "masks are used as they are"),
    **dict.fromkeys(("sample_inpainting", "mask_image_path"), "pictures are made from words alone"),
    "lora_weight_dtype": "what is trained stays in float32",
    "lokr_dora_on_output": "DoRA has one axis",
    "include": "all text encoders of a family are read",
    **dict.fromkeys(("oft_block_share", "oft_scaled", "oft_clipped_norm", "oft_cans", "dora_oft"), "OFT is that of LyCORIS (diag-oft), plain"),
    "sample_skip_first": "without an interval of steps or epochs nothing is skipped",
    "save_skip_first": "checkpoints begin at their first interval",
    "cloud": "training runs here",
    "include_subdirectories": "folders in a folder belong to it always",
    "loss_weight": "all datasets count alike; probability shows one more often",
    "image_variations": "an image has one form, except crops_per_image; it is encoded once",
    "enable_random_flip": "pictures are not mirrored; add mirrored copies to the dataset",
    "enable_fixed_flip": "pictures are not mirrored; add mirrored copies to the dataset",
    **dict.fromkeys(("enable_random_rotate", "enable_fixed_rotate"), "pictures are not turned; add turned copies to the dataset"),
    **dict.fromkeys(
        (f"enable_{kind}_{what}" for kind in ("random", "fixed") for what in ("brightness", "contrast", "saturation", "hue")),
        "colours are not varied; add varied copies to the dataset",
    ),
    **dict.fromkeys(("enable_random_circular_mask_shrink", "enable_random_mask_rotate_crop"), "masks are used as they are"),
    "tag_dropout_mode": "each tag is dropped with the same probability",
    "tag_dropout_special_tags": "the tags that stay are those in front: caption_shuffle.position_start",
    "caps_randomize_enable": "letters stay as they are written; filters of a text_embeds entry replace words",
    "stop_training_after": "the denoiser learns to the end",
    "attention_mask": "prompts are masked as the family's pipeline does; flux_attention_masked_training hides padding of Flux",
    "noise_scheduler": "pictures are made by the model's own scheduler",
    "base_image_path": "pictures are made from words alone",
    "random_seed": "pictures have one seed each, so that they can be compared",
    "frames": "films are not trained",
}
SILENT = frozenset(
    _all(
        object,
        "__version debug_mode debug_dir workspace_dir cache_dir tensorboard_expose tensorboard_always_on tensorboard_port "
        "prevent_overwrites include_train_config device_indexes gradient_reduce_precision fused_gradient_reduce async_gradient_reduce "
        "async_gradient_reduce_buffer async_offloading image_caching text_caching latent_caching train_embedding "
        "latent_caching_epochs clear_cache_before_training caching_threads dataloader_threads prefetch_next_batch train_device "
        "temp_device fallback_train_dtype enable_autocast_cache only_cache attention_mechanism optimizer_defaults samples_to_tensorboard "
        "sample_image_format sample_video_format sample_audio_format backup_before_save backup_after_unit "
        "rolling_backup_count save_filename_prefix secrets embedding embedding_learning_rate embedding_weight_dtype "
        "preserve_embedding_norm bundle_additional_embeddings extra_model_name token_count initial_embedding_text name "
        "seed concept_stats enable_async_offloading enable_activation_offloading continue_last_backup output_model_format "
        "validate_after_unit save_every_unit save_after_unit sample_after_unit length lora_decompose_norm_epsilon "
        "lokr_vec_trick lokr_dim lokr_decompose_factor "
        "lokr_decompose_both lokr_use_tucker lokr_weight_decompose lokr_full_matrix lora_rank lora_alpha oft_block_size "
        "lora_decompose dropout_probability random_rotate_max_angle "
        "random_brightness_max_strength random_contrast_max_strength random_saturation_max_strength random_hue_max_strength "
        "layer_filter_preset lora_layer_preset layer_filter lora_layers layer_filter_regex lora_layers_regex peft_type "
        "tag_dropout_special_tags_mode tag_dropout_special_tags_regex caps_randomize_mode caps_randomize_probability "
        "caps_randomize_lowercase loss_weight_strength huber_delta noising_weight noising_bias timestep_shift validate_after "
        "non_ema_sampling",
    )
)
"""Keys that ask for what is always so here, that belong to another key, or that concern nothing but how their program works."""
