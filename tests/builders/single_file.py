"""Models in diffusers layout written as one file in the layout of their makers: the inverse of what diffusers does to load such a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

Tensors = dict[str, Tensor]
RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
VAE_RESNET = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
MOST_BLOCKS = 12


def write_sdxl(model: Path, path: Path, *, metadata: Mapping[str, str] | None = None, **marks: Tensor) -> Path:
    """Stable Diffusion XL, `marks` being further tensors."""
    first, second = CLIPTextModel.from_pretrained(model / "text_encoder"), CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2")
    tensors = {
        **under("model.diffusion_model.", ldm_unet(model)),
        **under("first_stage_model.", ldm_vae(model)),
        **under("conditioner.embedders.0.transformer.", clip(first)),
        **under("conditioner.embedders.1.model.", open_clip(second)),
        **marks,
    }
    return save(tensors, path, metadata)


def write_refiner(model: Path, path: Path) -> Path:
    tensors = {
        **under("model.diffusion_model.", ldm_unet(model)),
        **under("first_stage_model.", ldm_vae(model)),
        **under("conditioner.embedders.0.model.", open_clip(CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2"))),
    }
    return save(tensors, path)


def write_sd1(model: Path, path: Path) -> Path:
    tensors = {
        **under("model.diffusion_model.", ldm_unet(model)),
        **under("first_stage_model.", ldm_vae(model)),
        **under("cond_stage_model.transformer.", clip(CLIPTextModel.from_pretrained(model / "text_encoder"))),
    }
    return save(tensors, path)


def write_sd2(model: Path, path: Path, *, metadata: Mapping[str, str] | None = None, **marks: Tensor) -> Path:
    tensors = {
        **under("model.diffusion_model.", ldm_unet(model)),
        **under("first_stage_model.", ldm_vae(model)),
        **under("cond_stage_model.model.", open_clip(CLIPTextModel.from_pretrained(model / "text_encoder"))),
        **marks,
    }
    return save(tensors, path, metadata)


def write_sd3(model: Path, path: Path) -> Path:
    """With all three text encoders; the projection of the first is not in such files, because it is the identity."""
    texts = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    clips = [
        under(f"text_encoders.{name}.transformer.", clip(CLIPTextModelWithProjection.from_pretrained(model / part))) for name, part in texts.items()
    ]
    clips[0].pop("text_encoders.clip_l.transformer.text_projection.weight")
    t5 = T5EncoderModel.from_pretrained(model / "text_encoder_3").state_dict()
    t5.pop("encoder.embed_tokens.weight", None)
    tensors = {
        **under("model.diffusion_model.", sd3(SD3Transformer2DModel.from_pretrained(model / "transformer"))),
        **under("first_stage_model.", ldm_vae(model)),
        **clips[0],
        **clips[1],
        **under("text_encoders.t5xxl.transformer.", t5),
    }
    return save(tensors, path)


def write_auraflow(model: Path, path: Path) -> Path:
    transformer = AuraFlowTransformer2DModel.from_pretrained(model / "transformer")
    return save({**under("model.", auraflow(transformer)), **under("vae.", ldm_vae(model))}, path)


def save(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def ldm_unet(model: Path) -> Tensors:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    state = unet.state_dict()
    attention = {name.split("attentions.")[1].split(".", 1)[1] for name in state if "attentions." in name}
    resnet = [f"{name}.{kind}" for name in RESNET for kind in ("weight", "bias")]
    conv = [f"conv.{kind}" for kind in ("weight", "bias")]
    down = [f"0.op.{kind}" for kind in ("weight", "bias")]
    both = [*(f"0.{name}" for name in resnet), *(f"1.{name}" for name in attention)]
    blocks = range(MOST_BLOCKS)
    names = [
        *(f"input_blocks.{block}.{name}" for block in blocks for name in (*both, *down)),
        *(f"output_blocks.{block}.{name}" for block in blocks for name in (*both, *(f"{place}.{name}" for place in (1, 2) for name in conv))),
        *(f"middle_block.{place}.{name}" for place in (0, 2) for name in resnet),
        *(f"middle_block.1.{name}" for name in attention),
        *(f"{name}.{kind}" for name in ("time_embed.0", "time_embed.2", "out.0", "out.2", "input_blocks.0.0") for kind in ("weight", "bias")),
        *(f"label_emb.0.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")),
    ]
    return renamed(state, names, "model.diffusion_model.", lambda marks: convert_ldm_unet_checkpoint(marks, unet.config))


def ldm_vae(model: Path) -> Tensors:
    vae = AutoencoderKL.from_pretrained(model / "vae")
    state, levels = vae.state_dict(), range(4)
    kinds = ("weight", "bias")
    names = [
        *(f"encoder.down.{level}.block.{block}.{name}.{kind}" for level in levels for block in levels for name in VAE_RESNET for kind in kinds),
        *(f"decoder.up.{level}.block.{block}.{name}.{kind}" for level in levels for block in levels for name in VAE_RESNET for kind in kinds),
        *(f"{half}.mid.block_{block}.{name}.{kind}" for half in ("encoder", "decoder") for block in (1, 2) for name in VAE_RESNET for kind in kinds),
        *(f"{half}.mid.attn_1.{name}.{kind}" for half in ("encoder", "decoder") for name in ("norm", "q", "k", "v", "proj_out") for kind in kinds),
        *(f"encoder.down.{level}.downsample.conv.{kind}" for level in levels for kind in kinds),
        *(f"decoder.up.{level}.upsample.conv.{kind}" for level in levels for kind in kinds),
        *(f"{half}.{name}.{kind}" for half in ("encoder", "decoder") for name in ("conv_in", "norm_out", "conv_out") for kind in kinds),
        *(f"{name}.{kind}" for name in ("quant_conv", "post_quant_conv") for kind in kinds),
    ]
    found = renamed(state, names, "", lambda marks: convert_ldm_vae_checkpoint(marks, vae.config))
    # The makers' attention is made of convolutions of one pixel.
    return {name: value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value for name, value in found.items()}


def renamed(state: Tensors, names: Iterable[str], prefix: str, convert: Callable[[Tensors], Tensors]) -> Tensors:
    """Give tensors the names from which `convert` makes theirs: found by converting marks, among more names than there can be."""
    original = list(dict.fromkeys(names))
    marks = {prefix + name: torch.tensor([number]) for number, name in enumerate(original)}
    origin = {name: original[int(mark)] for name, mark in convert(marks).items()}
    found = {origin[name]: tensor for name, tensor in state.items()}
    assert len(found) == len(state)
    return found


def clip(encoder: torch.nn.Module) -> Tensors:
    """As transformers named them before release 5.6; of the two models only one still has the wrapper in its names."""
    state = encoder.state_dict()
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in state.items()}


def open_clip(encoder: torch.nn.Module) -> Tensors:
    """With queries, keys and values in one matrix, and the projection the other way round."""
    renames = {
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renames |= {"self_attn": "attn", "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding"}
    renames |= {"final_layer_norm": "ln_final"}
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found: Tensors = {}
    for name, tensor in state.items():
        if "self_attn.q_proj" in name:
            joined = torch.cat([state[name.replace("q_proj", letter)] for letter in ("q_proj", "k_proj", "v_proj")])
            name, tensor = name.replace("q_proj.", "in_proj_"), joined
        elif "k_proj" in name or "v_proj" in name:
            continue
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for new, old in renames.items():
            name = name.replace(new, old)
        found[name] = tensor
    return found


def swapped(tensor: Tensor) -> Tensor:
    """Scale and shift in the makers' order."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def sd3(transformer: torch.nn.Module) -> Tensors:
    state, layers = transformer.state_dict(), len(transformer.transformer_blocks)
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        found[f"x_embedder.proj.{kind}"] = state[f"pos_embed.proj.{kind}"]
        for number, place in ((1, 0), (2, 2)):
            found[f"t_embedder.mlp.{place}.{kind}"] = state[f"time_text_embed.timestep_embedder.linear_{number}.{kind}"]
            found[f"y_embedder.mlp.{place}.{kind}"] = state[f"time_text_embed.text_embedder.linear_{number}.{kind}"]
        found[f"context_embedder.{kind}"] = state[f"context_embedder.{kind}"]
        found[f"final_layer.linear.{kind}"] = state[f"proj_out.{kind}"]
        found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
        for layer in range(layers):
            theirs, ours = f"joint_blocks.{layer}", f"transformer_blocks.{layer}"
            for block, heads, out, norm, mlp in (
                ("x_block", ("to_q", "to_k", "to_v"), "to_out.0", "norm1", "ff"),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm1_context", "ff_context"),
            ):
                is_last = block == "context_block" and layer == layers - 1
                found[f"{theirs}.{block}.attn.qkv.{kind}"] = torch.cat([state[f"{ours}.attn.{head}.{kind}"] for head in heads])
                modulation = state[f"{ours}.{norm}.linear.{kind}"]
                found[f"{theirs}.{block}.adaLN_modulation.1.{kind}"] = swapped(modulation) if is_last else modulation
                if not is_last:
                    found[f"{theirs}.{block}.attn.proj.{kind}"] = state[f"{ours}.attn.{out}.{kind}"]
                    found[f"{theirs}.{block}.mlp.fc1.{kind}"] = state[f"{ours}.{mlp}.net.0.proj.{kind}"]
                    found[f"{theirs}.{block}.mlp.fc2.{kind}"] = state[f"{ours}.{mlp}.net.2.{kind}"]
    return found


