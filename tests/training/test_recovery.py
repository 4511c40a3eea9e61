"""Memory that runs out in a step: the same gradients in parts, every sample trained on, and runs that go on to the same bytes."""

from __future__ import annotations

import gc
import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn

from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.errors import MemoryLimitError
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.options.adapters import Adapters
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.memory import Memory
from simpletuner.plugins import load
from simpletuner.training.objective import loss_of, scheduled_sampling_of
from simpletuner.training.parts import WHOLE, drawn_as_whole, parts_of
from simpletuner.training.recovery import Recovery, advice_of, together
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Sample
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.training.families import TINY, family

CPU = torch.device("cpu")
CAPTIONS = ("a cat", "a dog", "a much longer caption", "a red boat", "")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def little_garbage(monkeypatch):
    """Libraries that are loaded stay, so that looking for garbage takes no second each time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gc.freeze()
    yield
    gc.unfreeze()


def pictures(name: str) -> Batch:
    """Five samples of one bucket."""
    built, size = family(name), TINY[name].size
    text = built.encode_text(built.load_text_encoders(CPU, torch.float32), CAPTIONS)
    shape = (len(CAPTIONS), 4, size.height // built.vae_stride, size.width // built.vae_stride)
    mean, std = (torch.randn(*shape, generator=torch.Generator().manual_seed(number)) for number in (0, 1))
    geometry = Geometry(size, size, Crop(0, 0, size.width, size.height))
    samples = tuple(Sample("pictures", f"{number}.png", "00", geometry, (caption,)) for number, caption in enumerate(CAPTIONS))
    return Batch(samples, CAPTIONS, {"mean": mean, "std": std.abs() * 0.1}, text, mask=torch.rand(len(CAPTIONS), 1, *shape[2:]))


class Training:
    """The passes of a step on a tiny model, with dropouts and checkpointing, and a memory that can be made small."""

    def __init__(self, name: str, **options: Any) -> None:
        self.built, diffusion = family(name), Diffusion(**options)
        self.denoiser = self.built.load_denoiser(torch.float32, 0).train()
        kind = Adapters(lora_rank=4, lora_dropout=0.3)
        targets = Targets(self.built.class_aliases, self.built.lora_targets, self.built.denoiser_folder)
        self.adapter = load("simpletuner.adapters.kinds", kind_of(kind), Adapter)(kind, targets)
        torch.manual_seed(0)
        self.adapter.attach(self.denoiser)
        self.parameters = list(self.adapter.parameters().values())
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        enable_checkpointing(self.denoiser, Memory())
        process = self.built.process(diffusion)
        parts = {"family": self.built, "denoiser": self.denoiser, "adapter": self.adapter, "process": process, "device": CPU, "seed": 5, "rank": 0}
        sampling = scheduled_sampling_of(diffusion, self.built.objective)
        self.step = Step(**parts, loss=loss_of(diffusion, process), draws_latents=True, scheduled_sampling=sampling)
        self.calls: list[int] = []
        self.most_samples = len(CAPTIONS)
        self.fails_in_backward = False
        self.denoiser.register_forward_pre_hook(self._look, with_kwargs=True)
        self.denoiser.register_forward_hook(self._hang)

    def _look(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """As an accelerator does when a batch is too large for it."""
        first = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        self.calls.append(len(first))
        if len(first) > self.most_samples and not self.fails_in_backward:
            raise FULL

    def _hang(self, module: nn.Module, arguments: tuple[Any, ...], answer: Any) -> None:
        if self.calls[-1] > self.most_samples and self.fails_in_backward:
            # The last of the adapter's gradients to come: by then most are added up.
            self.parameters[0].register_post_accumulate_grad_hook(self._fail)

    def _fail(self, parameter: Tensor) -> None:
        if self.calls[-1] > self.most_samples:
            raise FULL

    def backward(self, batch: Batch, number: int, rows: slice) -> Tensor:
        with drawn_as_whole(len(batch.samples), rows):
            losses = self.step.losses(batch, 3, number, rows)
            loss = losses.mean() if rows == WHOLE else losses.sum() / len(batch.samples)
            loss.backward()
        return loss.detach()

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self, recovery: Recovery, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
        self.forget()
        loss, taken = recovery.gradients(4, iter(batches), len(batches), self.backward, self.forget)
        assert [sample.id for batch in taken for sample in batch.samples] == [sample.id for batch in batches for sample in batch.samples]
        return loss, [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]


def are_near(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether gradients are equal but for rounding, which is 4e-6 of the largest at most."""
    assert len(found) == len(wanted)
    assert all(bool(b.any()) for b in wanted)
    return all(bool((a - b).abs().max() <= 1e-5 * b.abs().max()) for a, b in zip(found, wanted))


