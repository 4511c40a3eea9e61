"""The files of the LyCORIS kind: what other software makes of them, and what comes back."""

from __future__ import annotations

import json

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters.adapter import ADAPTER_FILE
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
    "full": {"algo": "full", "apply_preset": ATTENTION},
    "dylora": {"algo": "dylora", "linear_dim": 8, "linear_alpha": 2, "block_size": 4, "apply_preset": ATTENTION},
    "lora inside lokr": {**LOKR, "apply_preset": {**ATTENTION, "module_algo_map": {"FeedForward": {"algo": "lora", "dim": 2, "alpha": 1}}}},
}


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("way", ["apply", "merge"])
def test_the_library_loads_the_file_on_a_plain_transformer_and_answers_the_same(recipe, way, make_denoiser, make_adapter, run, perturb, tmp_path):
    trained, adapter, plain = make_denoiser(), make_adapter(recipe), make_denoiser()
    attached = adapter.attach(trained)
    perturb(adapter, 0.05)
    adapter.train(False)
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


def test_a_file_of_another_tool_with_an_alpha_of_its_own_is_read_to_the_same_function(make_denoiser, make_adapter, run, tmp_path, monkeypatch):
    foreign = make_denoiser()
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_MODULE", ["Attention"])
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


def test_the_snippet_renders_what_was_trained(make_denoiser, make_adapter, run, perturb, tmp_path):
    """The lines between loading the pipeline and calling it are run on a stand-in for the pipeline."""
    denoiser, adapter, plain = make_denoiser(torch.bfloat16), make_adapter(LOKR), make_denoiser(torch.bfloat16)
    adapter.attach(denoiser)
    perturb(adapter)
    adapter.save(tmp_path, {})

    text = adapter.snippet("AuraFlowPipeline", "some/base", {"prompt": 'it\'s a "seven"', "seed": 42}, str(tmp_path))

    compile(text, "snippet", "exec")
    assert "prompt=" in text and "manual_seed(42)" in text
    lines = text.splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("create_lycoris_from_weights(", "pipeline.to"))
    pipeline = type("Pipeline", (), {"transformer": plain})
    exec("\n".join(lines[begin:end]), {"create_lycoris_from_weights": create_lycoris_from_weights, "pipeline": pipeline, "device": "cpu"})
    assert "bypass_mode = True" in text
    assert (run(plain) - run(denoiser)).float().norm() < 0.02 * run(denoiser).float().norm()  # the library rounds to bf16 in other places
