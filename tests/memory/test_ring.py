"""The ring: gradients are those of the plain path to the bit, whatever is recomputed, and a schedule that is wrong does not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.memory.packing import pack_blocks
from simpletuner.memory.ring import Block, Lane, Ring
from tests.builders.lanes import StrictLane

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the first block of the older kind's passes
WIDTH, DEPTH = 16, 6
CPU = torch.device("cpu")


class HidesItsWeight(torch.autograd.Function):
    """A product that keeps the weight where autograd does not see it, as bitsandbytes' 4-bit one does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.hidden = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.hidden, None


class Layer(nn.Module):
    """Frozen products around something trained; reads its condition twice, so that the order in which gradients are added up shows."""

    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.up, self.down, self.condition = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.trained = nn.Parameter(torch.randn(40))
        self.hides = hides

    def forward(self, x: Tensor, *, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        scale = self.condition(condition) * condition.sigmoid()
        inner = torch.nn.functional.gelu(HidesItsWeight.apply(x * scale, self.up.weight) if self.hides else self.up(x * scale))
        answer: Tensor = x + self.down(inner * self.trained) * (1 if skip is None else skip)
        return answer


class Net(nn.Module):
    """Layers one after the other; as in a U-Net, the second half also gets what the first answered."""

    def __init__(self, call: Callable[..., Any] | None, runs: list[int], hides: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(hides) for _ in range(DEPTH))
        self.call, self.runs = call or (lambda layer, *arguments, **named: layer(*arguments, **named)), runs

    def forward(self, x: Tensor) -> Tensor:
        condition = self.embed(x)
        answers: list[Tensor] = []
        for place, number in enumerate(self.runs):
            skip = answers[DEPTH - 1 - place] if place >= DEPTH // 2 + 1 else None
            x = self.call(self.layers[number], x, condition=condition, skip=skip)
            answers.append(x)
        return x


def reentrant(layer: nn.Module, x: Tensor, *, condition: Tensor, skip: Tensor | None) -> Tensor:
    """The older kind of checkpoint, which takes no named arguments."""
    return checkpoint(lambda *tensors: layer(tensors[0], condition=tensors[1], skip=tensors[2]), x, condition, skip, use_reentrant=True)


def anew(layer: nn.Module, *arguments: Any, **named: Any) -> Tensor:
    return checkpoint(layer, *arguments, use_reentrant=False, **named)


class EveryOther:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, layer: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        self.calls += 1
        return anew(layer, *arguments, **named) if self.calls % 2 else layer(*arguments, **named)


WAYS: dict[str, Callable[[], Callable[..., Any] | None]] = {
    "all activations kept": lambda: None,
    "computed again": lambda: anew,
    "computed again by the older kind": lambda: reentrant,
    "every other computed again": EveryOther,
}
LISTED, AS_UNETS_LIST = list(range(DEPTH)), [0, 1, 4, 5, 2, 3]


def ring_of(net: Net, room: int = 2, kind: type[Ring] = Ring, numbers: list[int] = LISTED) -> tuple[Ring, StrictLane]:
    lane = StrictLane()
    blocks = pack_blocks(net, {f"layers.{number}": net.layers[number] for number in numbers}, CPU)
    return kind(net, blocks, room, lane), lane


def steps(net: Net, count: int = 2) -> list[Tensor]:
    """Answers and gradients of passes both ways; between the two, and after them, the net is asked without gradients."""
    found = []
    for number in range(count):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        answer = net(x)
        with torch.no_grad():
            found.append(net(x + 1))
        answer.square().sum().backward()
        found += [answer.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]
        net.zero_grad()
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("runs", [LISTED, AS_UNETS_LIST], ids=["as listed", "in another order"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_plain_path(way, runs, room):
    plain = steps(Net(WAYS[way](), runs))
    net = Net(WAYS[way](), runs)
    ring, lane = ring_of(net, room)

    assert same(steps(net), plain)
    last_is_held = WAYS[way]() is reentrant  # its inputs are leaves, whose gradients do not tell that a block is done
    assert room <= ring.peak_blocks <= room + last_is_held and set(lane.filled) == {block.name for block in ring.blocks}


@pytest.mark.parametrize("way", ["all activations kept", "computed again"])
def test_weights_that_a_kernel_keeps_out_of_autograds_sight_are_the_blocks_own(way):
    plain, net = steps(Net(WAYS[way](), LISTED, hides=True)), Net(WAYS[way](), LISTED, hides=True)
    ring_of(net)

    assert same(steps(net), plain)


def test_blocks_that_are_computed_again_as_one_are_there_together():
    class Segments(Net):
        def forward(self, x: Tensor) -> Tensor:
            condition = self.embed(x)
            for first in (0, 3):
                x = checkpoint(self._segment, first, x, condition, use_reentrant=False)
            return x

        def _segment(self, first: int, x: Tensor, condition: Tensor) -> Tensor:
            for layer in self.layers[first : first + 3]:
                x = layer(x, condition=condition)
            return x

    plain, net = steps(Segments(None, LISTED)), Segments(None, LISTED)
    ring, _ = ring_of(net)

    assert same(steps(net), plain)
    assert ring.peak_blocks == 3


class ForwardHooksAlone(Ring):
    """What swaps blocks in the forward pass does, and in the one that is computed again."""

    def _before_backward(self, *given: Any) -> None: ...

    def _after_backward(self, *given: Any) -> None: ...

    def _after_forward(self, block: Any, *given: Any) -> None:
        super()._after_forward(block, *given)
        if block in self._held:
            self._let_go(block)
            self._fetch(self._before(block))


@pytest.mark.parametrize("way", ["all activations kept", "computed again by the older kind"])
def test_a_ring_without_hooks_on_the_way_back_is_found_out(way):
    net = Net(WAYS[way](), LISTED)
    ring_of(net, 1, ForwardHooksAlone)

    assert any(bool(tensor.isnan().any()) for tensor in steps(net))


def test_each_block_is_copied_once_a_pass_but_for_those_at_the_turns():
    net = Net(anew, AS_UNETS_LIST)
    _, lane = ring_of(net)
    x = torch.randn(3, WIDTH)
    net(x).sum().backward()  # learns the order

    lane.filled.clear()
    net(x).sum().backward()

    assert len(lane.filled) == 2 * (DEPTH - 2)
    lane.filled.clear()
    with torch.no_grad():
        net(x)
        net(x)
    assert len(lane.filled) == 2 * DEPTH


@pytest.mark.parametrize("room", [1, 2, 4])
def test_memory_is_given_back_for_each_that_is_taken(room):
    """Counted in the storages themselves, and not in what the ring believes."""
    net = Net(anew, LISTED)
    most = []

    class Counting(Lane):
        def fill(self, block: Block, size: int) -> None:
            super().fill(block, size)
            most.append(sum(one.memory.untyped_storage().nbytes() for one in ring.blocks))

    blocks = pack_blocks(net, {f"layers.{number}": layer for number, layer in enumerate(net.layers)}, CPU)
    assert all(block.memory.untyped_storage().nbytes() == 0 for block in blocks)
    ring = Ring(net, blocks, room, Counting())

    found = steps(net)

    assert max(most) == room * ring.place_bytes
    assert same(found, steps(Net(anew, LISTED)))


def test_copies_are_asked_for_before_they_are_needed():
    net = Net(anew, LISTED)
    _, lane = ring_of(net)
    asked = {}
    for number, layer in enumerate(net.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: asked.update({number: list(lane.filled)}))

    net(torch.randn(3, WIDTH))

    assert all(f"layers.{number + 1}" in asked[number] for number in range(DEPTH - 1))


def test_between_passes_the_weights_are_in_main_memory_and_what_is_trained_is_not():
    net = Net(None, LISTED)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ring, _ = ring_of(net, numbers=[1, 3])
    trained = [layer.trained for layer in net.layers]

    steps(net)

    assert all(weight.module._parameters[weight.name] is weight.host for block in ring.blocks for weight in block.weights)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(layer.trained is parameter for layer, parameter in zip(net.layers, trained))
    assert {weight.name for block in ring.blocks for weight in block.weights} == {"weight"}


def test_a_pass_that_breaks_off_leaves_the_ring_as_it_should_be():
    plain, net = steps(Net(anew, LISTED)), Net(anew, LISTED)
    ring, _ = ring_of(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(3, WIDTH + 1))
    broken = net.layers[3].down.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(torch.randn(3, WIDTH))
    broken.remove()

    assert same(steps(net), plain)
    assert ring.peak_blocks == 2


def test_a_closed_ring_leaves_a_plain_net():
    plain, net = steps(Net(anew, LISTED)), Net(anew, LISTED)
    ring, _ = ring_of(net)
    steps(net)

    ring.close()

    assert ring.loaded == () and not net._forward_hooks and not net.layers[0]._forward_pre_hooks
    assert same(steps(net), plain)