def auraflow(transformer: torch.nn.Module) -> Tensors:
    state = transformer.state_dict()
    renames = {
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "context_embedder": "cond_seq_linear",
        "pos_embed.pos_embed": "positional_encoding",
        "pos_embed.proj": "init_x_linear",
        "proj_out": "final_linear",
        "norm_out.linear": "modF.1",
        "joint_transformer_blocks": "double_layers",
        "single_transformer_blocks": "single_layers",
        "ff_context.": "mlpC.",
        "norm1_context.linear": "modC.1",
        "out_projection": "c_proj",
        "linear_1": "c_fc1",
        "linear_2": "c_fc2",
        "add_q_proj": "w1q",
        "add_k_proj": "w1k",
        "add_v_proj": "w1v",
        "to_add_out": "w1o",
    }
    found: Tensors = {}
    for name, tensor in state.items():
        image, both = ("2", {"ff.": "mlpX.", "norm1.linear": "modX.1"}), ("1", {"ff.": "mlp.", "norm1.linear": "modCX.1"})
        number, special = both if name.startswith("single_") else image
        attention = {"to_out.0": f"w{number}o", **{f"to_{letter}": f"w{number}{letter}" for letter in "qkv"}}
        theirs = name
        for ours, other in {**renames, **special, **attention}.items():
            theirs = theirs.replace(ours, other)
        found[theirs] = swapped(tensor) if name.startswith("norm_out.") else tensor
    return found
