"""Which blocks wait in main memory, where layers rest, and that real models under real adapters learn the same."""

from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.adapters.adapter import Targets
from simpletuner.adapters.kinds.standard import Standard
from simpletuner.errors import ConfigError
from simpletuner.memory import offload as offload_module
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import (
    Offload,
    base_bytes,
    check_offload,
    footprints,
    is_asked_for,
    placement,
    repeated_blocks,
    spread,
    streamed_blocks,
)
from simpletuner.options.adapters import Adapters
from simpletuner.options.memory import Memory
from simpletuner.types import Noised
from tests.builders.adapted import LOKR, adapt
from tests.builders.lanes import StrictLane
from tests.builders.quantised import quantise
from tests.training.families import family
from tests.training.test_families import CPU, batch_of, start_of

TLORA = {"algo": "tlora", "linear_dim": 4, "apply_preset": {"target_module": ["Attention"]}}
CASES = {
    "auraflow lokr on int8": ("auraflow", "lycoris", LOKR, "int8-quanto", torch.float32),
    "auraflow tlora": ("auraflow", "lycoris", TLORA, "no_change", torch.float32),
    "sdxl lora with dropout": ("sdxl", "standard", {}, "no_change", torch.float32),
    "auraflow lokr in bf16 on int8-rotated": ("auraflow", "lycoris", LOKR, "int8-rotated", torch.bfloat16),
    "flux lora in bf16 on torchao": ("flux", "standard", {}, "int8-torchao", torch.bfloat16),
}
MODES = {
    "no checkpointing": {"gradient_checkpointing": False},
    "all": {},
    "every other": {"gradient_checkpointing_segment_stride": 2},
    "selective": {"gradient_checkpointing_backend": "selective"},
    "offload": {"gradient_checkpointing_backend": "offload", "gradient_checkpointing_offload_bytes": 0},
}
EVERYTHING = {"enable_group_offload": True}


