"""The LyCORIS kind: its function, its precision, its files."""

from __future__ import annotations

import json

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from simpletuner.adapters.adapter import ADAPTER_FILE, Targets
from simpletuner.errors import ConfigError

ATTENTION = {"target_module": ["Attention"]}
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "apply_preset": ATTENTION}
LOW_RANK_LOKR = {**LOKR, "linear_dim": 4, "linear_alpha": 1.5}
QUICKSTART = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 8}}},
}
RECIPES = {
    "lokr": LOKR,
    "lokr factor 16": {**LOKR, "factor": 16},
    "lokr square": {**LOKR, "factor": -1},
    "lokr rank 4": LOW_RANK_LOKR,
    "lokr rank 2, both": {**LOKR, "linear_dim": 2, "linear_alpha": 2, "factor": 16, "decompose_both": True},
    "lokr per class": {**LOKR, "apply_preset": {"target_module": ["Attention", "FeedForward"], "module_algo_map": {"FeedForward": {"factor": 8}}}},
    "lokr, rank-stabilised": {**LOW_RANK_LOKR, "rs_lora": True},
    "lokr, materialised": {**LOW_RANK_LOKR, "bypass_mode": False},
    "lokr, decomposed": {**LOW_RANK_LOKR, "weight_decompose": True},
    "lora": {"algo": "lora", "linear_dim": 4, "linear_alpha": 3, "apply_preset": ATTENTION},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 1, "apply_preset": ATTENTION},
    "glora": {"algo": "glora", "linear_dim": 4, "linear_alpha": 1, "apply_preset": ATTENTION},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "apply_preset": ATTENTION},
    "lora inside lokr": {**LOKR, "apply_preset": {**ATTENTION, "module_algo_map": {"FeedForward": {"algo": "lora", "dim": 2, "alpha": 1}}}},
}


