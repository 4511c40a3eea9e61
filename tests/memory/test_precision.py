"""Precisions of the frozen base, and adapters on top of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.adapters.adapter import Targets
from simpletuner.adapters.kinds.full import Full
from simpletuner.adapters.kinds.lycoris import Lycoris
from simpletuner.adapters.kinds.standard import Standard
from simpletuner.errors import ConfigError
from simpletuner.memory.parts import bytes_of
from simpletuner.memory.precision import PRECISIONS, find, quantiser_of
from simpletuner.options.adapters import Adapters
from tests.builders.quantised import quantise

ERRORS = {
    "int8-quanto": 0.02,
    "int4-quanto": 0.2,
    "int2-quanto": 0.8,
    "fp8-quanto": 0.1,
    "int8-torchao": 0.02,
    "int8-matmul": 0.03,
    "int8-rotated": 0.03,
    "fp8wo-torchao": 0.1,
    "int8dq-torchao": 0.05,
    "int4-torchao": 0.2,
    "nf4-bnb": 0.2,
    "fp4-bnb": 0.3,
}
"""How far the answer may be off, relative to the answer in bf16."""
NAMES = list(ERRORS)
COMPILES = pytest.mark.slow(reason="quanto compiles C++ for minutes when it is first used")
QUANTISED = [pytest.param(name, marks=COMPILES) if name in ("int4-quanto", "int2-quanto") else name for name in NAMES]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_k(nn.functional.gelu(self.to_q(x)))


def make_denoiser(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": Attention()}).to(dtype)


def make_input() -> torch.Tensor:
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


def make_lycoris(tmp_path, text: str = '{"algo": "lokr", "factor": 8}') -> Lycoris:
    (tmp_path / "lycoris.json").write_text(text)
    return Lycoris(Adapters(lora_type="lycoris", lycoris_config=str(tmp_path / "lycoris.json")), Targets())


def test_every_precision_has_a_case_here():
    assert ["no_change", *NAMES] == [row.name for row in PRECISIONS if not row.needs_cuda]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_network_is_smaller_frozen_and_close(name):
    denoiser = make_denoiser()
    full = denoiser.attn(make_input())

    count = quantise(denoiser, name)

    answer = denoiser.attn(make_input())
    assert count == 2
    assert answer.dtype == torch.bfloat16
    assert ((answer - full).float().norm() / full.float().norm()).item() < ERRORS[name]
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    stored = sum(map(bytes_of, [*denoiser.parameters(), *denoiser.buffers()]))
    assert stored < 0.65 * 2 * (2 * 128 * 256)


@pytest.mark.parametrize("name", QUANTISED)
def test_an_input_may_have_any_strides(name):
    layer = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    quantise(layer, name)
    usual = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    strided = usual.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    answers = layer(usual), layer(strided)

    assert not strided.is_contiguous()
    torch.testing.assert_close(*answers, rtol=0.02, atol=0.02)
    for answer in answers:
        answer.sum().backward()
    torch.testing.assert_close(usual.grad, strided.grad, rtol=0.02, atol=0.02)


def test_layers_that_torchs_int8_kernel_would_read_beyond_stay_as_they_are():
    network = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 8)).bfloat16()

    assert quantise(network, "int8-quanto") == 1

    answers = [network(torch.ones(5, 24, dtype=torch.bfloat16)) for _ in range(20)]
    assert all(torch.equal(answer, answers[0]) for answer in answers) and bool(answers[0].isfinite().all())


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kind", ["lokr", "lora"])
def test_gradients_reach_an_adapter_on_a_quantised_base_and_not_the_base(name, kind, tmp_path):
    denoiser = make_denoiser()
    quantise(denoiser, name)
    adapter = make_lycoris(tmp_path) if kind == "lokr" else Standard(Adapters(lora_rank=4), Targets(suffixes=("to_q", "to_k")))
    adapter.attach(denoiser)
    base = denoiser.attn(make_input())
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))

    answer = denoiser.attn(make_input())
    answer.float().square().mean().backward()

    assert not answer.equal(base)
    assert all(parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters().values())
    ours = {id(parameter) for parameter in adapter.parameters().values()}
    assert not any(parameter.requires_grad for parameter in denoiser.parameters() if id(parameter) not in ours)
    adapter.set_strength(0)
    assert denoiser.attn(make_input()).equal(base)


def test_gradients_on_int8_are_those_of_its_own_weights_in_float32(tmp_path):
    """The quantised layer is the plain layer with the weights that it stands for."""
    denoiser, plain = make_denoiser(torch.float32), make_denoiser(torch.float32)
    quantise(denoiser, "int8-quanto")
    for name in ("to_q", "to_k"):
        getattr(plain.attn, name).weight.data = getattr(denoiser.attn, name).weight.dequantize()
    grads = []
    for model in (denoiser, plain):
        adapter = make_lycoris(tmp_path)
        torch.manual_seed(3)
        adapter.attach(model)
        for parameter in adapter.parameters().values():
            parameter.data.normal_(std=0.05)
        model.attn(make_input().float()).square().mean().backward()
        grads.append({key: parameter.grad for key, parameter in adapter.parameters().items()})

    for key, grad in grads[0].items():
        assert (grad - grads[1][key]).norm() < 1e-3 * grads[1][key].norm(), key


def test_layers_to_keep_stay_as_they_are():
    denoiser = make_denoiser()

    count = quantise(denoiser, "int8-quanto", keep=["*.to_k"])

    assert count == 1
    assert type(denoiser.attn.to_k.weight) is nn.Parameter


def test_no_change_only_freezes():
    denoiser = make_denoiser()
    answer = denoiser.attn(make_input())

    assert quantise(denoiser, "no_change") == 0

    assert denoiser.attn(make_input()).equal(answer)
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_an_unknown_precision_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="text_encoder_1_precision 'int8-quant'") as error:
        find("int8-quant", "text_encoder_1_precision")

    assert "did you mean 'int8-quanto'" in error.value.hint


def test_what_compiles_is_refused_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)

    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        quantise(make_denoiser(), "int4-quanto")


@pytest.mark.parametrize("name", ["int8-matmul", "int8-rotated"])
def test_bytes_are_multiplied_on_cpus_and_cuda_devices_alone(name):
    with pytest.raises(ConfigError, match=rf"text_encoder_1_precision {name} .* on cpu and cuda alone; this run is on mps") as error:
        quantiser_of(find(name), "mps", "text_encoder_1_precision")

    assert "int8-quanto" in error.value.hint
    assert all(quantiser_of(find(name), device, "base_model_precision") is not None for device in ("cpu", "cuda"))


def test_a_network_without_layers_to_quantise_is_refused():
    with pytest.raises(ConfigError, match="no layer"):
        quantise(nn.LayerNorm(4), "int8-quanto")


@pytest.mark.parametrize("name", ["int8-quanto", "int8-torchao"])
def test_what_must_read_the_bases_weights_is_refused_on_a_quantised_base(name, tmp_path):
    denoiser = make_denoiser()
    quantise(denoiser, name)
    targets = Targets(suffixes=("to_q",))

    for adapter in (
        make_lycoris(tmp_path, '{"algo": "lokr", "factor": 8, "weight_decompose": true}'),
        make_lycoris(tmp_path, '{"algo": "diag-oft", "linear_dim": 4}'),
        Standard(Adapters(use_dora=True), targets),
        Standard(Adapters(lora_init_type="pissa"), targets),
        Full(Adapters(model_type="full"), targets),
    ):
        with pytest.raises(ConfigError, match="quantised"):
            adapter.attach(denoiser)
