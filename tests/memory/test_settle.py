"""Layers to their final form, one at a time; kept on disk; and read from their file without the whole network ever being there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from simpletuner.errors import ConfigError
from simpletuner.memory.precision import PRECISIONS
from simpletuner.memory.settle import Recipe, recipe_of, settle
from simpletuner.memory.weight_store import SEAL, WeightStore
from tests.training import families

CPU = torch.device("cpu")
HERE = [row.name for row in PRECISIONS if row.library and not row.needs_cuda]
COMPILES = pytest.mark.slow(reason="quanto compiles C++ for minutes when it is first used")
QUANTISED = [pytest.param(row.name, marks=COMPILES) if row.compiles else row.name for row in PRECISIONS if row.library and not row.needs_cuda]


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).bfloat16()


def make_input() -> torch.Tensor:
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()


def answer_and_gradient(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = make_input()
    answer = network(x)
    (gradient,) = torch.autograd.grad(answer.float().square().sum(), x)
    return answer.detach(), gradient


def kept(folder: Path, name: str, warn=print) -> Recipe:
    return replace(recipe_of(name, torch.bfloat16, CPU), store=WeightStore(folder, True, warn))


@pytest.mark.parametrize("name", QUANTISED)
def test_layers_that_are_kept_on_disk_come_back_with_the_same_answers_and_gradients(name, tmp_path):
    fresh, again = make_network(), make_network()
    settle(fresh, kept(tmp_path / "weights", name))
    with torch.no_grad():
        again[0].weight.zero_()  # what is kept must not be made anew

    assert settle(again, kept(tmp_path / "weights", name)) == 2

    assert all(map(torch.equal, answer_and_gradient(fresh), answer_and_gradient(again)))


@pytest.mark.parametrize("name", QUANTISED)
def test_the_gradient_is_that_of_the_weights_that_are_stood_for(name):
    network = make_network()
    settle(network, recipe_of(name, torch.bfloat16, CPU))
    plain = make_network()
    for own, other in zip((plain[0], plain[2]), (network[0], network[2])):
        own.weight.data = other.plain_weight() if hasattr(other, "plain_weight") else other.weight.dequantize().to(torch.bfloat16)

    (_, gradient), (_, wanted) = answer_and_gradient(network), answer_and_gradient(plain)

    assert (gradient - wanted).float().norm() < 0.05 * wanted.float().norm()


def test_what_torchao_leaves_for_the_backward_pass_is_its_few_bits():
    """Left to itself the library keeps a 16-bit copy of each weight from the forward to the backward pass."""
    network = make_network()
    settle(network, recipe_of("int8-torchao", torch.bfloat16, CPU))
    saved: list[torch.Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        network(make_input())

    assert not [tensor for tensor in saved if type(tensor) is torch.Tensor and tensor.numel() >= 128 * 256]


def test_a_store_that_is_cut_short_is_made_anew(tmp_path):
    folder = tmp_path / "weights"
    settle(make_network(), kept(folder, "int8-quanto"))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])

    network = make_network()
    settle(network, kept(folder, "int8-quanto"))

    fresh = make_network()
    settle(fresh, recipe_of("int8-quanto", torch.bfloat16, CPU))
    assert all(map(torch.equal, answer_and_gradient(fresh), answer_and_gradient(network)))
    assert WeightStore(folder, False, print).read("0") is not None and not list(tmp_path.glob("*.tmp"))


def test_a_store_with_a_flipped_bit_is_named_and_not_read_and_the_next_start_makes_it_anew(tmp_path):
    folder, said = tmp_path / "weights", []
    plain = make_network()
    settle(plain, kept(folder, "int8-quanto"))
    shard = next(folder.glob("layers-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    again = make_network()
    settle(again, kept(folder, "int8-quanto", said.append))

    assert all(map(torch.equal, answer_and_gradient(again), answer_and_gradient(plain)))
    assert len(said) == 1 and shard.name in said[0] and "damaged" in said[0]
    settle(make_network(), kept(folder, "int8-quanto", said.append))
    assert len(said) == 1 and WeightStore(folder, False, print).read("0") is not None


def test_a_run_without_room_for_the_store_goes_on_without_it(tmp_path):
    (tmp_path / "weights").write_text("a file where the folder should be")
    said: list[str] = []
    network = make_network()

    settle(network, kept(tmp_path / "weights" / "one", "int8-quanto", said.append))

    assert len(said) == 1 and "the next start quantises again" in said[0]
    assert type(network[0].weight.data) is not torch.Tensor


def test_a_store_that_is_not_whole_is_not_read(tmp_path):
    settle(make_network(), kept(tmp_path / "weights", "int8-quanto"))
    (tmp_path / "weights" / SEAL).unlink()

    assert WeightStore(tmp_path / "weights", False, print).read("0") is None


def test_layers_rest_where_they_are_wanted():
    network = make_network()
    recipe = replace(
        recipe_of("no_change", torch.bfloat16, CPU), placement=lambda network, sizes: lambda name: torch.device("meta" if name == "2" else "cpu")
    )

    settle(network, recipe)

    assert (network[0].weight.device.type, network[2].weight.device.type) == ("cpu", "meta")


def test_a_weight_with_two_owners_stays_one():
    network = nn.ModuleDict({"embed": nn.Embedding(8, 16), "head": nn.Linear(16, 8, bias=False)})
    network.head.weight = network.embed.weight

    settle(network, recipe_of("no_change", torch.bfloat16, CPU))

    assert network.head.weight is network.embed.weight and network.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["fp8-torchao"])
def test_what_is_for_cuda_alone_is_refused_elsewhere_with_what_works(name):
    with pytest.raises(ConfigError, match=f"base_model_precision {name} needs a CUDA device") as refused:
        settle(make_network(), recipe_of(name, torch.bfloat16, CPU))

    assert "int8-quanto" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["nf4-bnb", "int4-torchao", "int8-quanto", "int8-torchao"])
def test_a_t5_reads_nearly_the_same_in_few_bits(name):
    """It casts what goes into a layer to the dtype of the layer's weight, which must therefore be a number with a point."""
    torch.manual_seed(0)
    config = T5Config(d_model=128, d_ff=256, num_layers=2, num_heads=2, d_kv=64, vocab_size=64, feed_forward_proj="gated-gelu")
    encoder = T5EncoderModel(config).bfloat16().eval()
    tokens = torch.arange(12)[None]
    plain = encoder(tokens)[0]

    settle(encoder, recipe_of(name, torch.bfloat16, CPU))

    assert (encoder(tokens)[0] - plain).float().norm() < 0.25 * plain.float().norm()


@pytest.mark.parametrize("name", families.TINY)
def test_what_tells_a_networks_dtype_is_never_quantised(name):
    """Pipelines ask the first parameter."""
    denoiser = families.family(name).empty_denoiser()
    recipe = recipe_of("fp8-quanto", torch.bfloat16, CPU, families.family(name).delicate_layers)

    layers = recipe.begin(denoiser).layers

    assert layers and next(iter(dict(denoiser.named_parameters()))).rpartition(".")[0] not in layers


def test_what_an_interrupted_run_gathered_is_swept_and_what_a_running_one_gathers_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f"int8.{process}.tmp" for process in (ended.pid, os.getppid()))
    dead.mkdir()
    alive.mkdir()

    settle(make_network(), kept(tmp_path / "weights", "int8-quanto"))

    assert not dead.exists() and alive.exists()
