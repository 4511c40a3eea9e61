"""Options that somebody set and that will have no effect in this run, said aloud."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from simpletuner.options.train_config import TrainConfig

OFF: tuple[object, ...] = (False, None, 0, "none", "")


@dataclass(frozen=True, slots=True)
class Idle:
    """Options that do nothing when something else is so."""

    keys: str
    when: Callable[[TrainConfig], bool]
    because: str


def renders(config: TrainConfig) -> bool:
    options = config.validation
    asked = (options.validation_prompt, options.user_prompt_library, options.validation_prompt_library, options.validation_unconditional)
    return not options.validation_disable and any(asked)


def named(names: str) -> set[str]:
    """The names in a list with commas."""
    return {name.strip() for name in names.split(",")}


PLAIN_LORA = "lora_rank lora_alpha lora_dropout peft_lora_target_modules flux_lora_target use_dora lora_init_type"
LYCORIS = "lycoris_config init_lokr_norm"
ASSISTANT = "assistant_lora_path assistant_lora_strength assistant_lora_inference_strength"
SKIPPED = "validation_guidance_skip_layers validation_guidance_skip_layers_start validation_guidance_skip_layers_stop validation_guidance_skip_scale"
PICTURES = (
    "validation_negative_prompt validation_resolution validation_guidance validation_guidance_real validation_num_inference_steps validation_seed "
    "num_validation_images validation_step_interval validation_on_startup validation_lycoris_strength ema_validation validation_guidance_rescale "
    "validation_noise_scheduler validation_epoch_interval validate_after_step validate_after_epoch validation_multigpu validation_image_format "
    "validation_preview evaluation_type"
)
EIGHT_BIT = ("int8-matmul", "int8-rotated", "fp8-matmul")
IDLE = [
    Idle(f"lora_type lora_format init_lora {PLAIN_LORA} {LYCORIS}", lambda c: c.adapters.model_type == "full", "model_type is full"),
    Idle(ASSISTANT, lambda c: c.adapters.disable_assistant_lora, "disable_assistant_lora is set"),
    Idle(
        PLAIN_LORA,
        lambda c: c.adapters.model_type == "lora" and c.adapters.lora_type == "lycoris",
        "with lora_type lycoris the file lycoris_config says it",
    ),
    Idle(LYCORIS, lambda c: c.adapters.model_type == "lora" and c.adapters.lora_type == "standard", "lora_type is standard"),
    Idle("text_encoder_lr text_encoder_limit", lambda c: not c.adapters.train_text_encoder, "train_text_encoder is not set"),
    Idle(
        "validation_negative_prompt",
        lambda c: c.validation.validation_guidance == 0 and c.validation.validation_guidance_real <= 1,
        "validation_guidance is 0: pictures follow their prompt alone",
    ),
    Idle("validation_lycoris_strength", lambda c: c.adapters.model_type == "full", "there is no adapter"),
    Idle("base_model_default_dtype", lambda c: c.adapters.model_type != "full", "an adapter is float32, and of its base mixed_precision says it"),
    Idle("optimizer_release_gradients", lambda c: c.adapters.model_type != "full", "the gradients of an adapter are small"),
    Idle("flow_schedule_shift", lambda c: c.diffusion.flow_schedule_auto_shift, "flow_schedule_auto_shift finds it from the image's size"),
    Idle(
        "flow_sigmoid_scale",
        lambda c: (
            c.diffusion.flow_use_uniform_schedule
            or c.diffusion.flow_use_beta_schedule
            or c.diffusion.flux_fast_schedule
            or bool(c.diffusion.flow_custom_timesteps)
        ),
        "noise levels are drawn from another distribution",
    ),
    Idle(
        "flow_schedule_shift flow_schedule_auto_shift",
        lambda c: bool(c.diffusion.flow_custom_timesteps or c.diffusion.flux_fast_schedule),
        "listed noise levels are not shifted",
    ),
    Idle("distilled_guidance", lambda c: c.diffusion.distilled_guidance_mode != "constant", "distilled_guidance_mode is random-range"),
    Idle(
        "distilled_guidance_min distilled_guidance_max",
        lambda c: c.diffusion.distilled_guidance_mode == "constant",
        "distilled_guidance_mode is constant",
    ),
    Idle("snr_weight", lambda c: c.diffusion.snr_gamma is None, "snr_gamma is not set"),
    Idle("diff2flow_enabled", lambda c: not c.diffusion.diff2flow_loss, "diff2flow_loss is not set"),
    Idle("diff2flow_loss", lambda c: not c.diffusion.diff2flow_enabled, "diff2flow_enabled is not set"),
    Idle("refiner_training_strength refiner_training_invert_schedule", lambda c: not c.diffusion.refiner_training, "refiner_training is not set"),
    Idle("huber_schedule", lambda c: c.diffusion.loss_type == "l2", "loss_type is l2"),
    Idle(
        "scheduled_sampling_probability scheduled_sampling_ramp_steps scheduled_sampling_start_step scheduled_sampling_strategy "
        "scheduled_sampling_prob_start scheduled_sampling_prob_end scheduled_sampling_ramp_shape "
        "scheduled_sampling_sampler scheduled_sampling_order scheduled_sampling_reflexflow scheduled_sampling_reflexflow_alpha "
        "scheduled_sampling_reflexflow_beta1 scheduled_sampling_reflexflow_beta2",
        lambda c: not c.diffusion.scheduled_sampling_max_step_offset,
        "scheduled_sampling_max_step_offset is 0",
    ),
    Idle("scheduled_sampling_max_step_offset", lambda c: not c.diffusion.samples_itself, "scheduled_sampling_probability is 0, and there is no ramp"),
    Idle(
        "scheduled_sampling_prob_start scheduled_sampling_prob_end scheduled_sampling_ramp_shape",
        lambda c: c.diffusion.scheduled_sampling_max_step_offset > 0 and not c.diffusion.scheduled_sampling_ramp_steps,
        "scheduled_sampling_ramp_steps is 0",
    ),
    Idle(
        "scheduled_sampling_probability",
        lambda c: c.diffusion.scheduled_sampling_max_step_offset > 0 and c.diffusion.scheduled_sampling_ramp_steps > 0,
        "scheduled_sampling_ramp_steps makes it a ramp",
    ),
    Idle("scheduled_sampling_order", lambda c: c.diffusion.scheduled_sampling_sampler == "euler", "scheduled_sampling_sampler is euler"),
    Idle(
        "scheduled_sampling_reflexflow_alpha scheduled_sampling_reflexflow_beta1 scheduled_sampling_reflexflow_beta2",
        lambda c: c.diffusion.scheduled_sampling_reflexflow is False,
        "scheduled_sampling_reflexflow is not set",
    ),
    Idle("flow_beta_schedule_alpha flow_beta_schedule_beta", lambda c: not c.diffusion.flow_use_beta_schedule, "flow_use_beta_schedule is not set"),
    Idle("noise_offset noise_offset_probability", lambda c: not c.diffusion.offset_noise, "offset_noise is not set"),
    Idle("input_perturbation_steps", lambda c: not c.diffusion.input_perturbation, "input_perturbation is not set"),
    Idle(
        "timestep_bias_multiplier timestep_bias_portion timestep_bias_begin timestep_bias_end",
        lambda c: c.diffusion.timestep_bias_strategy == "none",
        "timestep_bias_strategy is none",
    ),
    Idle("timestep_bias_begin timestep_bias_end", lambda c: c.diffusion.timestep_bias_strategy in ("earlier", "later"), "the strategy has no range"),
    Idle("timestep_bias_portion", lambda c: c.diffusion.timestep_bias_strategy == "range", "timestep_bias_strategy is range"),
    Idle("huber_c", lambda c: c.diffusion.loss_type == "l2", "loss_type is l2"),
    Idle("grad_clip_method", lambda c: c.optim.max_grad_norm == 0, "max_grad_norm is 0, so nothing is clipped"),
    Idle("vae_cache_ondemand", lambda c: c.data.vae_cache_disable, "vae_cache_disable keeps nothing"),
    Idle("target_downsample_size", lambda c: not c.data.maximum_image_size, "maximum_image_size is not set"),
    Idle("ema_decay ema_update_interval ema_warmup_steps ema_validation", lambda c: not c.training.use_ema, "use_ema is not set"),
    Idle(
        "best_checkpoint early_stop_patience",
        lambda c: c.validation.best_checkpoint == "clip" and c.validation.evaluation_type != "clip",
        "best_checkpoint is clip, and evaluation_type is not",
    ),
    Idle(
        "validation_guidance_skip_layers_start validation_guidance_skip_layers_stop validation_guidance_skip_scale",
        lambda c: not c.validation.validation_guidance_skip_layers,
        "validation_guidance_skip_layers is not set",
    ),
    Idle("pretrained_evaluation_model_name_or_path", lambda c: c.validation.evaluation_type == "none", "evaluation_type is none"),
    Idle("validation_preview_steps validation_preview_model", lambda c: not c.validation.validation_preview, "validation_preview is not set"),
    Idle("eight_bit_products", lambda c: c.memory.base_model_precision not in EIGHT_BIT, "base_model_precision is none that multiplies in 8 bits"),
    Idle("validation_image_quality", lambda c: c.validation.validation_image_format == "png", "validation_image_format png keeps all"),
    Idle(
        "validation_prompt user_prompt_library validation_prompt_library validation_unconditional",
        lambda c: c.validation.validation_disable,
        "validation_disable is set",
    ),
    Idle(
        PICTURES,
        lambda c: not renders(c) and not c.validation.validation_disable,
        "there is neither validation_prompt nor user_prompt_library",
    ),
    Idle(PICTURES, lambda c: c.validation.validation_disable, "validation_disable is set"),
    Idle(
        "gradient_checkpointing_backend gradient_checkpointing_interval gradient_checkpointing_segment_stride",
        lambda c: not c.memory.gradient_checkpointing,
        "gradient_checkpointing is not set",
    ),
    Idle(
        "gradient_checkpointing_interval",
        lambda c: c.memory.gradient_checkpointing_interval > 1 and not c.memory.gradient_checkpointing_segment_stride,
        "without gradient_checkpointing_segment_stride all blocks are computed again, one by one, which takes less memory than groups",
    ),
    Idle(
        "gradient_checkpointing_offload_bytes",
        lambda c: not (c.memory.gradient_checkpointing and c.memory.gradient_checkpointing_backend == "offload"),
        "gradient_checkpointing_backend is not offload",
    ),
    Idle("dynamo_mode dynamo_dynamic activation_memory_budget", lambda c: c.compiling.dynamo_backend == "no", "dynamo_backend is no"),
    Idle("group_offload_blocks_per_group group_offload_to_disk_path", lambda c: not c.memory.enable_group_offload, "enable_group_offload is not set"),
    Idle("sageattention_usage", lambda c: not c.memory.attention_mechanism.startswith("sageattention"), "attention_mechanism is no SageAttention"),
    Idle("tracker_run_name", lambda c: c.reporting.report_to == "none" and c.reporting.webhook_config is None, "report_to is none"),
    Idle("logging_dir", lambda c: c.reporting.report_to == "none", "report_to is none"),
    Idle("tracker_project_name", lambda c: c.reporting.report_to == "none" and not c.hub.push_to_hub, "report_to is none"),
    Idle("tracker_image_layout", lambda c: not {"wandb", "all"} & named(c.reporting.report_to), "wandb alone has tables"),
    Idle("custom_tracker", lambda c: not {"custom-tracker", "all"} & named(c.reporting.report_to), "report_to does not name custom-tracker"),
    Idle("webhook_reporting_interval", lambda c: c.reporting.webhook_config is None, "webhook_config is not set"),
    Idle("push_checkpoints_to_hub model_card_private", lambda c: not c.hub.push_to_hub, "push_to_hub is not set"),
    Idle("push_checkpoints_to_hub", lambda c: c.adapters.model_type == "full", "of model_type full the finished pipeline alone is published"),
    Idle("push_to_hub_background", lambda c: not (c.hub.push_to_hub and c.hub.push_checkpoints_to_hub), "push_checkpoints_to_hub is not set"),
]


FLOW = (
    "flow_schedule_shift flow_schedule_auto_shift flow_sigmoid_scale flow_use_uniform_schedule flow_use_beta_schedule flow_custom_timesteps "
    "flux_fast_schedule distilled_guidance scheduled_sampling_reflexflow scheduled_sampling_reflexflow_alpha "
    "scheduled_sampling_reflexflow_beta1 scheduled_sampling_reflexflow_beta2"
)
DENOISING = (
    "prediction_type rescale_betas_zero_snr snr_gamma offset_noise input_perturbation timestep_bias_strategy disable_segmented_timestep_sampling "
    "diff2flow_enabled diff2flow_loss refiner_training inference_scheduler_timestep_spacing"
)
GUIDANCE = "distilled_guidance distilled_guidance_mode distilled_guidance_min distilled_guidance_max"
"""What a family names by the first of these alone, where it is told no guidance."""
OF_OTHERS = {
    "flow": {
        DENOISING: "the model learns by flow matching, they belong to U-Net models",
        "validation_noise_scheduler validation_guidance_rescale": "pictures of models that learn by flow matching are made by Euler's steps alone",
    },
    "denoising": {FLOW: "the model predicts noise or velocity, they belong to flow matching"},
}
"""A family's objective to the options that belong to others, and the reason."""
OF_FEW_FAMILIES = {
    "data_aesthetic_score validation_start_image": "they are for the refiner of Stable Diffusion XL",
    SKIPPED: "they are Stable Diffusion 3's",
    "flux_attention_masked_training": "it is about Flux.1 alone",
}
"""Options that a family has to name among its `own_options` to heed them, and the reason why others do not."""


def without_effect(config: TrainConfig, given: Collection[str], idle_of_family: Mapping[str, str] | None = None) -> list[str]:
    """Name, reason by reason, the options among those `given` that are not off and will do nothing.

    Args:
        idle_of_family: keys, with blanks between several, that do nothing in the family, to the reason.
    """
    said: list[str] = []
    of_family = {keys.replace("distilled_guidance", GUIDANCE): because for keys, because in (idle_of_family or {}).items()}
    if config.validation.validation_guidance_real > 1 and "validation_guidance_real" not in of_family:
        of_family.pop("validation_negative_prompt", None)
    for idle in [*IDLE, *(Idle(keys, lambda c: True, because) for keys, because in of_family.items())]:
        keys = [key for key in idle.keys.split() if key in given and config.value(key) not in OFF]
        if keys and idle.when(config):
            verb = "has" if len(keys) == 1 else "have"
            said.append(f"{', '.join(keys)} {verb} no effect: {idle.because}")
    return said