@pytest.mark.parametrize("case", CASES)
def test_no_family_and_no_adapter_learns_otherwise_when_blocks_are_streamed(tmp_path, case, monkeypatch):
    monkeypatch.setattr(offload_module, "Lane", StrictLane)
    name, kind, settings, precision, dtype = CASES[case]
    built = family(name)
    batch = batch_of(name, ("a cat", "a dog"), built.encode_text(built.load_text_encoders(CPU, torch.float32), ["a cat", "a dog"]))
    noised = Noised(start_of(name, 2), start_of(name, 2), torch.tensor([0.3, 0.8]), guidance=torch.ones(2))

    def learn(mode: dict, streams: bool) -> tuple[list[Tensor], Offload]:
        denoiser = built.load_denoiser(dtype, 0)
        quantise(denoiser, precision)
        adapter = adapt(denoiser, built, kind, tmp_path, settings)
        parameters = list(adapter.parameters().values())
        memory = Memory(**mode, **(EVERYTHING if streams else {}))
        offload = Offload(denoiser, memory, CPU)
        adapter.to(CPU)
        enable_checkpointing(denoiser, memory)
        denoiser.train()
        torch.manual_seed(1)  # what dropouts draw
        found = []
        for _ in range(2):
            adapter.at_time(noised.time)
            built.predict(denoiser, noised, batch).float().square().mean().backward()
            found += [parameter.grad for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None
        adapter.train(False)
        adapter.set_strength(0.0)
        with torch.no_grad():
            found.append(built.predict(denoiser.eval(), noised, batch))
        return found, offload

    plain, _ = learn(MODES["no checkpointing"], streams=False)

    for label, mode in MODES.items():
        found, offload = learn(mode, streams=True)
        assert len(found) == len(plain) > 1 and all(torch.equal(a, b) for a, b in zip(found, plain)), label
        assert offload.ring is not None and offload.ring.peak_blocks == offload.ring.room < len(offload.ring.blocks)
    assert any(bool(gradient.any()) for gradient in plain[:-1])


REAL = {"attention_head_dim": 256, "num_attention_heads": 12, "joint_attention_dim": 2048, "caption_projection_dim": 3072, "pos_embed_max_size": 64}


def real_size(device: torch.device, side: int, memory: Memory) -> tuple[list[Tensor], Offload]:
    """Gradients of two steps of a LoRA on three AuraFlow blocks of the released model's width, in bf16."""
    with torch.device("meta"):
        denoiser = AuraFlowTransformer2DModel(sample_size=side, in_channels=4, num_mmdit_layers=0, num_single_dit_layers=3, **REAL).bfloat16()
    denoiser.to_empty(device="cpu")
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()  # again and again: half a billion take long to draw
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(numbers.repeat(-(-parameter.numel() // len(numbers)))[: parameter.numel()].view_as(parameter)).mul_(0.02)
    adapter = Standard(Adapters(lora_rank=4), Targets(suffixes=("to_q", "to_v", "to_out.0")))
    torch.manual_seed(0)
    adapter.attach(denoiser)
    parameters = list(adapter.parameters().values())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    offload = Offload(denoiser, memory, device)
    enable_checkpointing(denoiser.train(), memory)
    torch.manual_seed(1)
    inputs = [tensor.bfloat16().to(device) for tensor in (torch.randn(1, 4, side, side), torch.randn(1, 8, 2048), torch.tensor([0.5]))]
    found = []
    for _ in range(2):
        denoiser(*inputs, return_dict=False)[0].float().square().mean().backward()
        found += [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad = None
    return found, offload


@pytest.mark.slow
def test_gradients_at_the_real_width_are_those_of_the_plain_path():
    plain, _ = real_size(CPU, 8, Memory(gradient_checkpointing=False))

    for is_checkpointed in (True, False):
        found, offload = real_size(CPU, 8, Memory(gradient_checkpointing=is_checkpointed, blocks_to_swap=3))
        assert len(found) == len(plain) and all(torch.equal(a, b) for a, b in zip(found, plain)), is_checkpointed
        assert offload.waiting_bytes > 1e9 and offload.resident_bytes < 0.8 * offload.waiting_bytes
    assert any(bool(gradient.any()) for gradient in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_gradients_on_a_gpu_differ_by_no_more_than_those_of_two_plain_runs(is_checkpointed):
    device, plainly = torch.device("cuda", 0), Memory(gradient_checkpointing=is_checkpointed)
    plain, again = (real_size(device, 64, plainly)[0] for _ in range(2))
    noise = [(a - b).abs().max().item() for a, b in zip(plain, again)]

    for swapped in ({"blocks_to_swap": 2}, {"blocks_to_swap": 3}, EVERYTHING):
        found, _ = real_size(device, 64, plainly.model_copy(update=swapped))
        for mine, theirs, limit in zip(found, plain, noise):
            assert (mine - theirs).abs().max().item() <= 2 * limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_more_is_there_than_is_said():
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)

    _, offload = real_size(device, 8, Memory(blocks_to_swap=3))

    assert torch.cuda.memory_allocated(device) - before <= offload.resident_bytes + 50e6


INPUTS = 1000


class Blocks(nn.Module):
    """Blocks of some sizes, in one list, beside something small."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(INPUTS, width, bias=False)) for width in widths)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return sum((block(x).sum() for block in self.blocks), x.sum())


@pytest.mark.parametrize("name", ["auraflow", "sd3", "flux", "sdxl", "lumina2", "z_image"])
def test_the_repeated_blocks_hold_most_of_a_model_and_no_other_of_them(name):
    blocks = repeated_blocks(family(name).empty_denoiser())

    assert len(blocks) >= 2
    assert not any(one != other and one.startswith(f"{other}.") for one in blocks for other in blocks)


def test_blocks_that_wait_are_evenly_spaced():
    assert spread(3, 9) == [1, 4, 7]
    assert spread(18, 36) == list(range(1, 36, 2))
    assert spread(5, 5) == [0, 1, 2, 3, 4] and spread(0, 5) == []


@pytest.mark.parametrize("limit", [330, 400, 450, 500, 600, 639, 641])
def test_max_resident_weights_is_kept_with_as_few_blocks_as_it_takes(limit):
    net = Blocks([10, 20, 30, 10, 20, 30, 40])
    memory = Memory(max_resident_weights=f"{limit}kB")
    names = streamed_blocks(net, memory)

    offload = Offload(net, memory, CPU)
    net(torch.ones(INPUTS))

    assert base_bytes(net) == 4 * (64 + INPUTS * 160)
    assert offload.resident_bytes <= limit * 1000
    assert (offload.ring is None) == (limit == 641)
    if offload.ring is not None:
        assert [block.name for block in offload.ring.blocks] == names
        assert offload.ring.peak_blocks == offload.ring.room
        fewer = footprints(Blocks([10, 20, 30, 10, 20, 30, 40]), list(repeated_blocks(net)), memory)[: len(names)]
        assert all(footprint.resident_bytes > limit * 1000 for footprint in fewer)


def test_what_is_too_much_is_refused_with_what_there_is():
    net = Blocks([10, 10, 10])

    with pytest.raises(ConfigError, match="has 3 blocks"):
        check_offload(net, Memory(blocks_to_swap=4), CPU)
    with pytest.raises(ConfigError, match=r"at least 0\.1 MB") as error:
        Offload(net, Memory(max_resident_weights="50kB"), CPU)
    assert "base_model_precision" in error.value.hint
    with pytest.raises(ConfigError, match="no repeated blocks"):
        streamed_blocks(nn.Linear(2, 2), Memory(blocks_to_swap=1))
    with pytest.raises(ConfigError, match="from mps"):
        check_offload(net, Memory(blocks_to_swap=1), torch.device("mps"))


def test_a_loader_is_told_where_layers_rest_before_there_are_weights():
    accelerator = torch.device("cuda", 0)
    with torch.device("meta"):
        net = Blocks([10, 10, 10, 10])

    where = placement(net, Memory(blocks_to_swap=2), accelerator)

    assert {name: where(name).type for name in ("head", "blocks.0.0", "blocks.1.0.weight", "blocks.2.0", "blocks.3.0", "blocks.3")} == {
        "head": "cuda",
        "blocks.0.0": "cuda",
        "blocks.1.0.weight": "cpu",
        "blocks.2.0": "cuda",
        "blocks.3.0": "cpu",
        "blocks.3": "cpu",
    }
    assert placement(net, Memory(), accelerator)("blocks.1.0") == accelerator
    tight = Memory(max_resident_weights="100kB")
    assert placement(net, tight, accelerator)("blocks.1.0").type == "cpu"
    assert placement(net, tight, accelerator, lambda name, weight: weight.numel() // 2)("blocks.1.0") == accelerator


class PeakOfMakes(TorchDispatchMode):
    """The largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if isinstance(made, Tensor) and made.device.type == "cpu" and "empty" in str(function):
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


def test_weights_come_into_main_memory_slab_by_slab(monkeypatch):
    monkeypatch.setattr("simpletuner.memory.slabs.LARGEST_BYTES", 1 << 21)
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(512, 512, bias=False).requires_grad_(False) for _ in range(16))  # 1 MiB each

    with PeakOfMakes() as made:
        offload = Offload(net, Memory(**EVERYTHING), CPU)

    assert offload.waiting_bytes == 16 << 20
    assert made.largest == 1 << 21


def test_weights_may_wait_in_files_that_leave_nothing_behind(tmp_path):
    plain, net = Blocks([10, 20, 30]), Blocks([10, 20, 30])
    net.load_state_dict(plain.state_dict())

    offload = Offload(net, Memory(**EVERYTHING, group_offload_to_disk_path=tmp_path / "new"), CPU)

    assert torch.equal(net(torch.ones(INPUTS)), plain(torch.ones(INPUTS)))
    assert "on a disk" in offload.said()[0] and list((tmp_path / "new").iterdir()) == []


def test_more_blocks_wait_when_memory_runs_out_until_all_do():
    plain, net = Blocks([10] * 9), Blocks([10] * 9)
    net.load_state_dict(plain.state_dict())
    offload = Offload(net, Memory(), CPU)
    counts = []

    while offload.more_room():
        assert torch.equal(net(torch.ones(INPUTS)), plain(torch.ones(INPUTS)))
        assert offload.ring is not None
        counts.append(len(offload.ring.blocks))

    assert counts == [2, 4, 8, 9]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values()))


def test_shared_and_trained_weights_stay_where_they_are():
    net = Blocks([10, 10, 10])
    net.blocks[2][0].weight = net.blocks[0][0].weight
    net.blocks[1][0].weight.requires_grad_(True)

    assert Offload(net, Memory(**EVERYTHING), CPU).ring is None
    assert net.blocks[2][0].weight is net.blocks[0][0].weight


def test_nothing_is_asked_for_by_default():
    net = Blocks([10])

    assert not is_asked_for(Memory())
    assert Offload(net, Memory(), CPU).said() == []
