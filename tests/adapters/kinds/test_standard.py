"""Plain LoRA: its files, its precision, its starts."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from simpletuner.adapters.adapter import ADAPTER_FILE, Targets
from simpletuner.adapters.kinds.standard import Standard
from simpletuner.errors import ConfigError
from simpletuner.options.adapters import Adapters

VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 1.5, "lora_rank": 3},
    "gaussian": {"lora_init_type": "gaussian"},
    "dora": {"use_dora": True},
    "pissa": {"lora_init_type": "pissa", "lora_alpha": 8.0},
    "olora": {"lora_init_type": "olora"},
}


def make(make_adapter, **options):
    return make_adapter(**{"lora_rank": 4, **options})


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_diffusers_loads_the_file_with_nothing_unused_and_answers_the_same(variant, make_denoiser, make_adapter, run, perturb, tmp_path, caplog):
    from diffusers import AuraFlowPipeline

    denoiser, adapter, plain = make_denoiser(), make(make_adapter, **variant), make_denoiser()
    adapter.attach(denoiser)
    perturb(adapter)
    adapter.save(tmp_path, {"step": "3"})
    pipeline = AuraFlowPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=plain, scheduler=None)

    pipeline.load_lora_weights(str(tmp_path), weight_name=ADAPTER_FILE)

    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        names = set(file.keys())
    loaded = {name.replace(".default_0", "") for name in plain.state_dict() if "lora_" in name}
    assert {name.removeprefix("transformer.").removesuffix(".weight") for name in names} == {name.removesuffix(".weight") for name in loaded}
    base = run(make_denoiser())
    effect = run(denoiser) - base
    assert effect.abs().max() > 1e-2
    assert relative_error(run(plain) - base, effect) < 1e-3
    assert not [record for record in caplog.records if "unexpected" in record.message.lower() or "missing" in record.message.lower()]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saving_and_loading_gives_every_parameter_back_bit_for_bit(variant, make_denoiser, make_adapter, run, perturb, tmp_path):
    denoiser, adapter = make_denoiser(), make(make_adapter, **variant)
    torch.manual_seed(1)
    adapter.attach(denoiser)
    perturb(adapter)
    other, again = make_denoiser(), make(make_adapter, **variant)
    torch.manual_seed(2)
    again.attach(other)

    adapter.save(tmp_path, {})
    again.load(tmp_path)

    assert all(torch.equal(value, again.tensors()[name]) for name, value in adapter.tensors().items())
    assert run(denoiser).equal(run(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_it_starts_at_the_base_and_strength_0_is_the_base_bit_for_bit(variant, dtype, make_denoiser, make_adapter, run, perturb):
    denoiser, adapter = make_denoiser(dtype), make(make_adapter, **variant)
    base = run(make_denoiser(dtype))
    adapter.attach(denoiser)
    start = run(denoiser)
    perturb(adapter)
    adapted = run(denoiser)

    adapter.set_strength(0)

    assert relative_error(start, base) < (1e-4 if dtype == torch.float32 else 0.05)
    assert run(denoiser).view(torch.uint8).equal(base.view(torch.uint8))
    adapter.set_strength(1)
    assert run(denoiser).equal(adapted) and not adapted.equal(base)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_16_bit_base_gets_float32_parameters_and_gradients_and_answers_in_16_bits(variant, make_denoiser, make_adapter, run, perturb):
    denoiser, adapter = make_denoiser(torch.bfloat16), make(make_adapter, **variant)
    adapter.attach(denoiser)
    perturb(adapter)

    answer = run(denoiser)
    answer.float().square().mean().backward()

    assert answer.dtype == torch.bfloat16
    for name, parameter in adapter.parameters().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


def test_products_are_taken_in_the_inputs_dtype(make_denoiser, make_adapter):
    """PEFT alone would keep a float32 copy of every input for the backward pass."""
    denoiser, adapter = make_denoiser(torch.bfloat16), make(make_adapter)
    adapter.attach(denoiser)
    layer, x = denoiser.single_transformer_blocks[0].attn.to_q, torch.randn(33, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        answer = layer(x)

    assert {tensor.dtype for tensor in kept if len(tensor) == 33} == {answer.dtype} == {torch.bfloat16}


def test_gradients_are_those_of_the_low_rank_product_in_float64(make_denoiser, make_adapter):
    denoiser, adapter = make_denoiser(), make(make_adapter, lora_alpha=6.0)
    adapter.attach(denoiser)
    layer = denoiser.single_transformer_blocks[0].attn.to_q.double()
    down, up = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    up.data.normal_()
    x = torch.randn(7, 64, dtype=torch.float64)

    layer(x).square().sum().backward()

    mirror = [matrix.detach().clone().requires_grad_() for matrix in (down, up)]
    (x @ (layer.base_layer.weight + 6.0 / 4 * mirror[1] @ mirror[0]).T).square().sum().backward()
    torch.testing.assert_close(down.grad, mirror[0].grad, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(up.grad, mirror[1].grad, rtol=1e-10, atol=1e-8)


def test_targets_are_the_familys_or_the_users(make_denoiser, make_adapter):
    attached = make(make_adapter).attach(make_denoiser())
    own = make(make_adapter, peft_lora_target_modules=["ff.linear_1"])
    own_attached = own.attach(make_denoiser())

    assert (attached.modules, own_attached.modules) == (9, 2)
    assert attached.parameters == 9 * 2 * 4 * 64
    assert all("ff.linear_1" in name for name in own.parameters())


def test_a_target_of_the_user_that_matches_nothing_is_refused(make_denoiser, make_adapter):
    adapter = make(make_adapter, peft_lora_target_modules=["to_q", "to_kk"])

    with pytest.raises(ConfigError, match="'to_kk'") as error:
        adapter.attach(make_denoiser())

    assert "attn.to_k" in error.value.hint


def test_starts_that_need_the_bases_weights_exclude_decomposition(make_denoiser, make_adapter):
    with pytest.raises(ConfigError, match="use_dora"):
        make(make_adapter, use_dora=True, lora_init_type="pissa").attach(make_denoiser())


def test_pissa_starts_from_the_largest_part_of_the_weight(make_denoiser, make_adapter):
    denoiser, adapter = make_denoiser(), make(make_adapter, lora_init_type="pissa")
    weight = denoiser.single_transformer_blocks[0].attn.to_q.weight.detach().clone()

    adapter.attach(denoiser)

    part = adapter.tensors()
    name = "single_transformer_blocks.0.attn.to_q"
    u, s, v = torch.linalg.svd(weight.double())
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    torch.testing.assert_close((part[f"{name}.lora_B.weight"] @ part[f"{name}.lora_A.weight"]).double(), best, rtol=1e-3, atol=1e-4)


def test_the_snippet_is_python(make_adapter):
    text = make(make_adapter).snippet("AuraFlowPipeline", "some/base", {"prompt": "seven", "num_inference_steps": 30}, "output")

    compile(text, "snippet", "exec")
    assert "load_lora_weights('output')" in text


@pytest.mark.parametrize(("name", "modules"), [("context", 3), (None, 2)])
def test_a_set_of_targets_is_chosen_by_its_name(name, modules, make_denoiser):
    targets = Targets(suffixes=("to_q",), presets={"context": ("add_q_proj", "add_k_proj", "add_v_proj")})

    attached = Standard(Adapters(flux_lora_target=name), targets).attach(make_denoiser())

    assert attached.modules == modules


def test_a_set_of_targets_that_is_not_there_is_refused_with_those_that_are(make_denoiser):
    targets = Targets(suffixes=("to_q",), presets={"context": ("add_q_proj",), "all": ("to_q",)})

    with pytest.raises(ConfigError, match="flux_lora_target 'contxt' is unknown") as refused:
        Standard(Adapters(flux_lora_target="contxt"), targets).attach(make_denoiser())
    with pytest.raises(ConfigError, match="this family has no sets of targets"):
        Standard(Adapters(flux_lora_target="all"), Targets(suffixes=("to_q",))).attach(make_denoiser())

    assert "did you mean 'context'?" in refused.value.hint