class Attention(nn.Module):
    """One Linear in a class of a name that targets can mean."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)


class Denoiser(nn.Module):
    def __init__(self, inputs: int = 24, outputs: int = 48) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attn = Attention(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", ["apply", "merge"])
def test_the_library_loads_the_file_on_a_plain_transformer_and_answers_the_same(recipe, way, make_denoiser, make_adapter, run, perturb, tmp_path):
    trained, adapter, plain = make_denoiser(), make_adapter(recipe), make_denoiser()
    attached = adapter.attach(trained)
    perturb(adapter, 0.05)
    adapter.save(tmp_path, {})
    network, weights = create_lycoris_from_weights(1.0, str(tmp_path / ADAPTER_FILE), plain)
    base = run(make_denoiser())

    network.apply_to() if way == "apply" else network.merge_to()

    assert len(network.loras) == attached.modules
    assert {f"{lora.lora_name}.{key}" for lora in network.loras for key in lora.state_dict()} == set(weights)
    effect = run(trained) - base
    assert effect.abs().max() > 1e-3
    assert relative_error(run(plain) - base, effect) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_saving_and_loading_gives_every_parameter_back_bit_for_bit(recipe, make_denoiser, make_adapter, perturb, tmp_path):
    adapter, again = make_adapter(recipe), make_adapter(recipe)
    adapter.attach(make_denoiser())
    perturb(adapter)
    again.attach(make_denoiser())

    adapter.save(tmp_path, {})
    again.load(tmp_path)

    for name, value in adapter.tensors().items():
        assert torch.equal(again.tensors()[name], value), name


def test_the_same_weights_give_the_same_bytes(make_denoiser, make_adapter, perturb, tmp_path):
    adapter = make_adapter(LOKR)
    adapter.attach(make_denoiser())
    perturb(adapter)
    contents = set()

    for number in range(4):
        (tmp_path / str(number)).mkdir()
        adapter.save(tmp_path / str(number), {"b": "2", "a": "1", "c": "3", "d": "4"})
        contents.add((tmp_path / str(number) / ADAPTER_FILE).read_bytes())

    assert len(contents) == 1


def test_the_quickstart_file_gives_the_keys_that_other_tools_know(make_denoiser, make_adapter, tmp_path):
    adapter = make_adapter(QUICKSTART)
    attached = adapter.attach(make_denoiser())

    adapter.save(tmp_path, {"step": "20"})

    weights = load_file(tmp_path / ADAPTER_FILE)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        metadata = file.metadata()
    assert weights["lycoris_joint_transformer_blocks_0_attn_add_q_proj.lokr_w1"].shape == (8, 8)
    assert weights["lycoris_single_transformer_blocks_0_attn_to_out_0.lokr_w2"].shape == (8, 8)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert (attached.modules, len(weights)) == (12, 36)
    assert attached.modules_total > attached.modules
    assert any("linear_alpha 1 has no effect" in note for note in attached.notes)
    assert metadata["step"] == "20" and metadata["format"] == "pt"
    assert json.loads(metadata["lycoris_config"]) == json.loads((tmp_path / "lycoris_config.json").read_text())


def test_user_names_reach_the_familys_own_classes_also_in_the_algorithm_map(make_denoiser, make_adapter, tmp_path):
    recipe = {**LOKR, "apply_preset": {"target_module": ["FeedForward"], "module_algo_map": {"FeedForward": {"factor": 8}}}}
    adapter = make_adapter(recipe)

    adapter.attach(make_denoiser())

    assert all("_ff_" in name for name in adapter.parameters())
    assert {tuple(value.shape) for name, value in adapter.parameters().items() if name.endswith("w1")} == {(8, 8)}


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(make_denoiser, make_adapter):
    adapter = make_adapter({**LOKR, "apply_preset": {"target_module": ["Attentoin"]}})

    with pytest.raises(ConfigError) as error:
        adapter.attach(make_denoiser())

    assert "'Attentoin'" in error.value.message
    assert "did you mean 'Attention'" in error.value.hint
    assert "AuraFlowFeedForward" in error.value.hint and "FP32LayerNorm" not in error.value.hint


def test_a_name_pattern_that_matches_nothing_is_refused(make_denoiser, make_adapter):
    adapter = make_adapter({**LOKR, "apply_preset": {"target_name": ["to_q"]}})

    with pytest.raises(ConfigError, match="'to_q'") as error:
        adapter.attach(make_denoiser())

    assert "attn.to_q" in error.value.hint


def test_name_patterns_alone_adapt_nothing_else(make_denoiser, make_adapter):
    adapter = make_adapter({**LOKR, "apply_preset": {"target_name": ["*.to_k"], "use_fnmatch": True}})

    attached = adapter.attach(make_denoiser())

    assert attached.modules == 2
    assert all("to_k" in name for name in adapter.parameters())


def test_a_preset_does_not_leak_into_the_next_network(make_denoiser, make_adapter):
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    first = make_adapter({**LOKR, "apply_preset": {"target_module": ["FeedForward"], "name_algo_map": {".*proj_out": {"factor": 2}}}})
    first.attach(make_denoiser())

    second = make_adapter(LOKR)
    second.attach(make_denoiser())

    assert {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()} == before
    assert all("_attn_" in name for name in second.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [LOKR, {**LOW_RANK_LOKR, "weight_decompose": True}], ids=["lokr", "decomposed"])
def test_at_strength_0_the_denoiser_answers_as_the_base_bit_for_bit(dtype, recipe, make_denoiser, make_adapter, run, perturb):
    denoiser, adapter = make_denoiser(dtype), make_adapter(recipe)
    adapter.attach(denoiser)
    perturb(adapter)
    adapted = run(denoiser)

    adapter.set_strength(0)

    base = run(make_denoiser(dtype))
    assert run(denoiser).view(torch.uint8).equal(base.view(torch.uint8))
    adapter.set_strength(1)
    assert run(denoiser).equal(adapted) and not adapted.equal(base)


def test_strength_scales_the_effect():
    x, denoiser, adapter = torch.randn(3, 24), Denoiser(), attach_to_one_layer(LOKR)
    adapter.attach(denoiser)
    base = denoiser(x)
    with torch.no_grad():
        adapter.parameters()["lycoris_attn_to_q.lokr_w2"].fill_(0.3)
    full = denoiser(x) - base

    adapter.set_strength(0.25)

    torch.testing.assert_close(denoiser(x) - base, 0.25 * full, rtol=1e-4, atol=1e-5)


def test_attaching_leaves_the_denoisers_own_tree_alone(make_denoiser, make_adapter, run):
    denoiser, adapter = make_denoiser(), make_adapter(LOKR)
    keys, base = set(denoiser.state_dict()), run(denoiser)

    adapter.attach(denoiser)

    assert set(denoiser.state_dict()) == keys
    assert run(denoiser).equal(base)
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_a_16_bit_base_gets_an_adapter_in_float32_and_gradients_too(make_denoiser, make_adapter, run):
    denoiser, adapter = make_denoiser(torch.bfloat16), make_adapter(LOKR)
    adapter.attach(denoiser)

    answer = run(denoiser)
    answer.float().square().mean().backward()

    assert answer.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in adapter.parameters().values()} == {torch.float32}
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters().values())
    assert any(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters().values())


@pytest.mark.parametrize("recipe", [LOKR, LOW_RANK_LOKR, RECIPES["loha"], RECIPES["lora"]], ids=["lokr", "lokr rank 4", "loha", "lora"])
def test_the_factored_form_is_the_same_function_as_the_materialised_one(recipe, make_denoiser, make_adapter, run, perturb):
    answers = []
    for bypass in (True, False):
        denoiser, adapter = make_denoiser(), make_adapter({**recipe, "bypass_mode": bypass})
        adapter.attach(denoiser)
        perturb(adapter)
        answers.append(run(denoiser))

    assert relative_error(answers[0], answers[1]) < 1e-5


@pytest.mark.parametrize("recipe", [LOKR, LOW_RANK_LOKR], ids=["whole", "rank 4"])
def test_gradients_are_those_of_the_materialised_product_in_float64(recipe):
    denoiser, adapter = Denoiser().double(), attach_to_one_layer(recipe)
    adapter.attach(denoiser)
    factors = {name.rsplit(".", 1)[-1]: parameter for name, parameter in adapter.parameters().items()}
    for parameter in factors.values():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)

    denoiser(x).square().sum().backward()

    mirror = {name: parameter.detach().clone().requires_grad_() for name, parameter in factors.items()}
    scale = 1.0 if "lokr_w2" in mirror else 1.5 / 4
    right = mirror["lokr_w2"] if "lokr_w2" in mirror else mirror["lokr_w2_a"] @ mirror["lokr_w2_b"]
    (x @ (denoiser.attn.to_q.weight + scale * torch.kron(mirror["lokr_w1"], right)).T).square().sum().backward()
    for name, parameter in factors.items():
        torch.testing.assert_close(parameter.grad, mirror[name].grad, rtol=1e-10, atol=1e-8)


def test_the_factored_form_does_not_cancel_in_bf16():
    """1024 x 1024, factor 8, a change of 0.5 % of the weight: what each form leaves of the change, against float64."""
    errors = {}
    for bypass in (True, False):
        denoiser, adapter = Denoiser(1024, 1024), attach_to_one_layer({**LOKR, "factor": 8, "bypass_mode": bypass})
        denoiser = denoiser.bfloat16()
        adapter.attach(denoiser)
        weight = denoiser.attn.to_q.weight
        factors = {name.rsplit(".", 1)[-1]: parameter for name, parameter in adapter.parameters().items()}
        torch.manual_seed(0)
        with torch.no_grad():
            factors["lokr_w2"].normal_()
            factors["lokr_w2"].mul_(0.005 * weight.float().norm() / torch.kron(factors["lokr_w1"], factors["lokr_w2"]).norm())
        x = torch.randn(64, 1024, dtype=torch.bfloat16)
        seen = []
        denoiser.attn.to_q.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        lora = denoiser.attn.to_q._lycoris_wrappers[0]
        lora.org_forward = lambda x: torch.zeros(64, 1024, dtype=torch.bfloat16)  # the change alone

        change = denoiser(x)

        true = x.double() @ torch.kron(factors["lokr_w1"].double(), factors["lokr_w2"].double()).T
        errors[bypass] = relative_error(change, true)

    assert errors[True] < 0.01
    assert 0.1 < errors[False] < 0.6


def test_a_scale_is_folded_into_a_small_factor_and_stays_exact(make_denoiser, make_adapter, perturb, tmp_path):
    """alpha / dim = 1.5 / 4 is exact in float32 only by luck; the file says so with a float64 factor."""
    adapter = make_adapter({**LOW_RANK_LOKR, "linear_alpha": 0.3})
    adapter.attach(make_denoiser())
    perturb(adapter)

    adapter.save(tmp_path, {})

    weights = load_file(tmp_path / ADAPTER_FILE)
    name = "lycoris_single_transformer_blocks_0_attn_to_q"
    assert weights[f"{name}.alpha"] == 4
    assert weights[f"{name}.lokr_w1"].dtype == torch.float64
    assert weights[f"{name}.lokr_w2_a"].dtype == torch.float32
    torch.testing.assert_close(weights[f"{name}.lokr_w1"], adapter.tensors()[f"{name}.lokr_w1"].double() * (0.3 / 4))
    assert json.loads((tmp_path / "lycoris_config.json").read_text())["linear_alpha"] == 4


def test_a_file_of_another_tool_with_an_alpha_of_its_own_is_read_to_the_same_function(make_denoiser, make_adapter, run, tmp_path):
    from safetensors.torch import save_file

    foreign = make_denoiser()
    LycorisNetwork.apply_preset({"target_module": ["Attention"]})
    network = LycorisNetwork(foreign, network_module="lokr", lora_dim=4, alpha=3.0, factor=4, bypass_mode=True)
    network.apply_to()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    save_file(network.state_dict(), tmp_path / "foreign.safetensors")
    denoiser, adapter = make_denoiser(), make_adapter(LOW_RANK_LOKR)
    adapter.attach(denoiser)

    adapter.load(tmp_path / "foreign.safetensors")

    assert relative_error(run(denoiser), run(foreign)) < 1e-5


def test_weights_that_do_not_fit_are_refused(make_denoiser, make_adapter, tmp_path):
    adapter = make_adapter(LOKR)
    adapter.attach(make_denoiser())
    adapter.save(tmp_path, {})

    for recipe, said in ((LOW_RANK_LOKR, "missing"), ({**LOKR, "factor": 8}, "shape")):
        other = make_adapter(recipe)
        other.attach(make_denoiser())
        with pytest.raises(ConfigError, match=said):
            other.load(tmp_path)
    with pytest.raises(ConfigError, match="no adapter"):
        adapter.load(tmp_path / "nowhere")


def test_initialisation_comes_from_torchs_generator_alone(make_denoiser, make_adapter):
    seen = []
    for _ in range(2):
        adapter, denoiser = make_adapter(LOKR), make_denoiser()
        torch.manual_seed(11)
        adapter.attach(denoiser)
        seen.append(adapter.tensors())

    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())


def test_init_lokr_norm_starts_with_a_small_change_of_the_weights_own_size():
    denoiser, adapter = Denoiser(256, 256), attach_to_one_layer(LOKR, init_lokr_norm=1e-3)

    adapter.attach(denoiser)

    factors = {name.rsplit(".", 1)[-1]: value for name, value in adapter.tensors().items()}
    change = torch.kron(factors["lokr_w1"], factors["lokr_w2"])
    assert change.std().item() == pytest.approx(1e-3 * denoiser.attn.to_q.weight.std().item(), rel=0.05)


def test_init_lokr_norm_needs_whole_factors():
    adapter = attach_to_one_layer(LOW_RANK_LOKR, init_lokr_norm=1e-3)

    with pytest.raises(ConfigError, match="init_lokr_norm"):
        adapter.attach(Denoiser())


def test_a_layer_whose_file_could_not_be_loaded_is_refused_with_a_factor_that_can():
    """The library reads factor 8 on 12 -> 8 as another pair of shapes."""
    adapter = attach_to_one_layer({**LOKR, "factor": 8})

    with pytest.raises(ConfigError, match="12 -> 8") as error:
        adapter.attach(Denoiser(12, 8))

    assert "factor 4" in error.value.hint
    attach_to_one_layer({**LOKR, "factor": 4}).attach(Denoiser(12, 8))


def test_without_targets_attention_and_feed_forward_are_adapted(make_denoiser, make_adapter):
    adapter = make_adapter({key: value for key, value in LOKR.items() if key != "apply_preset"})

    adapter.attach(make_denoiser())

    assert any("_attn_" in name for name in adapter.parameters())
    assert any("_ff_" in name for name in adapter.parameters())


def test_the_snippet_renders_what_was_trained(make_denoiser, make_adapter, run, perturb, tmp_path):
    """The lines between loading the pipeline and calling it are run on a stand-in for the pipeline."""
    denoiser, adapter, plain = make_denoiser(torch.bfloat16), make_adapter(LOKR), make_denoiser(torch.bfloat16)
    adapter.attach(denoiser)
    perturb(adapter)
    adapter.save(tmp_path, {})

    text = adapter.snippet("AuraFlowPipeline", "some/base", {"prompt": "it's a \"seven\"", "seed": 42}, str(tmp_path))

    compile(text, "snippet", "exec")
    assert "prompt=" in text and "manual_seed(42)" in text
    lines = text.splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("create_lycoris_from_weights(", "pipeline.to"))
    pipeline = type("Pipeline", (), {"transformer": plain})
    exec("\n".join(lines[begin:end]), {"create_lycoris_from_weights": create_lycoris_from_weights, "pipeline": pipeline, "device": "cpu"})
    assert run(plain).equal(run(denoiser))


def attach_to_one_layer(recipe, **options):
    """An adapter for `Denoiser`, which needs no file."""
    from simpletuner.adapters.kinds.lycoris import Lycoris
    from simpletuner.adapters.lycoris_file import parse
    from simpletuner.options.adapters import Adapters

    adapter = Lycoris(Adapters(lora_type="lycoris", **options), Targets())
    adapter._file = parse(recipe, "a test")
    return adapter
