"""What only a card can show of blocks that wait: copies beside the computing that nobody overtakes, page-locked slabs, precisions of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.factored import add_product
from simpletuner.memory.offload import Offload
from simpletuner.memory.packing import pack_blocks
from simpletuner.memory.parts import bytes_of
from simpletuner.memory.precision import PRECISIONS
from simpletuner.memory.ring import Block, CudaLane, Ring
from simpletuner.memory.settle import recipe_of, settle
from simpletuner.memory.slabs import allocate, plan_slabs
from simpletuner.options.memory import Memory
from tests.builders.gpu import NEEDS_GPU, cuda, without_package
from tests.memory.test_offload import EVERYTHING, MODES, real_size

pytestmark = NEEDS_GPU
WIDTH, DEPTH, ROWS = 1024, 6, 256
LONG = 50_000_000
"""Clock ticks; some hundredths of a second."""


class Layer(nn.Module):
    """Frozen products around something trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.trained = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)) * self.trained)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SlowCopies(CudaLane):
    """The card is late with every copy: who does not wait for it reads what is not there yet."""

    def fill(self, block: Block, size: int) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(LONG)
        super().fill(block, size)


def steps(net: Net, device: torch.device) -> list[Tensor]:
    """Answers and gradients of three passes both ways."""
    found = []
    for number in range(3):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number)).to(device)
        answer = net(x)
        answer.square().mean().backward()
        found += [answer.detach().clone(), *(layer.trained.grad.clone() for layer in net.layers)]
        net.zero_grad()
    torch.cuda.synchronize(device)
    return found


def ring_on(net: Net, room: int, lane: CudaLane, device: torch.device) -> Ring:
    for layer in net.layers:
        layer.trained.data = layer.trained.data.to(device)
    blocks = pack_blocks(net, {f"layers.{number}": layer for number, layer in enumerate(net.layers)}, device)
    return Ring(net, blocks, room, lane)


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("late", ["copies", "computing", "nothing"])
def test_whatever_is_late_gradients_are_those_of_the_plain_path(late, room):
    device = cuda()
    plain, net = steps(Net().to(device), device), Net()
    ring = ring_on(net, room, SlowCopies(device) if late == "copies" else CudaLane(device), device)
    if late == "computing":  # copies into the memory of a block that still computes would be ahead of it
        for layer in net.layers:
            layer.up.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LONG))
            layer.up.register_full_backward_hook(lambda *_: torch.cuda._sleep(LONG))

    found = steps(net, device)

    assert ring.peak_blocks == room
    assert all(torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) for mine, theirs in zip(found, plain, strict=True))


def test_copies_go_on_while_the_card_computes():
    """Room for two, copies as long as the computing: together they take less than one after the other."""
    device = cuda()

    def seconds(room: int) -> float:
        net = Net()
        ring_on(net, room, SlowCopies(device), device)
        for layer in net.layers:
            layer.up.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LONG))
        x = torch.randn(ROWS, WIDTH, device=device)
        with torch.no_grad():
            net(x)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            net(x)
            marks[1].record()
        torch.cuda.synchronize(device)
        return marks[0].elapsed_time(marks[1])

    assert seconds(2) < 0.8 * seconds(1)


def test_what_waits_is_page_locked_and_takes_no_more_than_its_slabs():
    before = sum(plan_slabs([1 << 20] * 8)[0])

    slabs = [allocate(size, is_pinned=True) for size in plan_slabs([1 << 20] * 8)[0]]

    assert all(slab.is_pinned() for slab in slabs) and sum(slab.numel() for slab in slabs) == before
    net = Net()
    ring = ring_on(net, 2, CudaLane(cuda()), cuda())
    assert all(source.is_pinned() for block in ring.blocks for source in block.sources)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_at_real_width_are_the_plain_ones_under_every_offload_and_checkpointing(mode):
    device = cuda()
    plain, again = (real_size(device, 64, Memory(gradient_checkpointing=False))[0] for _ in range(2))
    scale = [max(one.abs().max().item(), 1e-12) for one in plain]
    noise = [(a - b).abs().max().item() for a, b in zip(plain, again)]

    for offload in ({}, {"blocks_to_swap": 2}, {"blocks_to_swap": 3}, EVERYTHING):
        found, _ = real_size(device, 64, Memory(**MODES[mode], **offload))
        for mine, theirs, limit, largest in zip(found, plain, noise, scale, strict=True):
            # Kernels may be others where activations are made again, in which bf16 rounds by 2^-8.
            assert (mine - theirs).abs().max().item() <= 2 * limit + largest / 256, (mode, offload)


