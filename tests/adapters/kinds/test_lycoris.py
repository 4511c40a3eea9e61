"""The LyCORIS kind: what it adapts, its function and its precision."""

from __future__ import annotations

import random

import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.wrapper import network_module_dict
from torch import nn

from simpletuner.errors import ConfigError

ATTENTION = {"target_module": ["Attention"]}
LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "apply_preset": ATTENTION}
LOW_RANK_LOKR = {**LOKR, "linear_dim": 4, "linear_alpha": 1.5}


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


def test_strength_scales_the_effect(make_adapter):
    x, denoiser, adapter = torch.randn(3, 24), Denoiser(), make_adapter(LOKR)
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


@pytest.mark.parametrize(
    "recipe", [LOKR, LOW_RANK_LOKR, {**LOW_RANK_LOKR, "algo": "loha"}, {**LOW_RANK_LOKR, "algo": "lora"}], ids=["lokr", "lokr rank 4", "loha", "lora"]
)
def test_the_factored_form_is_the_same_function_as_the_materialised_one(recipe, make_denoiser, make_adapter, run, perturb):
    answers = []
    for bypass in (True, False):
        denoiser, adapter = make_denoiser(), make_adapter({**recipe, "bypass_mode": bypass})
        adapter.attach(denoiser)
        perturb(adapter)
        answers.append(run(denoiser))

    assert relative_error(answers[0], answers[1]) < 1e-5


@pytest.mark.parametrize("recipe", [LOKR, LOW_RANK_LOKR], ids=["whole", "rank 4"])
def test_gradients_are_those_of_the_materialised_product_in_float64(recipe, make_adapter):
    denoiser, adapter = Denoiser().double(), make_adapter(recipe)
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


def test_the_factored_form_does_not_cancel_in_bf16(make_adapter):
    """1024 x 1024, factor 8, a change of 0.5 % of the weight: what each form leaves of the change, against float64."""
    errors = {}
    for bypass in (True, False):
        denoiser, adapter = Denoiser(1024, 1024), make_adapter({**LOKR, "factor": 8, "bypass_mode": bypass})
        denoiser = denoiser.bfloat16()
        adapter.attach(denoiser)
        weight = denoiser.attn.to_q.weight
        factors = {name.rsplit(".", 1)[-1]: parameter for name, parameter in adapter.parameters().items()}
        torch.manual_seed(0)
        with torch.no_grad():
            factors["lokr_w2"].normal_()
            factors["lokr_w2"].mul_(0.005 * weight.float().norm() / torch.kron(factors["lokr_w1"], factors["lokr_w2"]).norm())
        x = torch.randn(64, 1024, dtype=torch.bfloat16)
        wrapper = denoiser.attn.to_q._lycoris_wrappers[0]
        wrapper.org_forward = lambda x: torch.zeros_like(x)  # leaves the change alone, which the rounding of a whole answer would hide

        change = denoiser(x)

        true = x.double() @ torch.kron(factors["lokr_w1"].double(), factors["lokr_w2"].double()).T
        errors[bypass] = relative_error(change, true)

    assert errors[True] < 0.01
    assert 0.1 < errors[False] < 0.6


def test_init_lokr_norm_starts_with_a_small_change_of_the_weights_own_size(make_adapter):
    denoiser, adapter = Denoiser(256, 256), make_adapter(LOKR, init_lokr_norm=1e-3)

    adapter.attach(denoiser)

    factors = {name.rsplit(".", 1)[-1]: value for name, value in adapter.tensors().items()}
    change = torch.kron(factors["lokr_w1"], factors["lokr_w2"])
    assert change.std().item() == pytest.approx(1e-3 * denoiser.attn.to_q.weight.std().item(), rel=0.05)


def test_init_lokr_norm_needs_whole_factors(make_adapter):
    adapter = make_adapter(LOW_RANK_LOKR, init_lokr_norm=1e-3)

    with pytest.raises(ConfigError, match="init_lokr_norm"):
        adapter.attach(Denoiser())


def test_a_layer_whose_file_could_not_be_loaded_is_refused_with_a_factor_that_can(make_adapter):
    """The library reads factor 8 on 12 -> 8 as another pair of shapes."""
    adapter = make_adapter({**LOKR, "factor": 8})

    with pytest.raises(ConfigError, match="12 -> 8") as error:
        adapter.attach(Denoiser(12, 8))

    assert "factor 4" in error.value.hint
    make_adapter({**LOKR, "factor": 4}).attach(Denoiser(12, 8))


def test_without_targets_attention_and_feed_forward_are_adapted(make_denoiser, make_adapter):
    adapter = make_adapter({key: value for key, value in LOKR.items() if key != "apply_preset"})

    adapter.attach(make_denoiser())

    assert any("_attn_" in name for name in adapter.parameters())
    assert any("_ff_" in name for name in adapter.parameters())


ALGORITHMS = {
    **{name: {"linear_dim": 4, "linear_alpha": 2} for name in ("lora", "locon", "loha", "lokr", "glora", "dylora", "tlora")},
    **{name: {"linear_dim": 4} for name in ("diag-oft", "boft")},
    "full": {},
    "ia3": {},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_of_the_library_learns_and_leaves_the_base_as_it_was(name, make_denoiser, make_adapter, run, tmp_path):
    assert set(ALGORITHMS) == set(network_module_dict)
    denoiser, plain = make_denoiser(), run(make_denoiser())
    adapter = make_adapter({"algo": name, **ALGORITHMS[name], "apply_preset": {"target_module": ["Attention"]}})
    adapter.attach(denoiser)
    target = plain.detach() + 1
    optimizer = torch.optim.Adam(adapter.parameters().values(), 1e-5)
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        loss = (run(denoiser) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter.train(False)
    trained = run(denoiser)

    adapter.set_strength(0.0)
    assert torch.equal(run(denoiser), plain)
    adapter.set_strength(1.0)
    assert torch.equal(run(denoiser), trained)
    adapter.set_strength(0.5)
    assert not torch.equal(run(denoiser), trained)
    assert min(losses) < 0.9999 * losses[0]

    again, other = make_adapter({"algo": name, **ALGORITHMS[name], "apply_preset": {"target_module": ["Attention"]}}), make_denoiser()
    again.attach(other)
    adapter.save(tmp_path, {})
    again.load(tmp_path)
    again.train(False)
    assert torch.equal(run(other), trained)


def test_dylora_draws_its_ranks_from_the_runs_generator(make_denoiser, make_adapter, run, perturb):
    denoiser = make_denoiser()
    adapter = make_adapter({"algo": "dylora", "linear_dim": 8, "block_size": 2, "apply_preset": {"target_module": ["Attention"]}})
    adapter.attach(denoiser)
    perturb(adapter)

    def answer(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        random.seed(seed + 1)
        return run(denoiser)

    assert torch.equal(answer(1), answer(1))
    assert not torch.equal(answer(1), answer(2))


def test_of_ia3_it_is_said_that_the_library_cannot_load_it(make_denoiser, make_adapter):
    adapter = make_adapter({"algo": "ia3", "apply_preset": {"target_module": ["Attention"]}})

    attached = adapter.attach(make_denoiser())

    assert any("cannot load files of algo ia3" in note for note in attached.notes)