def recovery(**options: Any) -> Recovery:
    return Recovery({"card": "small"}, lambda text: None, **options)


REFLEX = {"scheduled_sampling_max_step_offset": 4, "scheduled_sampling_probability": 1.0, "scheduled_sampling_reflexflow": True}
ROLLOUT = {"scheduled_sampling_max_step_offset": 4, "scheduled_sampling_probability": 0.5}
KINDS = {
    "auraflow": ("auraflow", {}),
    "rolled out": ("auraflow", REFLEX),
    "flux": ("flux", {"distilled_guidance_mode": "random-range"}),
    "sdxl": ("sdxl", {"snr_gamma": 5.0, "offset_noise": True, "input_perturbation": 0.1, **ROLLOUT}),
}


@pytest.mark.parametrize("most_samples", [1, 3])
@pytest.mark.parametrize(("name", "options"), KINDS.values(), ids=KINDS.keys())
def test_parts_of_a_batch_have_the_gradient_of_the_whole(name, options, most_samples):
    training, batches = Training(name, **options), [pictures(name)]
    loss, wanted = training.gradients(recovery(), batches)
    training.most_samples = most_samples

    split_loss, found = training.gradients(recovery(), batches)

    assert max(training.calls) == len(CAPTIONS)
    assert torch.allclose(split_loss, loss, rtol=1e-5)
    assert are_near(found, wanted)


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_gradients_of_earlier_batches_count_once(in_backward):
    batches = [pictures("auraflow")] * 3
    training = Training("auraflow")
    loss, wanted = training.gradients(recovery(), batches)
    training.most_samples, training.fails_in_backward = 2, in_backward

    split_loss, found = training.gradients(recovery(), batches)

    assert torch.allclose(split_loss, loss, rtol=1e-5)
    assert are_near(found, wanted)


