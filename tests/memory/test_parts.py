"""Weights of all kinds, taken apart and put together in other memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.memory.packing import pack_blocks
from simpletuner.memory.parts import bytes_of, made_of, parts_of
from simpletuner.memory.precision import PRECISIONS
from simpletuner.memory.ring import Lane
from tests.builders.quantised import quantise

CPU = torch.device("cpu")
PLAIN_SCALES = "nf4-bnb with scales that are not quantised"
COMPILES = pytest.mark.slow(reason="quanto compiles C++ for minutes when it is first used")
KINDS = [pytest.param(row.name, marks=COMPILES) if row.compiles else row.name for row in PRECISIONS if not row.needs_cuda] + [PLAIN_SCALES]


def layers(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)).bfloat16()
    if kind != PLAIN_SCALES:
        quantise(net, kind)
        return net
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = {"quant_type": "nf4", "compress_statistics": False}
    for number, plain in enumerate(net):
        layer = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=torch.bfloat16, **settings)
        layer.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, module=layer, **settings)
        layer.bias = plain.bias
        net[number] = layer.to("cpu")  # quantises
    return net.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_answers_the_same_from_main_memory_and_from_its_place(kind):
    net, x = nn.ModuleDict({"block": layers(kind)}), torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    net.train()  # in evaluation bitsandbytes may lay out its weights anew on a CPU
    before, kinds = net["block"](x), [type(layer.weight) for layer in net["block"]]
    (gradient,) = torch.autograd.grad(before.float().square().sum(), x)

    (block,) = pack_blocks(net, {"block": net["block"]}, CPU)
    at_rest = net["block"](x)
    lane = Lane()
    lane.fill(block, block.memory.numel())
    for weight in block.weights:
        weight.show(weight.device)
    there = net["block"](x)

    assert at_rest.equal(before) and there.equal(before)
    assert torch.autograd.grad(there.float().square().sum(), x)[0].equal(gradient)
    assert [type(layer.weight) for layer in net["block"]] == kinds
    assert block.bytes == sum(bytes_of(one) for layer in net["block"] for one in layer.parameters() if one.dim() > 1)
    storage = block.memory.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for layer in net["block"] for part in parts_of(layer.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_other_parts_shares_their_memory(kind):
    weight = layers(kind)[0].weight
    parts = [part.clone() for part in parts_of(weight)]

    made = made_of(weight, parts)

    assert isinstance(made, nn.Parameter) and not made.requires_grad and made.shape == weight.shape and made.dtype == weight.dtype
    assert [part.data_ptr() for part in parts_of(made)] == [part.data_ptr() for part in parts]


def test_a_weight_keeps_the_order_of_its_axes():
    net = nn.ModuleDict({"block": nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False))})
    strides, x = net["block"][0].weight.stride(), torch.randn(1, 3, 5, 5)
    before = net["block"](x)

    pack_blocks(net, {"block": net["block"]}, CPU)

    assert net["block"][0].weight.stride() == strides and net["block"](x).equal(before)
