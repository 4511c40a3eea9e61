"""Say what a checkpoint in one file is, from the names and shapes of its tensors alone.

Makers publish such files in layouts of their own; a few names give each of them away. The names are facts of the published files,
as the loaders of diffusers know them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]
"""Names of tensors to their shapes."""

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""What stands before the names of a denoiser in a file that may hold other parts."""
VAE_PREFIXES = ("first_stage_model.", "vae.")
OTHER_PREFIXES = (*VAE_PREFIXES, "cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.")
"""What stands before the names of everything else."""
LATENT_CHANNELS = 4
"""Of every Stable Diffusion with a U-Net."""
CONDITIONED = {5: "a model that is told depths", 8: "a model that edits pictures (InstructPix2Pix)", 9: "an inpainting model"}
"""What a U-Net with more channels is."""
SD2_TEXT_WIDTH = 1024
REFINER_TEXT_WIDTH = 1280
ADAPTER_ENDINGS = (
    "lora_down.weight",
    "lora_A.weight",
    "lora_A.default.weight",
    "lora.down.weight",
    "lokr_w1",
    "lokr_w1_a",
    "hada_w1_a",
    "oft_blocks",
    "dora_scale",
    "on_input",
)
QUANTISED_ENDINGS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax", ".qweight", ".comfy_quant")
IDLE_STARTS = ("model_ema.", "ema.", "ema_model.", "optimizer", "lr_scheduler", "loss.", "posterior_", "denoiser.", "edm_vpred.")
IDLE_ENDINGS = ("position_ids", "logit_scale", "num_batches_tracked")
IDLE_NAMES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("logvar", "lvlb_weights", "scale_factor", "global_step", "v_pred", "ztsnr"),
    *("norm_final.weight", "y_embedder.y_embedding", "pos_embed"),  # of Lumina 2, of Sana: diffusers' own mappings drop them
)
"""Tensors that files carry beside a model's own: copies, states and schedules of the training. Nothing is lost with them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is."""

    title: str
    """As it stands in a sentence: this file is ..."""
    family: str | None = None
    """The model_family that trains it; None where it is no denoiser that any family trains."""
    hint: str | None = None
    """The way out, where the title does not show it."""


ADAPTER = Kind(
    "an adapter (LoRA or LyCORIS), not a model",
    hint="Set init_lora to go on training it, and pretrained_model_name_or_path to the model that it was trained on.",
)
VAE = Kind("a VAE, not a whole model", hint="Set pretrained_vae_model_name_or_path to it.")
TEXT_ENCODER = Kind("a text encoder, not a whole model", hint="The denoiser is in another file.")
EMBEDDING = Kind("a textual inversion embedding, not a model")
CONTROLNET = Kind("a ControlNet, not a model by itself")
UNKNOWN = Kind("no checkpoint of a kind that is known here", hint="Is it the right file? A model in diffusers layout is set by its folder.")

TRANSFORMERS: Sequence[tuple[Sequence[str], Kind]] = (
    (("early_stream_modulations.image.lin.weight",), Kind("a Flux.3 transformer")),
    (("single_stream_modulation.lin.weight",), Kind("a Flux.2 transformer", "flux2")),
    (("single_stream_modulation.linear.weight",), Kind("a Flux.2 transformer", "flux2")),
    (("distilled_guidance_layer.in_proj.bias",), Kind("a Chroma transformer", "chroma")),
    (("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",), Kind("a HunyuanVideo transformer", "hunyuanvideo")),
    (("double_blocks.0.img_attn.norm.key_norm.scale",), Kind("a Flux.1 transformer", "flux")),
    (("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"), Kind("a Flux.1 transformer", "flux")),
    (("joint_blocks.0.context_block.adaLN_modulation.1.bias",), Kind("a Stable Diffusion 3 transformer", "sd3")),
    (("pos_embed.pos_embed", "transformer_blocks.0.attn.add_k_proj.weight"), Kind("a Stable Diffusion 3 transformer", "sd3")),
    (("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight"), Kind("an AuraFlow transformer", "auraflow")),
    (("joint_transformer_blocks.0.attn.to_q.weight", "register_tokens"), Kind("an AuraFlow transformer", "auraflow")),
    (("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight"), Kind("a Z-Image transformer", "z_image")),
    (("cap_embedder.0.weight",), Kind("a Lumina 2 transformer", "lumina2")),
    (("transformer_blocks.0.img_mod.1.weight",), Kind("a Qwen-Image transformer", "qwen_image")),
    (("blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.fc1.weight"), Kind("a PixArt transformer", "pixart")),
    (("pos_embed.proj.weight", "adaln_single.linear.weight"), Kind("a PixArt transformer", "pixart")),
    (("blocks.0.cross_attn.q_linear.weight",), Kind("a Sana transformer", "sana")),
    (("double_stream_blocks.0.block.adaLN_modulation.1.bias",), Kind("a HiDream transformer", "hidream")),
    (("head.modulation", "patch_embedding.weight"), Kind("a Wan video transformer", "wan")),
    (("patchify_proj.weight",), Kind("an LTX-Video transformer", "ltxvideo")),
    (("blocks.0.attn.qkv_x.weight",), Kind("a Mochi transformer")),
)
"""Names that a denoiser has, all of them, and what it then is; the first that fits."""


