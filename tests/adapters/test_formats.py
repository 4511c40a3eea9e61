"""The layouts of adapter files: what is written under which name, and read back."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from simpletuner.adapters.changes import changed_weight, scale_of
from simpletuner.adapters.formats import comfyui, diffusers, kohya, lycoris
from simpletuner.adapters.key_maps import Layout, all_names
from simpletuner.adapters.reading import group, read_changes, split, take_apart
from simpletuner.adapters.targets import layout_of
from simpletuner.errors import ConfigError

BLOCK = "transformer_blocks.0."
SINGLE = "single_transformer_blocks.0."


def flux(width: int = 128) -> Layout:
    """The layers of a Flux of two blocks."""
    with torch.device("meta"):
        heads = {"num_attention_heads": width // 128, "attention_head_dim": 128}
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, in_channels=8, joint_attention_dim=8, pooled_projection_dim=8, **heads)
    return layout_of(model, "transformer", "flux")


def lora(layout: Layout, layers: list[str], rank: int = 2, alpha: float | None = None) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for layer in layers:
        outputs, inputs = layout.shapes[layer]
        up, down = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
        changes[layer] = {"lora_up.weight": up, "lora_down.weight": down, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}
    return changes


def product(parts) -> torch.Tensor:
    return scale_of(parts) * parts["lora_up.weight"] @ parts["lora_down.weight"]


def read_back(tensors, layout: Layout):
    groups, unused = group(tensors, all_names(layout))
    assert not unused
    return {layer: own for name, parts in groups.items() for layer, own in split(name, parts, all_names(layout)[name], layout).items()}


def test_diffusers_own_conversion_of_a_flux_file_of_kohya_gives_every_layer_its_change_back():
    layout = flux(3072)  # which the conversion takes for granted
    names = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")]
    layers = [*(BLOCK + name for name in (*names, "ff.net.2")), *(SINGLE + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))]
    changes = lora(layout, [*layers, SINGLE + "proj_out"], rank=1, alpha=0.5)

    found = _convert_kohya_flux_lora_to_diffusers(kohya.write(changes, layout))

    assert {key.split(".lora_")[0] for key in found} == {f"transformer.{layer}" for layer in changes}
    for layer, parts in changes.items():
        name = f"transformer.{layer}"
        x = torch.ones(layout.shapes[layer][1])
        theirs = found[f"{name}.lora_B.weight"] @ (found[f"{name}.lora_A.weight"] @ x)
        torch.testing.assert_close(theirs, 0.5 * parts["lora_up.weight"] @ (parts["lora_down.weight"] @ x), rtol=1e-4, atol=1e-5)


@given(
    adapted=st.sets(st.sampled_from(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]), min_size=1),
    rank=st.integers(1, 3),
    alpha=st.sampled_from([None, 1.0, 5.0]),
)
def test_parts_of_a_fused_layer_come_back_from_kohyas_layout_in_their_own_rank(adapted, rank, alpha):
    layout = flux()
    changes = lora(layout, [SINGLE + name for name in sorted(adapted)], rank, alpha)

    tensors = kohya.write(changes, layout)

    found = read_back(tensors, layout)
    assert {key.split(".")[0] for key in tensors} == {"lora_unet_single_blocks_0_linear1"}
    assert found.keys() == changes.keys()
    for layer, parts in changes.items():
        assert found[layer]["lora_down.weight"].shape == parts["lora_down.weight"].shape
        torch.testing.assert_close(product(found[layer]), product(parts))


def test_one_lora_of_a_fused_layer_keeps_its_whole_rank_in_each_part():
    layout = flux()
    parts = {"lora_up.weight": torch.randn(384, 3), "lora_down.weight": torch.randn(3, 128)}

    found = split("qkv", parts, [BLOCK + f"attn.to_{name}" for name in "qkv"], layout)

    assert {own["lora_down.weight"].shape[0] for own in found.values()} == {3}
    assert torch.equal(torch.cat([product(own) for own in found.values()]), product(parts))


def test_a_lokr_of_a_fused_layer_is_refused_with_a_way_out():
    layout = flux()

    with pytest.raises(ConfigError, match=r"cannot be divided among them") as refused:
        split("qkv", {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(192, 64)}, [BLOCK + f"attn.to_{name}" for name in "qkv"], layout)

    assert "merge" in refused.value.hint


def test_each_format_has_its_names():
    layout, layer, fused = flux(), BLOCK + "ff.net.2", BLOCK + "attn.to_q"
    changes = lora(layout, [layer, fused], alpha=2.0)

    keys = {name: set(writer.write(changes, layout)) for name, writer in (("d", diffusers), ("k", kohya), ("c", comfyui), ("l", lycoris))}

    assert keys["d"] == {f"transformer.{name}.lora_{end}.weight" for name in (layer, fused) for end in "AB"}
    parts = ("lora_up.weight", "lora_down.weight", "alpha")
    assert keys["k"] == {f"lora_unet_double_blocks_0_{name}.{part}" for name in ("img_mlp_2", "img_attn_qkv") for part in parts}
    assert keys["c"] == {f"{name}.{part}" for name in ("diffusion_model.double_blocks.0.img_mlp.2", f"transformer.{fused}") for part in parts}
    assert keys["l"] == {f"lycoris_{name.replace('.', '_')}.{part}" for name in (layer, fused) for part in parts}


def test_comfyui_gets_the_bias_of_a_fused_layer_whole_because_it_loses_that_of_a_part(tmp_path):
    layout = flux()
    names = [BLOCK + "attn.to_q", BLOCK + "attn.to_v", BLOCK + "ff.net.2"]
    changes = {name: {"diff": torch.randn(layout.shapes[name]), "diff_b": torch.randn(layout.shapes[name][0])} for name in names}

    tensors = comfyui.write(changes, layout)

    bias = tensors["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"]
    assert torch.equal(bias, torch.cat([changes[names[0]]["diff_b"], torch.zeros(128), changes[names[1]]["diff_b"]]))
    assert sorted(key for key in tensors if key.endswith("diff_b")) == [
        f"diffusion_model.double_blocks.0.img_{name}.diff_b" for name in ("attn.qkv", "mlp.2")
    ]
    assert comfyui.ignored([f"transformer.{names[0]}.diff_b", f"transformer.{names[2]}.diff_b", *tensors], layout) == [
        f"transformer.{names[0]}.diff_b"
    ]
    save_file(tensors, tmp_path / "file.safetensors")
    found = read_changes(tmp_path / "file.safetensors", layout, "Flux")
    assert found.keys() == changes.keys()
    assert all(torch.equal(found[name][part], value) for name in names for part, value in changes[name].items())


def test_whole_changes_of_all_parts_of_a_fused_layer_are_one_in_kohyas_layout():
    layout = flux()
    names = [BLOCK + f"attn.to_{name}" for name in "qkv"]
    changes = {name: {"diff": torch.randn(128, 128), "diff_b": torch.randn(128)} for name in names}

    tensors = kohya.write(changes, layout)

    found = read_back(tensors, layout)
    assert {key.split(".")[0] for key in tensors} == {"lora_unet_double_blocks_0_img_attn_qkv"}
    assert all(torch.equal(found[name][part], value) for name in names for part, value in changes[name].items())
    with pytest.raises(ConfigError, match="full of the parts is no full of the whole, unless all of them have it"):
        kohya.write({name: changes[name] for name in names[:2]}, layout)


def test_comfyui_finds_lumina_2_by_its_makers_names_alone():
    layout = Layout("transformer", "lumina2", {f"layers.0.attn.to_{name}": (rows, 8) for name, rows in (("q", 8), ("k", 4), ("v", 4))})
    changes = lora(layout, list(layout.shapes))

    assert {key.rsplit(".", 2)[0] for key in comfyui.write(changes, layout)} == {
        "diffusion_model.layers.0.attention.qkv",
        "diffusion_model.layers.0.attention",
    }
    with pytest.raises(ConfigError, match=r"format comfyui cannot hold lokr of layers\.0\.attn\.to_k"):
        comfyui.write({"layers.0.attn.to_k": {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 4)}}, layout)


def test_only_the_last_block_of_sd3_has_its_text_side_in_another_order():
    shapes = {f"transformer_blocks.{number}.norm1_context.linear": (rows, 8) for number, rows in ((0, 48), (11, 16))}
    layout = Layout("transformer", "sd3", shapes)
    first, last = layout.shapes

    assert "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1.lora_up.weight" in kohya.write(lora(layout, [first]), layout)
    assert "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_up.weight" in comfyui.write(lora(layout, [first]), layout)
    assert f"transformer.{last}.lora_up.weight" in comfyui.write(lora(layout, [last]), layout)  # ComfyUI exchanges its halves
    with pytest.raises(ConfigError, match=r"format kohya has no place for transformer_blocks\.11"):
        kohya.write(lora(layout, [last]), layout)


def test_diffusers_converts_kohyas_names_of_qwen_image_and_z_image():
    with torch.device("meta"):
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
        qwen = QwenImageTransformer2DModel(num_layers=1, in_channels=4, out_channels=4, joint_attention_dim=8, **heads)
        sizes = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8]}
        z_image = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1, **sizes)
    for name, model, convert in (
        ("qwen_image", qwen, _convert_non_diffusers_qwen_lora_to_diffusers),
        ("z_image", z_image, _convert_non_diffusers_z_image_lora_to_diffusers),
    ):
        layout = layout_of(model, "transformer", name)
        changes = lora(layout, list(layout.shapes), alpha=1.0)

        found = convert(kohya.write(changes, layout))

        assert {key.split(".lora_")[0] for key in found} == {f"transformer.{layer}" for layer in changes}
        for layer, parts in changes.items():
            theirs = found[f"transformer.{layer}.lora_B.weight"] @ found[f"transformer.{layer}.lora_A.weight"]
            torch.testing.assert_close(theirs, product(parts))


@pytest.mark.parametrize("writer", [kohya, comfyui])
def test_a_model_without_known_original_names_has_formats_left(writer):
    layout = Layout("transformer", None, {"a": (2, 2)})

    with pytest.raises(ConfigError, match="its readers load no adapters of this model") as refused:
        writer.write(lora(layout, ["a"]), layout)

    assert "diffusers" in refused.value.hint and "lycoris" in refused.value.hint


def test_layers_whose_rows_lie_in_another_order_there_are_refused_by_kohya_and_found_by_comfyui():
    layout = flux()
    changes = lora(layout, ["norm_out.linear"])

    with pytest.raises(ConfigError, match=r"no place for norm_out\.linear"):
        kohya.write(changes, layout)

    assert "transformer.norm_out.linear.lora_up.weight" in comfyui.write(changes, layout)


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        ("transformer.a.0.lora_A.weight", "transformer.a.0", "lora_A.weight"),
        ("lora_unet_a_0.lora_down.weight", "lora_unet_a_0", "lora_down.weight"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", "unet.a.attn1.to_q", "lora.up.weight"),
        ("unet.a.attn1.processor.to_out_lora.down.weight", "unet.a.attn1.to_out.0", "lora.down.weight"),
        ("a.lokr_w1", "a", "lokr_w1"),
        ("a.bias", "a.bias", ""),
    ],
)
def test_keys_come_apart_whoever_wrote_them(key, layer, part):
    assert take_apart(key) == (layer, part)


def test_dora_makes_rows_of_the_length_that_it_says():
    weight, length = torch.randn(6, 4), torch.rand(6, 1) + 0.5

    after = changed_weight(weight, {"lora_up.weight": torch.randn(6, 2), "lora_down.weight": torch.randn(2, 4), "dora_scale": length})

    torch.testing.assert_close(after.norm(dim=1, keepdim=True), length)
