"""However activations are kept, gradients are the same to the bit; and each way keeps what it says."""

from __future__ import annotations

import gc

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor

from simpletuner.memory.checkpointing import InHostMemory, Recomputed, enable_checkpointing
from simpletuner.options.memory import Memory
from simpletuner.types import Noised
from tests.builders.adapted import adapt
from tests.builders.live_bytes import LiveBytes
from tests.builders.quantised import quantise
from tests.training.families import family
from tests.training.test_families import CPU, batch_of, start_of

MODES = {
    "all": {},
    "every other": {"gradient_checkpointing_segment_stride": 2},
    "selective": {"gradient_checkpointing_backend": "selective"},
    "offload": {"gradient_checkpointing_backend": "offload", "gradient_checkpointing_offload_bytes": 0},
}
CASES = {
    "auraflow lokr": ("auraflow", "lycoris", "no_change", torch.float32),
    "auraflow lokr on int8": ("auraflow", "lycoris", "int8-quanto", torch.float32),
    "sdxl lora with dropout": ("sdxl", "standard", "no_change", torch.float32),
    "flux lora in bf16": ("flux", "standard", "no_change", torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_no_mode_changes_a_gradient(tmp_path, case):
    name, kind, precision, dtype = CASES[case]
    built = family(name)
    batch = batch_of(name, ("a cat", "a dog"), built.encode_text(built.load_text_encoders(CPU, torch.float32), ["a cat", "a dog"]))
    start = start_of(name, 2)

    def gradients(mode: dict | None) -> list[Tensor]:
        denoiser = built.load_denoiser(dtype, 0)
        quantise(denoiser, precision)
        adapter = adapt(denoiser, built, kind, tmp_path)
        parameters = list(adapter.parameters().values())
        enable_checkpointing(denoiser, Memory(gradient_checkpointing=mode is not None, **(mode or {})))
        denoiser.train()
        torch.manual_seed(1)  # what dropouts draw
        built.predict(denoiser, Noised(start, start, torch.tensor([0.3, 0.8]), guidance=torch.ones(2)), batch).float().square().mean().backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    plain = gradients(None)

    for label, mode in MODES.items():
        found = gradients(mode)
        assert len(found) == len(plain) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, plain)), label
    assert any(bool(gradient.any()) for gradient in plain)


class Deep:
    """An AuraFlow of eight blocks, large enough that activations matter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        heads = {"attention_head_dim": 16, "num_attention_heads": 4, "caption_projection_dim": 64, "joint_attention_dim": 32}
        self.denoiser = AuraFlowTransformer2DModel(sample_size=32, in_channels=4, num_mmdit_layers=0, num_single_dit_layers=8, **heads).train()
        self.inputs = (torch.randn(1, 4, 32, 32), torch.randn(1, 16, 32), torch.tensor([0.5]))

    def kept(self, blocks: Recomputed | None) -> int:
        """Bytes that are alive between the two passes."""
        if blocks is not None:
            self.denoiser.enable_gradient_checkpointing(blocks)
        with LiveBytes() as live:
            answer = self.denoiser(*self.inputs, return_dict=False)[0]
            gc.collect()
            kept = live.now
        answer.sum().backward()
        return kept


TOKENS, WIDTH, FLOAT, BLOCKS = 256 + 16 + 8, 64, 4, 8
INPUT = TOKENS * WIDTH * FLOAT
"""Bytes of a block's input: text, registers and picture tokens."""


@pytest.fixture(scope="module")
def kept() -> dict[str, int]:
    ways = {"nothing": None, "all": Recomputed(), "every other": Recomputed(1, 2), "selective": Recomputed(keeps_attention=True)}
    return {label: Deep().kept(blocks) for label, blocks in ways.items()}


def test_checkpointing_all_blocks_keeps_their_inputs_and_little_else(kept):
    assert INPUT * BLOCKS <= kept["all"] < 1.5 * INPUT * BLOCKS
    assert kept["nothing"] > 10 * kept["all"]


def test_every_other_block_keeps_half_of_the_activations(kept):
    assert kept["every other"] == pytest.approx((kept["nothing"] + kept["all"]) / 2, rel=0.05)


def test_selective_keeps_what_attention_answers_besides(kept):
    answers = BLOCKS * (INPUT + TOKENS * 4 * FLOAT)  # of each block its attention's answer, and a sum for each token and head

    assert kept["selective"] - kept["all"] == pytest.approx(answers, rel=0.05)


def test_offload_moves_inputs_that_are_large_enough_out_of_the_device(kept):
    """NumPy's memory stands for the host's: what is there is not counted."""
    moved: list[int] = []

    def away(tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return torch.frombuffer(bytearray(tensor.detach().numpy().tobytes()), dtype=tensor.dtype).view(tensor.shape)

    left = Deep().kept(Recomputed(waiting=InHostMemory(INPUT, away)))

    assert moved == [INPUT] * BLOCKS
    assert kept["all"] - left == pytest.approx(INPUT * (BLOCKS - 1), rel=0.15)  # the last answer is still in use


def test_small_inputs_stay():
    moved: list[int] = []

    def away(tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return tensor.clone()

    Deep().kept(Recomputed(waiting=InHostMemory(INPUT + 1, away)))

    assert not moved