def recognise(shapes: Shapes) -> Kind:
    """Name the kind of a file with these tensors."""
    if any(name.endswith(ADAPTER_ENDINGS) for name in shapes):
        return ADAPTER
    if any(name.startswith("control_model.") or "controlnet_cond_embedding." in name or "input_hint_block." in name for name in shapes):
        return CONTROLNET
    if "emb_params" in shapes or set(shapes) <= {"clip_g", "clip_l", "string_to_param.*"}:
        return EMBEDDING if shapes else UNKNOWN
    bare = denoiser_names(shapes)
    denoiser = {name: shapes[whole] for name, whole in bare.items()}
    found = _unet(denoiser, shapes) or _transformer(denoiser)
    if found is not None:
        return found
    if vae_names(shapes):
        return VAE
    if any("encoder.layers.0.self_attn." in name or "encoder.block.0.layer.0.SelfAttention" in name for name in shapes):
        return TEXT_ENCODER
    if any("layers.0.self_attn." in name for name in shapes):
        return TEXT_ENCODER
    return UNKNOWN


def is_quantised(shapes: Shapes) -> bool:
    """Whether numbers are kept beside the weights without which those mean nothing."""
    return any(name.endswith(QUANTISED_ENDINGS) for name in shapes)


def is_idle(name: str) -> bool:
    """Whether a tensor of this name, without what stands before it, is none that a model needs."""
    return name in IDLE_NAMES or name.startswith(IDLE_STARTS) or name.endswith(IDLE_ENDINGS)


def denoiser_names(shapes: Shapes) -> dict[str, str]:
    """Names of the denoiser's tensors without what stands before them, to the names in the file."""
    for prefix in DENOISER_PREFIXES:
        found = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
        # A language model's names begin with "model.layers." too; no denoiser that is kept under "model." has self_attn.
        if found and not any(name.startswith("layers.0.self_attn.") for name in found):
            return found
    return {name: name for name in shapes if not name.startswith(OTHER_PREFIXES)}


def vae_names(shapes: Shapes) -> dict[str, str]:
    """Names of the VAE's tensors without what stands before them, to the names in the file; empty where there is none."""
    for prefix in VAE_PREFIXES:
        found = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
        if found:
            return found
    is_vae = {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(shapes)
    return {name: name for name in shapes} if is_vae else {}


def _transformer(denoiser: Shapes) -> Kind | None:
    return next((kind for names, kind in TRANSFORMERS if all(name in denoiser for name in names)), None)


def _unet(denoiser: Shapes, shapes: Shapes) -> Kind | None:
    """Which Stable Diffusion it is, by what it is told besides the text, and by the width of the text."""
    entry = denoiser.get("input_blocks.0.0.weight", denoiser.get("conv_in.weight") if "down_blocks.0.resnets.0.conv1.weight" in denoiser else None)
    if entry is None:
        return None
    if "edm_mean" in shapes:
        return Kind("a Playground 2.5 model, which learns by EDM", hint="There is no objective for it here.")
    if entry[1] != LATENT_CHANNELS:
        title = CONDITIONED.get(entry[1], "a model that is told more than text")
        return Kind(f"{title}: its U-Net takes {entry[1]} channels", hint="Take the text-to-image model that it was made from.")
    width = unet_text_width(denoiser)
    if "label_emb.0.0.weight" in denoiser or "add_embedding.linear_1.weight" in denoiser:
        return Kind("a Stable Diffusion XL refiner" if width == REFINER_TEXT_WIDTH else "a Stable Diffusion XL model", "sdxl")
    if width == SD2_TEXT_WIDTH or any(name.startswith("cond_stage_model.model.") for name in shapes):
        return Kind("a Stable Diffusion 2 model", "sd2x")
    return Kind("a Stable Diffusion 1 model", "sd1x")


def unet_text_width(denoiser: Shapes) -> int | None:
    """D, the width of the text that a U-Net attends to; None for what is no such U-Net."""
    return next((shape[-1] for name, shape in denoiser.items() if name.endswith(("attn2.to_k.weight", "attn2.key.weight"))), None)
