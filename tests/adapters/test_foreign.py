"""Files that other tools wrote: PEFT's own, LyCORIS with lengths of columns, alphas of any type, and files for another base."""

from __future__ import annotations

import json

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from simpletuner.adapters.applying import apply_changes
from simpletuner.adapters.changes import changed_weight
from simpletuner.adapters.formats import comfyui, diffusers, lycoris
from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.errors import ConfigError

TARGETS = ["to_q", "to_v", "linear_1"]
PATTERNS = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {r"single_transformer_blocks\.0\.attn\.to_q": 12.0}}
OF_PEFT = {
    "alpha": LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "patterns": LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, **PATTERNS),
    "by the root of the rank": LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_rslora=True, **PATTERNS),
    "dora": LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, use_dora=True),
    "lokr": LoKrConfig(r=2, alpha=5, target_modules=TARGETS),
    "lokr of whole factors": LoKrConfig(r=64, alpha=5, target_modules=TARGETS),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=TARGETS, rank_pattern={"to_v": 2}),
}


def moved(model: nn.Module) -> nn.Module:
    """The same model with all that is trained moved away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("config", OF_PEFT.values(), ids=OF_PEFT)
@torch.no_grad()
def test_a_folder_of_peft_and_the_file_in_it_are_read_with_the_scales_that_its_settings_say(config, make_denoiser, run, tmp_path):
    base, trained = run(make_denoiser()), moved(get_peft_model(make_denoiser(), config))
    expected = run(trained) - base
    trained.save_pretrained(tmp_path)
    denoiser = make_denoiser()
    layout = layout_of(denoiser, "transformer", "auraflow")

    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        fresh = make_denoiser()
        apply_changes(fresh, read_changes(place, layout, "AuraFlow"))
        assert (run(fresh) - base - expected).abs().max() < 1e-4 * expected.abs().max()


def test_settings_in_the_header_count_as_those_beside_the_file(tmp_path):
    layout = Layout("transformer", None, {"a.to_q": (6, 4), "b.to_q": (6, 4)})
    tensors = {f"transformer.{layer}.{part}": torch.randn(shape) for layer in layout.shapes for part, shape in LORA.items()}
    said = {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.alpha_pattern": {"^b.to_q": 5}, "transformer.use_rslora": True}
    save_file(tensors, tmp_path / "file.safetensors", {"lora_adapter_metadata": json.dumps({**said, "text_encoder.lora_alpha": 9})})

    changes = read_changes(tmp_path / "file.safetensors", layout, "a model")

    assert {layer: round(float(parts["alpha"]) / 2**0.5, 5) for layer, parts in changes.items()} == {"a.to_q": 3.0, "b.to_q": 5.0}


LORA = {"lora_A.weight": (2, 4), "lora_B.weight": (6, 2)}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"peft_type": "OFT", "r": 4}, "of kind OFT; those that are read here are LORA, LOHA, LOKR"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4", "lora_alpha": 4}, "pissa_niter_4 took a part out of the base"),
        ("{", "cannot be read"),
        ("[]", r"holds no settings, but \[\]"),
        ({"peft_type": "LOKR", "alpha": 4}, "cannot be used: r is missing"),
        ({"peft_type": "LOKR", "alpha": 4, "r": 2, "rank_pattern": {"a": 0}}, "rank_pattern of 'a' is 0, not above 0"),
        ({"lora_alpha": "x", "alpha_pattern": ["a"]}, r'alpha_pattern is \["a"\], not numbers by .*; lora_alpha is "x"'),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 1, "a": None}}, r"'a' is missing; alpha_pattern of '\(' is by no regular expression"),
    ],
)
def test_settings_of_peft_that_would_be_read_wrongly_are_refused(tmp_path, said, expected):
    layout = Layout("transformer", None, {"a": (6, 4)})
    save_file({f"base_model.model.a.{part}": torch.randn(shape) for part, shape in LORA.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(said if isinstance(said, str) else json.dumps(said))

    with pytest.raises(ConfigError, match=r"adapter_config\.json.*" + expected):
        read_changes(tmp_path, layout, "a model")


@pytest.mark.parametrize("by_outputs", [True, False])
def test_dora_of_lycoris_is_of_rows_or_of_columns_also_where_a_layer_is_square(by_outputs, tmp_path):
    linear = nn.Linear(6, 6, bias=False)
    module = LoConModule("layer", linear, 1.0, 2, 3.0, weight_decompose=True, wd_on_out=by_outputs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    layout = Layout("transformer", None, {"a": (6, 6)})
    save_file({f"lycoris_a.{name}": value.contiguous() for name, value in module.state_dict().items()}, tmp_path / "file.safetensors")

    changes = read_changes(tmp_path / "file.safetensors", layout, "a model")

    expected = module.get_merged_weight(1.0)[0].detach() if by_outputs else module.apply_weight_decompose(linear.weight + module.get_diff_weight()[0])
    torch.testing.assert_close(changed_weight(linear.weight.detach(), changes["a"]), expected.detach())
    for writer in (diffusers, lycoris):
        if not by_outputs:
            with pytest.raises(ConfigError, match=r"DoRA over inputs \(wd_on_out false\)"):
                writer.write(changes, layout)


@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3.0).half()])
def test_an_alpha_of_any_type_is_read_and_written_as_a_number(alpha, tmp_path):
    layout = Layout("transformer", "auraflow", {"joint_transformer_blocks.0.attn.to_q": (6, 4)})
    tensors = {"lora_down.weight": torch.randn(2, 4), "lora_up.weight": torch.randn(6, 2), "alpha": alpha}
    save_file({f"lora_unet_double_layers_0_attn_w2q.{part}": value for part, value in tensors.items()}, tmp_path / "file.safetensors")

    changes = read_changes(tmp_path / "file.safetensors", layout, "a model")

    written = comfyui.write(changes, layout)["diffusion_model.double_layers.0.attn.w2q.alpha"]
    assert (written.dtype, written.shape, float(written)) == (torch.float32, torch.Size([]), 3.0)


SMALL = {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}
OF_OTHER_SHAPES = {
    "another width": ({"lora_down.weight": (2, 8), "lora_up.weight": (12, 2)}, "12 rows and 8 columns, and the layer has 6 and 4"),
    "sides exchanged": ({"lora_down.weight": (2, 6), "lora_up.weight": (4, 2)}, "4 rows and 6 columns"),
    "two ranks": ({"lora_down.weight": (3, 4), "lora_up.weight": (6, 2)}, "do not fit each other"),
    "half of it": ({"lora_down.weight": (2, 4)}, r"lora_up\.weight is missing"),
    "short lengths": ({**SMALL, "dora_scale": (5,)}, "dora_scale has 5 numbers where the layer needs 6"),
    "two alphas": ({**SMALL, "alpha": (2,)}, "alpha has 2 numbers where the layer needs 1"),
    "lokr": ({"lokr_w1": (2, 2), "lokr_w2": (3, 4)}, "6 rows and 8 columns"),
    "loha": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, "6 rows and 5 columns"),
    "oft": ({"oft_blocks": (3, 3, 3)}, "9 rows and 4 columns"),
    "full": ({"diff": (6, 5)}, "6 rows and 5 columns"),
    "only an alpha": ({"alpha": ()}, "no tensors of a known kind"),
}


@pytest.mark.parametrize(("shapes", "said"), OF_OTHER_SHAPES.values(), ids=OF_OTHER_SHAPES)
def test_tensors_of_other_shapes_than_the_layers_are_refused_with_both(shapes, said, tmp_path):
    layout = Layout("transformer", None, {"block.to_q": (6, 4), "block.to_k": (6, 4)})
    tensors = {f"lycoris_block_to_{name}.{part}": torch.ones(shape) for name in "qk" for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "file.safetensors", {"base_model": "another/base"})

    with pytest.raises(ConfigError, match=rf"file\.safetensors is for another base than a model: .*{said}") as refused:
        read_changes(tmp_path / "file.safetensors", layout, "a model")

    part = sorted(shapes)[0]
    assert f"lycoris_block_to_k.{part} {list(shapes[part])}" in refused.value.message
    assert "In the model: block.to_k, [6, 4]. In all, 2 layers do not fit. The file says that it is for another/base" in refused.value.message
