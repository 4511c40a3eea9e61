"""What only a card can show of compiled blocks: CUDA graphs give the numbers of blocks that are not recorded, also where gradients add up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from simpletuner.memory.compiling import Compiler
from tests.builders.gpu import NEEDS_GPU, cuda
from tests.memory.test_compiling import SIZES, WIDTH, Network

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_recorded_blocks_give_the_same_gradients(mode, tmp_path, monkeypatch):
    """Each step adds up the gradients of two batches of different sizes; sizes come three times, of which the last one plays a record."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    plain = Network().train().to(cuda())
    network = copy.deepcopy(plain)
    Compiler("inductor", pytest.fail, mode=mode).attach(network)

    for _ in range(3):
        for sizes in (SIZES[:2], SIZES[2:4]):
            for one in (network, plain):
                one.zero_grad()
                for tokens, words in sizes:
                    generator = torch.Generator(cuda()).manual_seed(tokens)
                    pictures, text = (torch.randn(2, length, WIDTH, device=cuda(), generator=generator) for length in (tokens, words))
                    one(pictures, text).square().mean().backward()
            for (name, found), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
                assert (found.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm() + 1e-7, name

    assert not counters["inductor"]["cudagraph_skips"]