def test_memory_that_was_short_once_changes_no_bit_and_splits_nothing():
    training, batches, said = Training("auraflow"), [pictures("auraflow")], []
    loss, wanted = training.gradients(recovery(), batches)
    training.most_samples = 2
    patient = Recovery({}, lambda text: (said.append(text), setattr(training, "most_samples", 5)))  # someone else gave memory back

    found_loss, found = training.gradients(patient, batches)

    assert torch.equal(found_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert said == ["memory ran out in step 4 with pictures of 32x48: tried again"]
    assert not patient.samples_at_once
    assert patient.figures() == {"memory/ran_out": 1.0}
    assert patient.figures() == {}


def test_what_is_left_when_one_sample_is_too_much_is_to_offload_more_and_then_to_say_so():
    training, more = Training("auraflow"), iter([True, True, False])
    training.most_samples = 0
    said: list[str] = []
    short = Recovery({}, said.append, advice_of(Memory(), is_full=False), lambda: next(more))

    with pytest.raises(MemoryLimitError, match="memory ran out in step 4 with a single picture of 32x48") as failed:
        training.gradients(short, [pictures("auraflow")])

    assert [text.rpartition(": ")[2] for text in said] == [
        "tried again",
        "from here on its batches go through 3 at once",
        "from here on its batches go through 2 at once",
        "from here on its batches go through 1 at once",
        "more of the model is offloaded",
        "more of the model is offloaded",
    ]
    assert failed.value.exit_code == 4
    assert "Set gradient_checkpointing_backend to offload, set base_model_precision to int8-quanto" in str(failed.value.hint)
    assert short.describe() == "memory ran out 6 times; no picture was left out; batches of 32x48 went through 1 at once"


def test_any_other_error_is_not_taken_for_too_little_memory():
    def wrong(batch: Batch, number: int, rows: slice) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        recovery().gradients(1, iter([pictures("auraflow")]), 1, wrong, lambda: None)


def test_what_was_learned_is_kept_for_the_same_conditions_alone(tmp_path):
    learned = recovery()
    learned.samples_at_once, learned.events = {"1024x1024": 2}, 3
    learned.saving()(tmp_path)
    same, other = recovery(), Recovery({"card": "large"}, lambda text: None)

    same.load(tmp_path)
    other.load(tmp_path)

    assert (same.samples_at_once, same.events) == ({"1024x1024": 2}, 3)
    assert (other.samples_at_once, other.events) == ({}, 3)


def test_processes_take_as_little_as_the_one_that_takes_least():
    assert together([({"a": 4, "b": 2}, 2), ({"a": 3, "c": 1}, 5), ({}, 0)]) == ({"a": 3, "b": 2, "c": 1}, 5)


def test_parts_hold_every_sample_once():
    for count in range(1, 9):
        for at_once in range(1, 10):
            rows = [index for part in parts_of(count, at_once) for index in range(count)[part]]
            assert rows == list(range(count))
            assert at_once < count or parts_of(count, at_once) == [WHOLE]


def small_memory(monkeypatch, most_samples: int, from_call: int = 0) -> list[int]:
    """Have every AuraFlow run out of memory in training, from some call on, if it gets more samples than so many; gives the sizes it got."""
    calls: list[int] = []
    forward = AuraFlowTransformer2DModel.forward

    def limited(self: nn.Module, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(len(hidden_states))
            if len(hidden_states) > most_samples and len(calls) > from_call:
                raise FULL
        return forward(self, hidden_states, *arguments, **named)

    monkeypatch.setattr(AuraFlowTransformer2DModel, "forward", limited)
    return calls


RUN = {"pictures": 8, "train_batch_size": 4, "report_to": "jsonl"}


def test_a_run_that_went_on_after_a_split_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    calls = small_memory(monkeypatch, 2, from_call=1)
    write_run(tmp_path / "whole", **RUN)
    assert train_in_process(tmp_path / "whole") == 0
    said = " ".join(capsys.readouterr().out.split())
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    (tmp_path / "resumed" / "output" / "pytorch_lora_weights.safetensors").unlink()
    first_calls = list(calls)
    calls.clear()

    assert train_in_process(tmp_path / "resumed") == 0

    assert first_calls == [4, 4, 4, *[2] * 10]  # a step as a whole, two that failed, and each of the others in two
    assert calls == [2] * 6
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")
    assert "memory ran out in step 2 with pictures of 32x32: from here on its batches go through 2 at once" in said
    assert "memory ran out twice; no picture was left out; batches of 32x32 went through 2 at once" in said
    rows = [json.loads(line) for line in (tmp_path / "whole" / "output" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if "memory/ran_out" in row] == [{"step": 2, "memory/ran_out": 2.0, "memory/samples_at_once_32x32": 2.0}]


def test_a_run_for_which_one_picture_is_too_much_is_saved_and_says_what_to_set(tmp_path, monkeypatch, capsys):
    small_memory(monkeypatch, 0, from_call=2)
    write_run(tmp_path, **RUN)

    assert train_in_process(tmp_path) == 4

    said = " ".join(capsys.readouterr().err.split())
    assert "memory ran out in step 3 with a single picture of 32x32" in said
    assert "Set gradient_checkpointing, set base_model_precision to int8-quanto" in said
    assert (tmp_path / "output" / "checkpoint-2").is_dir()