@pytest.mark.parametrize("form", ["whole, more outputs", "whole, more inputs", "of a rank"])
def test_an_adapter_answers_to_70000_tokens_as_to_two_halves_of_them(form):
    """More small products than a CUDA grid has along one of its last axes: 65,535."""
    device, groups, tokens = cuda(), 4, 70_000
    shapes = {"whole, more outputs": (None, (96, 64)), "whole, more inputs": ((64, 96), None), "of a rank": ((8, 96), (64, 8))}[form]
    torch.manual_seed(0)
    mix, down, up = (None if shape is None else torch.randn(*shape, device=device).requires_grad_() for shape in ((groups, groups), *shapes))
    factors = [factor for factor in (mix, down, up) if factor is not None]
    inputs, outputs = groups * (up if down is None else down).shape[1], groups * (down if up is None else up).shape[0]
    x, base, grad = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for width in (inputs, outputs, outputs))

    def both_ways(rows: slice) -> list[Tensor]:
        part = x[rows].requires_grad_()
        answer = add_product(base[rows], part, mix, down, up)
        return [answer.detach(), *torch.autograd.grad(answer, [part, *factors], grad[rows])]

    found, halves = both_ways(slice(None)), [both_ways(slice(0, 35_000)), both_ways(slice(35_000, None))]

    wanted = [torch.cat(parts) if number < 2 else sum(parts) for number, parts in enumerate(zip(*halves, strict=True))]
    for one, other in zip(found, wanted, strict=True):
        assert bool(one.isfinite().all()) and ((one - other).float().norm() / other.float().norm()).item() < 0.01


@pytest.mark.parametrize("name", [row.name for row in PRECISIONS if row.library])
def test_a_precision_of_the_card_answers_nearly_as_bf16_does_and_has_its_gradient(name):
    device, row = cuda(), next(row for row in PRECISIONS if row.name == name)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024)).to(device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(512, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    answer = net(x)
    (slope,) = torch.autograd.grad(answer.float().sum(), x)

    without_package(lambda: settle(net, recipe_of(name, torch.bfloat16, device)))
    found = net(x)
    (mine,) = torch.autograd.grad(found.float().sum(), x)

    limit = {8: 0.08, 2.25: 0.8}.get(row.bits, 0.3)
    for one, other in ((found, answer), (mine, slope)):
        assert one.dtype == other.dtype and bool(one.isfinite().all())
        assert ((one - other).float().norm() / other.float().norm()).item() < limit
    assert sum(map(bytes_of, net.parameters())) < 1.1 * row.bits / 16 * 2 * 2 * 1024 * 4096


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["int8-quanto", "nf4-bnb", "int8-torchao", "fp8-torchao"])
def test_quantised_blocks_that_wait_answer_as_those_that_stay(name):
    device = cuda()

    def learn(memory: Memory) -> list[Tensor]:
        net = Blocks().to(device, torch.bfloat16).requires_grad_(False)
        without_package(lambda: settle(net, recipe_of(name, torch.bfloat16, device)))
        offload = Offload(net, memory, device)
        assert (offload.ring is not None) == memory.enable_group_offload
        x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16).requires_grad_()
        answer = net(x)
        answer.float().square().mean().backward()
        return [answer.detach(), x.grad]

    plain, found = learn(Memory()), learn(Memory(**EVERYTHING))

    assert all(torch.allclose(mine, theirs, rtol=1e-2, atol=1e-4) for mine, theirs in zip(found, plain, strict=True))
