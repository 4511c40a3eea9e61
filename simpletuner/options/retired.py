"""Keys of older configs that are not options here: said in one line each, and never in the way of a run."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

GONE: Mapping[str, str] = {
    "pictures are rendered without torch.compile": "validation_torch_compile validation_torch_compile_mode",
    "images always go into buckets by their shape": "aspect_ratio_bucketing aspect_ratio_bucket_min aspect_ratio_bucket_max",
    "it belongs to a dataset in data_backend_config": "repeats",
    "model_type and lora_type say it": "ez_model_type",
    "PyTorch's own attention is used, unless attention_mechanism says otherwise": "use_xformers enable_xformers_memory_efficient_attention",
    "no attention here holds all its scores, so there is nothing to slice": "unet_attention_slice",
    "in training the parts of a chunked layer are all kept, so it saves nothing": "enable_chunked_feed_forward feed_forward_chunk_size",
    "an adapter learns each projection by itself": "fuse_qkv_projections fused_qkv_projections",
    "with gradient_checkpointing_backend selective, what attention answered stays on the accelerator": "gradient_checkpointing_offload_attention*",
    "text encoders, VAE and denoiser are always loaded one after the other": (
        "offload_during_startup fully_unload_text_encoder group_offload_text_encoder group_offload_vae"
    ),
    "copying always goes on beside computing": "group_offload_use_stream",
    "whole blocks are offloaded, which takes little more memory than layer by layer": "group_offload_type",
    "blocks that wait, wait in main memory": "musubi_block_swap_device",
    "blocks_to_swap or max_resident_weights says how much of the weights is streamed from main memory": "ramtorch ramtorch_*",
    "every step of a noise schedule is trained, whatever the spacing": "training_scheduler_timestep_spacing",
    "flow_custom_timesteps are drawn at random, each as often as it is listed": "flow_timesteps_mode",
    "it never had an effect": "use_soft_min_snr soft_min_snr_sigma_data",
    "caches are not compressed, so that they are read fast": "compress_disk_cache",
    "what is known of a dataset is kept, and checked against its files": "preserve_data_backend_cache skip_file_discovery",
    "a changed dataset is always taken as it is now": "override_dataset_config",
    "caches are keyed by what they were made of": "vae_cache_scan_behaviour metadata_update_interval aspect_bucket_disable_rebuild",
    "checkpoints are always written aside, verified, and named if damaged": "checkpointing_use_tempdir delete_invalid_checkpoints",
    "batches are always read ahead; dataloader_prefetch_qlen says how many": "dataloader_prefetch",
    "gradients are always dropped after a step": "set_grads_to_none",
    "TF32 is on where the GPU has it": "disable_tf32 allow_tf32",
    "the average has one implementation": "ema_foreach_disable",
    "ema_device says where the average is held": "ema_cpu_only",
    "a run ends exactly where max_train_steps or num_train_epochs says": "strict_epoch_limit ignore_final_epochs",
    "each process always draws its own numbers from the one seed": "seed_for_each_device",
    "noise is always drawn on the CPU, so that every machine draws the same": "validation_seed_source",
    "there is no guard that it would lift": "i_know_what_i_am_doing",
    "images are read by as many threads as there are cores": (
        "read_batch_size image_processing_batch_size max_workers aspect_bucket_worker_count enable_multiprocessing"
    ),
    "cache entries are written as they are made": "write_batch_size",
    "no image is left out for the size of its bucket": "disable_bucket_pruning allow_dataset_oversubscription",
    "it is written in optimizer_config": "adam_beta1 adam_beta2 adam_epsilon adam_weight_decay optimizer_beta1 optimizer_beta2 prodigy_steps",
    "assistant_lora_path names the file, too: owner/name/file.safetensors": "assistant_lora_weight_name",
    "blocks are compiled one by one, each as a whole or not at all": "dynamo_fullgraph dynamo_use_regional_compilation",
    "gradients have the format of what is trained, which base_model_default_dtype says": "gradient_precision",
    "torchao's offload trains a copy that neither a resumed run nor max_grad_norm reaches; the optimizers bnb-*-paged move their state to RAM": (
        "optimizer_cpu_offload_method optimizer_offload_gradients fuse_optimizer"
    ),
}
"""Why keys are not needed, to the keys."""

LATER: Mapping[str, str] = {
    "publishing elsewhere, and scripts after a save": "publishing_config post_checkpoint_script post_upload_script",
    "evaluation pooled over datasets": "eval_dataset_pooling",
    "training parts of a network's own weights": "save_text_encoder freeze_encoder* layer_freeze_strategy",
    "choosing text encoders": ("pretrained_gemma_model_name_or_path qwen_text_encoder_model_name_or_path trust_remote_code"),
    "ControlNet": "controlnet controlnet_* control conditioning_*",
    "further ways to draw noise levels": "flow_cubic_schedule_weights mixflow_*",
    "distillation and alignment": "distillation_* tread_* crepa_* layersync_*",
    "options of other families": "t5_padding sd3_* slider_lora_target",
    "further kinds of plain LoRA": "peft_lora_mode singlora_* init_lora_step init_lora_ema",
    "further quantisers": "sdnq_* quantize_activations quantization_config",
    "several machines, sharded training": (
        "deepspeed_config fsdp_* context_parallel_* num_machines machine_rank main_process_ip main_process_port same_network accelerate_config "
        "accelerate_extra_args find_unused_parameters accelerator_cache_clear_interval"
    ),
    "rolling checkpoints and disk guards": (
        "checkpointing_rolling_steps checkpoints_rolling_total_limit offload_during_save disk_low_* delete_model_after_load"
    ),
    "further settings of validation": (
        "validation_adapter_* validation_external_* validation_method validation_no_cfg_until_timestep validation_stitch_input_location "
        "validation_using_datasets"
    ),
    "further caches": "cache_dir_vae cache_dir_text text_cache_ondemand text_cache_disable text_embed_full_cache",
    "sampling weights and clean-up of datasets": (
        "data_backend_sampling max_upscale_threshold delete_unwanted_images delete_problematic_images ignore_missing_files"
    ),
}
"""What is not built here yet, to the keys of it; a star stands for any ending."""

OFF = frozenset({"", "false", "no", "off", "none", "0", "0.0", "n", "f", "[]", "{}"})


def notice(key: str, value: Any) -> str | None:
    """Say in one line why a key is not an option here; an empty line if it asks for nothing, None if it is unknown."""
    why = _find(key, GONE)
    if why is not None:
        return f"{key} is gone: {why}"
    missing = _find(key, LATER)
    if missing is None:
        return None
    # What is switched off has just the effect that it asks for.
    return "" if str(value).lower() in OFF else f"{key} has no effect: not built yet ({missing})"


def known_elsewhere() -> list[str]:
    """Keys without an effect here; a star stands for any ending."""
    return [key for table in (GONE, LATER) for keys in table.values() for key in keys.split()]


def _find(key: str, table: Mapping[str, str]) -> str | None:
    return next((group for group, keys in table.items() if any(fnmatch.fnmatch(key, pattern) for pattern in keys.split())), None)
