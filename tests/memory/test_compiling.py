"""Compiled blocks give the same numbers, share one graph for all sizes, and fall back where they cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from simpletuner.memory import compiling
from simpletuner.memory.checkpointing import Recomputed
from simpletuner.memory.compiling import CompiledForward, Compiler, missing_for
from simpletuner.memory.offload import Offload
from simpletuner.models.offline import config_here
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.memory import Memory
from simpletuner.training.objective import loss_of
from simpletuner.training.plan_step import shaped_batch
from simpletuner.training.step import Step
from simpletuner.types import Batch, Size
from tests.builders.adapted import LOKR, adapt
from tests.builders.quantised import quantise
from tests.training.families import family

WIDTH, HEADS = 16, 2
SIZES = ((24, 5), (35, 7), (48, 5), (24, 9), (35, 5), (24, 5))
"""Tokens of pictures and of captions, batch after batch."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0


class Block(nn.Module):
    """Pictures look at themselves and at the caption, as in any transformer here."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.query, self.answer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, *, text: Tensor) -> Tensor:
        query = self.query(self.norm(tokens)).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, heads, T, D)
        seen = torch.cat([tokens, text], dim=1).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        answer = F.scaled_dot_product_attention(query, seen, seen).transpose(1, 2).flatten(2)
        return tokens + self.dropout(F.gelu(self.answer(answer)))


class Impatient(Block):
    """Leaves out a part now and then, as module dropouts of adapters do: no one graph can hold that."""

    def forward(self, tokens: Tensor, *, text: Tensor) -> Tensor:
        return tokens + 1 if torch.rand(1) < 0.5 else super().forward(tokens, text=text)


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0, kinds: tuple[type[Block], ...] = (Block, Block, Block)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind(dropout) for kind in kinds)
        self.call: Callable = lambda block, *arguments, **named: block(*arguments, **named)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        tokens = self.entry(tokens)
        for block in self.blocks:
            tokens = self.call(block, tokens, text=text)
        return tokens

    def numbers(self, tokens: int, words: int) -> list[Tensor]:
        """The loss of a batch, and all gradients."""
        generator = torch.Generator().manual_seed(tokens)
        pictures, text = (torch.randn(2, length, WIDTH, generator=generator) for length in (tokens, words))
        torch.manual_seed(1)  # what dropouts draw
        loss = self(pictures, text).square().mean()
        trained = [one for one in self.parameters() if one.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]


def compiled(said: list[str] | None = None, backend: str = "aot_eager", memory_budget: float = 1.0, **settings) -> Network:
    network = Network(**settings).train()
    Compiler(backend, (said if said is not None else []).append, memory_budget=memory_budget).attach(network)
    return network


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_equal_blocks_share_one_graph_for_all_sizes():
    network, plain = compiled(), Network().train()

    for number, (tokens, words) in enumerate(SIZES):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert equal(network.numbers(tokens, words), plain.numbers(tokens, words))

    assert counters["stats"]["unique_graphs"] == 1
    assert list(network.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", [pytest.param("auraflow", marks=pytest.mark.slow), "sdxl"])
def test_pictures_of_other_sizes_compile_nothing_anew_in_a_denoiser_with_an_adapter(name, tmp_path):
    """Tokens in a transformer, pictures in a U-Net: the first size compiles all that two epochs of mixed sizes need."""
    step, batches = adapted_step(name, tmp_path, [Size(32, 48), Size(48, 32), Size(48, 64), Size(32, 32)])
    blocks = Compiler("eager", pytest.fail).attach(step.denoiser)

    graphs = []
    for batch in batches * 2:
        step.losses(batch, 0, 0).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])

    assert graphs[0] and set(graphs) == {graphs[0]}
    assert {type(block) for block in blocks} == {CompiledForward}


def adapted_step(name: str, folder: Path, sizes: list[Size]) -> tuple[Step, list[Batch]]:
    """A step of a tiny model with a LoKr, and a batch of each size."""
    built, diffusion = family(name), Diffusion()
    denoiser = built.load_denoiser(torch.float32, 0).train()
    adapter = adapt(denoiser, built, "lycoris", folder, {**LOKR, "dropout": 0})
    process = built.process(diffusion)
    step = Step(built, denoiser, adapter, process, loss_of(diffusion, process), torch.device("cpu"), 5, 0, draws_latents=True)
    text = built.text_shapes([config_here(built.source.part(part)) for part in built.parts if part.startswith("text_encoder")])
    return step, [shaped_batch(built, text, size, 2) for size in sizes]


class Halves(Block):
    """Gives pictures and captions apart, as parts of one tensor."""

    def forward(self, tokens: Tensor, *, text: Tensor) -> Tensor:
        both = super().forward(torch.cat([text, tokens], dim=1), text=text)
        return both[:, : text.shape[1]], both[:, text.shape[1] :]  # type: ignore[return-value]


@pytest.mark.parametrize(("precision", "mode"), [("int8-quanto", "selective"), ("int8-torchao", "kept")])
def test_a_quantised_block_that_gives_two_parts_of_one_tensor_is_compiled(precision, mode):
    """As Flux's single blocks are."""
    networks = []
    for _ in range(2):
        network = Network(kinds=(Halves,)).train()
        quantise(network.blocks, precision)
        network.call = Recomputed(keeps_attention=True) if mode == "selective" else network.call
        networks.append(network)
    network, plain = networks
    Compiler("aot_eager", pytest.fail).attach(network)

    def numbers(network: Network) -> list[Tensor]:
        tokens = network.entry(torch.linspace(-1, 1, 2 * 6 * WIDTH).view(2, 6, WIDTH))
        text, tokens = network.call(network.blocks[0], tokens, text=tokens[:, :3])
        loss = (text.sum() * tokens.square()).mean()
        return [loss.detach(), *torch.autograd.grad(loss, network.entry.parameters())]

    for found, expected in zip(numbers(network), numbers(plain), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_smaller_budget_keeps_less_and_changes_no_number():
    expected, kept = Network().train().numbers(*SIZES[2]), []
    for budget in (1.0, 0.5, 0.1):
        torch._dynamo.reset()
        network, saved = compiled(memory_budget=budget), {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            assert equal(network.numbers(*SIZES[2]), expected)
        kept.append(sum(saved.values()))

    assert kept[1] < 0.8 * kept[0] and kept[2] < 0.8 * kept[1], kept


def test_without_gradients_blocks_compute_as_they_did():
    network = compiled()

    with torch.no_grad():
        network(torch.ones(2, 4, WIDTH), torch.ones(2, 3, WIDTH))
    network.eval().numbers(24, 5)

    assert not counters["stats"]


@pytest.mark.parametrize("mode", ["all", "every other", "selective"])
def test_compiled_blocks_are_computed_again_with_the_same_dropouts(mode):
    modes = {"all": Recomputed(), "every other": Recomputed(1, 2), "selective": Recomputed(keeps_attention=True)}
    network, plain = compiled(dropout=0.5), Network(dropout=0.5).train()
    network.call = modes[mode]

    assert equal(network.numbers(24, 5), plain.numbers(24, 5))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("call", [None, Recomputed()], ids=["kept", "computed again"])
def test_blocks_that_come_and_go_are_compiled_once(call):
    network, plain = Network().train(), Network().train()
    for one in (network, plain):
        one.blocks.requires_grad_(False)
        one.call = call or one.call
    ring = Offload(network, Memory(blocks_to_swap=3), torch.device("cpu")).ring
    Compiler("aot_eager", print).attach(network)

    for number, (tokens, words) in enumerate(SIZES[:3]):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert equal(network.numbers(tokens, words), plain.numbers(tokens, words))

    assert counters["stats"]["unique_graphs"] == 1
    assert ring.peak_blocks == 2


def test_what_cannot_be_compiled_trains_as_before_and_says_so_once():
    said: list[str] = []
    kinds = (Block, Impatient, Impatient)
    network, plain = compiled(said, kinds=kinds), Network(kinds=kinds).train()

    for sizes in SIZES[:2]:
        assert equal(network.numbers(*sizes), plain.numbers(*sizes))

    assert len(said) == 1
    assert said[0].startswith("Impatient is not compiled and trains as it did before: ")
    assert "\n" not in said[0]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_kind_is_not_given_up_for_what_the_compiler_is_not_to_blame_for():
    """Lack of memory comes out of the compiler in its own words, as whatever is raised inside it does."""
    said: list[str] = []

    def runs_out(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def raise_it(error: Exception) -> None:
        raise error

    network, careless = Network().train(), compiled(said, backend=runs_out)
    compiler = Compiler(runs_out, said.append, raise_other_cause=raise_it)
    compiler.attach(network)

    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="CUDA out of memory"):
        network.numbers(24, 5)
    assert not compiler.failed and not said
    assert equal(careless.numbers(24, 5), Network().train().numbers(24, 5)) and len(said) == 1


def test_memory_that_runs_out_in_a_compiled_block_is_no_error_of_the_compiler():
    said: list[str] = []

    def runs_out(*inputs: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        compiled(said, backend=lambda graph, inputs: runs_out).numbers(24, 5)
    assert not said


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)

    assert "g++" in missing_for(torch.device("cpu"))
    assert missing_for(torch.device("cuda")) == "the package triton is not installed"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nothing again", "all", "selective"])
def test_kernels_give_the_same_numbers_as_without_them(mode, tmp_path, monkeypatch):
    """The loss and all gradients within float32's rounding of each tensor's length; a second time they are the same to the bit."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    modes = {"all": Recomputed(), "selective": Recomputed(keeps_attention=True)}
    network, plain = compiled(backend="inductor", dropout=0.5), Network(dropout=0.5).train()
    network.call = modes.get(mode, network.call)

    for number, sizes in enumerate(SIZES):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = network.numbers(*sizes)
        assert equal(found, network.numbers(*sizes))
        for one, other in zip(found, plain.numbers(*sizes), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9
