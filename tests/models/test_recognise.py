"""What a file is, by the names that published files of each kind have."""

from __future__ import annotations

import pytest

from simpletuner.models.recognise import is_quantised, recognise

UNET = {"input_blocks.0.0.weight": (320, 4, 3, 3)}
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "single_blocks.0.linear1.weight": (21504, 3072)}
SD3 = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)}
AURAFLOW = {"double_layers.0.attn.w1q.weight": (3072, 3072), "cond_seq_linear.weight": (3072, 2048)}


def attends(width: int) -> dict[str, tuple[int, ...]]:
    return {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, width)}


DENOISERS = {
    "sd 1": ({**UNET, **attends(768)}, "sd1x", "1.5"),
    "sd 2": ({**UNET, **attends(1024)}, "sd2x", "2.1"),
    "sdxl": ({**UNET, **attends(2048), "label_emb.0.0.weight": (1280, 2816)}, "sdxl", "base-1.0"),
    "flux schnell": (FLUX, "flux", "schnell"),
    "flux dev": ({**FLUX, "guidance_in.in_layer.weight": (3072, 256)}, "flux", "dev"),
    "flux 2": ({"single_stream_modulation.lin.weight": (18432, 6144), **FLUX}, "flux2", "dev"),
    "flux 2 klein": ({"single_stream_modulation.lin.weight": (9216, 3072), **FLUX}, "flux2", "klein-4b"),
    "chroma": ({"distilled_guidance_layer.in_proj.bias": (5120,), **FLUX}, "chroma", None),
    "sd 3": ({**SD3, "pos_embed": (1, 36864, 1536)}, "sd3", "3.0-medium"),
    "sd 3.5 medium": ({**SD3, "pos_embed": (1, 147456, 1536)}, "sd3", "medium"),
    "sd 3.5 large": ({**SD3, "pos_embed": (1, 36864, 2432), "joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432)}, "sd3", "large"),
    "auraflow 0.2": ({**AURAFLOW, "positional_encoding": (1, 1024, 3072)}, "auraflow", "v0.2"),
    "auraflow 0.3": ({**AURAFLOW, "positional_encoding": (1, 9216, 3072)}, "auraflow", "v0.3"),
    "z-image": ({"layers.0.adaLN_modulation.0.weight": (15360, 256), "cap_embedder.0.weight": (2560,)}, "z_image", None),
    "lumina 2": ({"layers.0.adaLN_modulation.1.weight": (9216, 1024), "cap_embedder.0.weight": (2304,)}, "lumina2", None),
}


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_denoiser_is_known_alone_and_in_a_whole_model(name, prefix):
    names, family, flavour = DENOISERS[name]
    whole = {f"{prefix}{key}": shape for key, shape in names.items()}
    beside = {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)} if prefix else {}

    kind = recognise({**whole, **beside})

    assert (kind.family, kind.flavour) == (family, flavour)


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


def test_the_refiner_is_told_from_the_base():
    kind = recognise({**UNET, **attends(1280), "label_emb.0.0.weight": (1536, 2560)})

    assert "refiner" in kind.title and kind.family is None and "base model" in kind.hint


def test_playground_is_told_from_sdxl_by_its_own_objective():
    names = DENOISERS["sdxl"][0]

    assert "EDM" in recognise({**names, "edm_mean": (4,)}).title


def test_scales_beside_the_weights_are_seen():
    assert is_quantised({"model.diffusion_model.scaled_fp8": (2,)}) and is_quantised({"a.weight": (4,), "a.weight.absmax": (4,)})
    assert not is_quantised({"a.weight": (4, 4), "first_stage_model.scale": (1,), "norm.key_norm.scale": (4,)})
