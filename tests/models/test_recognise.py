"""What a file is, by the names that published files of each kind have."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.cli.choices import family_of
from simpletuner.models.recognise import is_idle, is_quantised, recognise
from simpletuner.models.single_file import Checkpoint

UNET = {"input_blocks.0.0.weight": (320, 4, 3, 3)}
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "single_blocks.0.linear1.weight": (21504, 3072)}
SD3 = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)}
SANA = {"blocks.0.cross_attn.q_linear.weight": (2240, 2240)}
PIXART = {"blocks.0.cross_attn.q_linear.weight": (1152, 1152), "blocks.0.mlp.fc1.weight": (4608, 1152)}
PIXART_900M = ("900m-1024-v0.6", "900m-1024-v0.7-stage1", "900m-1024-v0.7-stage2")
AURAFLOW = {"double_layers.0.attn.w1q.weight": (3072, 3072), "cond_seq_linear.weight": (3072, 2048)}


def attends(width: int) -> dict[str, tuple[int, ...]]:
    return {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, width)}


DENOISERS = {
    "sd 1": ({**UNET, **attends(768)}, "sd1x", ("1.5", "dreamshaper", "1.4")),
    "sd 2": ({**UNET, **attends(1024)}, "sd2x", ()),
    "sdxl": ({**UNET, **attends(2048), "label_emb.0.0.weight": (1280, 2816)}, "sdxl", ("base-1.0", "base-0.9")),
    "sdxl refiner": ({**UNET, **attends(1280), "label_emb.0.0.weight": (1536, 2560)}, "sdxl", ("refiner-1.0", "refiner-0.9")),
    "flux schnell": (FLUX, "flux", ("schnell", "libreflux", "fluxbooru")),
    "flux dev": ({**FLUX, "guidance_in.in_layer.weight": (3072, 256)}, "flux", ("dev", "krea", "fluxbooru")),
    "flux 2": ({"single_stream_modulation.lin.weight": (18432, 6144), **FLUX}, "flux2", ("dev",)),
    "flux 2 klein": ({"single_stream_modulation.lin.weight": (9216, 3072), **FLUX}, "flux2", ("klein-4b", "klein-4b-distilled")),
    "chroma": ({"distilled_guidance_layer.in_proj.bias": (5120,), **FLUX}, "chroma", ()),
    "sd 3": ({**SD3, "pos_embed": (1, 36864, 1536)}, "sd3", ("3.0-medium",)),
    "sd 3.5 medium": ({**SD3, "pos_embed": (1, 147456, 1536)}, "sd3", ("medium",)),
    "sd 3.5 large": ({**SD3, "pos_embed": (1, 36864, 2432), "joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432)}, "sd3", ("large",)),
    "auraflow 0.2": ({**AURAFLOW, "positional_encoding": (1, 1024, 3072)}, "auraflow", ("v0.2", "v0.1", "pony")),
    "auraflow 0.3": ({**AURAFLOW, "positional_encoding": (1, 9216, 3072)}, "auraflow", ("v0.3", "pony")),
    "z-image": ({"layers.0.adaLN_modulation.0.weight": (15360, 256), "cap_embedder.0.weight": (2560,)}, "z_image", ()),
    "sana 0.6b": ({**SANA, "x_embedder.proj.weight": (1152, 32, 1, 1)}, "sana", ("sana1.0-600m-1024", "sana1.0-600m-512")),
    "sana 4.8b": ({**SANA, "x_embedder.proj.weight": (2240, 32, 1, 1), "blocks.59.attn.qkv.weight": (6720, 2240)}, "sana", ("sana1.5-4.8b-1024",)),
    "sana 1.5": ({**SANA, "x_embedder.proj.weight": (2240, 32, 1, 1), "blocks.0.attn.q_norm.weight": (2240,)}, "sana", ("sana1.5-1.6b-1024",)),
    "pixart": (PIXART, "pixart", ("600m-1024", "600m-512", "600m-2048")),
    "pixart 0.9b": ({**PIXART, "blocks.28.mlp.fc1.weight": (4608, 1152)}, "pixart", PIXART_900M),
    "pixart of diffusers": (
        {"pos_embed.proj.weight": (1152, 4, 2, 2), "adaln_single.linear.weight": (6912, 1152), "transformer_blocks.28.attn1.to_q.weight": (1, 1)},
        "pixart",
        PIXART_900M,
    ),
    "lumina 2": ({"layers.0.adaLN_modulation.1.weight": (9216, 1024), "cap_embedder.0.weight": (2304,)}, "lumina2", ()),
}


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_denoiser_is_known_alone_and_in_a_whole_model(name, prefix):
    names, family, flavours = DENOISERS[name]
    whole = {f"{prefix}{key}": shape for key, shape in names.items()}
    beside = {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)} if prefix else {}

    file = Checkpoint(Path(), "", {**whole, **beside}, {})

    assert file.kind.family == family
    assert tuple(family_of(family).flavours_of(file.denoiser)) == flavours


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"], "an adapter"),
        (["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "an adapter"),
        (["lycoris_x.lokr_w1", "lycoris_x.lokr_w2_a"], "an adapter"),
        (["first_stage_model.encoder.conv_in.weight"], "a VAE"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "a VAE"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "a text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder"),
        (["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"], "a text encoder"),
        (["clip_g", "clip_l"], "a textual inversion"),
        (["emb_params"], "a textual inversion"),
        (["control_model.time_embed.0.weight"], "a ControlNet"),
        (["something.weight"], "no checkpoint"),
        ([], "no checkpoint"),
    ],
)
def test_what_is_no_model_is_named(names, title):
    kind = recognise(dict.fromkeys(names, (4, 4)))

    assert kind.title.startswith(title) and kind.family is None


@pytest.mark.parametrize(("channels", "title"), [(9, "an inpainting model"), (8, "a model that edits pictures"), (5, "a model that is told depths")])
def test_a_u_net_that_is_told_more_than_text_is_named(channels, title):
    kind = recognise({"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3)})

    assert kind.title.startswith(title) and kind.family is None


def test_playground_is_told_from_sdxl_by_its_own_objective():
    names = DENOISERS["sdxl"][0]

    assert "EDM" in recognise({**names, "edm_mean": (4,)}).title


def test_scales_beside_the_weights_are_seen():
    assert is_quantised({"model.diffusion_model.scaled_fp8": (2,)}) and is_quantised({"a.weight": (4,), "a.weight.absmax": (4,)})
    assert not is_quantised({"a.weight": (4, 4), "first_stage_model.scale": (1,), "norm.key_norm.scale": (4,)})


def test_what_a_training_leaves_beside_a_model_is_told_from_what_a_model_needs():
    left = ("model_ema.diffusion_modelout2bias", "alphas_cumprod", "optimizer.state.0", "loss.logvar", "cond_stage_model.x.position_ids", "v_pred")

    assert all(is_idle(name) for name in left)
    assert not any(is_idle(name) for name in ("single_blocks.38.linear1.weight", "text_encoders.clip_l.x", "lossless.weight", "img_in.weight"))
