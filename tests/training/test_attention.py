"""Whatever computes attention, every family answers the same, and what cannot run is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simpletuner.models.attention import Switch, dispatched
from simpletuner.options.memory import Memory
from simpletuner.training.attention import Attention, attention_of
from simpletuner.types import Noised
from tests.builders.run import train_in_process, write_run
from tests.training.families import TINY, family
from tests.training.test_families import CPU, batch_of, start_of


class Calls(TorchFunctionMode):
    """Counts PyTorch's attention, and how often it is given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.masked = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function is F.scaled_dot_product_attention:
            self.count += 1
            self.masked += named.get("attn_mask", arguments[3] if len(arguments) > 3 else None) is not None
        return function(*arguments, **named)


@pytest.mark.parametrize("name", TINY)
def test_every_attention_of_a_family_is_computed_by_what_is_chosen(name):
    captions = ("a cat", "a much longer prompt")
    built = family(name)
    denoiser = built.load_denoiser(torch.float32, 0)
    batch = batch_of(name, captions, built.encode_text(built.load_text_encoders(CPU, torch.float32), captions))
    noised = Noised(start_of(name, 2), start_of(name, 2), torch.tensor([0.3, 0.8]), guidance=torch.ones(2))
    seen, math = [], dispatched("_native_math")

    def counted(*tensors: Tensor, **named: Any) -> Tensor:
        seen.append(named)
        return math(*tensors, **named)

    with torch.no_grad():
        with Calls() as calls:
            plain = built.predict(denoiser, noised, batch)
        attention = Attention(counted)
        attention.attach(denoiser)
        answer = built.predict(denoiser, noised, batch)
        with attention.in_pictures():
            as_it_was = built.predict(denoiser, noised, batch)

    assert len(seen) == calls.count > 0
    assert torch.allclose(answer, plain, atol=1e-5)
    assert torch.equal(as_it_was, plain)
    assert built.masks_attention or not calls.masked


def test_what_is_computed_the_model_s_own_way_is_left_alone():
    layer = nn.Identity()
    layer.processor = None
    before = layer.forward

    attention_of(Memory(attention_mechanism="native"), family("auraflow"), CPU).attach(layer)

    assert layer.forward == before


def test_gradients_under_checkpointing_are_those_of_the_same_attention():
    built = family("auraflow")
    batch = batch_of("auraflow", ("a cat",), built.encode_text(built.load_text_encoders(CPU, torch.float32), ["a cat"]))
    noised = Noised(start_of("auraflow"), start_of("auraflow"), torch.tensor([0.3]))
    found = []
    for checkpointed in (False, True):
        denoiser = built.load_denoiser(torch.float32, 0).train().requires_grad_(True)
        switch = Switch(dispatched("_native_math"))
        switch.attach(denoiser)
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        built.predict(denoiser, noised, batch).square().mean().backward()
        found.append([parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None])

    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_mechanism": "flash-attn-2"}, "flash-attn-2 needs a device of type cuda"),
        ({"attention_mechanism": "sageattention", "sageattention_usage": "training"}, "sageattention needs a device of type cuda"),
        ({"attention_mechanism": "flash"}, "did you mean 'flash-attn'?"),
    ],
    ids=["no GPU", "sage", "unknown"],
)
def test_what_cannot_run_ends_the_run_before_anything_is_loaded(tmp_path, capsys, options, said):
    write_run(tmp_path, **options)

    assert train_in_process(tmp_path) == 2

    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache").exists()


def test_a_run_trains_and_renders_with_another_attention(tmp_path, capsys):
    looking = {"validation_prompt": "a cat", "validation_resolution": "32", "validation_num_inference_steps": 1}
    write_run(tmp_path, attention_mechanism="native-math", gradient_checkpointing=True, max_train_steps=2, **looking)

    assert train_in_process(tmp_path) == 0

    assert len(list((tmp_path / "output" / "validation_images").glob("step_00002_*.png"))) == 2
