"""Updates inside the backward pass: the same weights as after it, hardly any gradients at a time, and no step that is half done."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.errors import MemoryLimitError
from simpletuner.memory.tracker import Tracker
from simpletuner.optim.averaging import Averaging, restore_trained, trained_values
from simpletuner.optim.build import build_optimizer, restore, set_rate
from simpletuner.optim.catalogue import OPTIMIZERS
from simpletuner.options.optim import Optim
from simpletuner.training.gradients import clip
from simpletuner.training.release import Release
from tests.builders.run import train_in_process, write_run

APART = [row for row in OPTIMIZERS if not row.is_joint]
FULL = {"model_type": "full", "lora_type": None, "lycoris_config": None, "learning_rate": 1e-3}
RELEASED = {**FULL, "optimizer_release_gradients": True, "grad_clip_method": "tensor"}


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """torchao compiles its step, which takes longer than all of these tests and changes no result here."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Training:
    """A small network with a matrix that is used twice, and the steps of a run on it."""

    def __init__(self, name: str, *, is_released: bool, dtype: torch.dtype = torch.float32, method: str = "tensor") -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128).to(dtype), nn.Linear(128, 64).to(dtype)
        named = {**{f"first.{key}": one for key, one in self.first.named_parameters()}, **dict(self.second.named_parameters())}
        self.parameters = named
        self.options = Optim(optimizer=name, learning_rate=1e-2, max_grad_norm=0.01, grad_clip_method=method)
        self.optimizer = build_optimizer(self.options, named, {"bias": named["bias"]})
        self.release = Release(self.optimizer, self.options) if is_released else None

    def loss(self, number: int) -> Tensor:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(number)).to(self.first.weight.dtype)
        for _ in range(2):
            inputs = self.second(torch.relu(self.first(inputs)))
        return (inputs.float() - 1).square().mean()

    def steps(self, numbers: range) -> list[float]:
        norms = []
        for number in numbers:
            torch.manual_seed(number)
            set_rate(self.optimizer, 1 / (1 + number))
            loss = self.loss(number)
            if self.release is None:
                loss.backward()
                norm = clip(list(self.parameters.values()), self.options.max_grad_norm, self.options.grad_clip_method)
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                self.release.begin(number + 1)
                with self.release.whole_after(True):
                    loss.backward()
                norm = self.release.finish()
            norms.append(norm.item())
        return norms


@pytest.mark.filterwarnings("ignore:.*aged")
@pytest.mark.parametrize("name", [row.name for row in APART])
def test_tensors_that_are_updated_one_by_one_come_out_as_those_updated_together(name):
    if not next(row for row in APART if row.name == name).is_installed:
        pytest.skip("not installed")
    together, alone = Training(name, is_released=False), Training(name, is_released=True)

    norms = together.steps(range(4))

    assert alone.steps(range(4)) == pytest.approx(norms, rel=1e-4)
    assert all(parameter.grad is None for parameter in alone.parameters.values())
    for key, parameter in together.parameters.items():
        torch.testing.assert_close(alone.parameters[key], parameter, rtol=1e-4, atol=1e-6)
    for one, other in zip(together.optimizer.param_groups, alone.optimizer.param_groups):
        assert {key: value for key, value in one.items() if key != "params"} == {key: value for key, value in other.items() if key != "params"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["adamw_bf16", "optimi-lion", "adamw_schedulefree", "soap"])
def test_it_goes_on_from_a_file_bit_for_bit(name, dtype):
    if not next(row for row in APART if row.name == name).is_installed:
        pytest.skip("not installed")
    whole, resumed = (Training(name, is_released=True, dtype=dtype) for _ in range(2))
    whole.steps(range(3))
    file = io.BytesIO()
    torch.save({"optimizer": whole.optimizer.state_dict(), "trained": trained_values(whole.optimizer)}, file)
    with torch.no_grad():
        for key, parameter in resumed.parameters.items():
            parameter.copy_(whole.parameters[key])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    restore(resumed.optimizer, saved["optimizer"])
    restore_trained(resumed.optimizer, saved["trained"])
    assert isinstance(resumed.optimizer, Averaging) == (saved["trained"] is not None)

    assert whole.steps(range(3, 6)) == resumed.steps(range(3, 6))

    assert all(torch.equal(resumed.parameters[key], parameter) for key, parameter in whole.parameters.items())


def test_two_alike_tensors_are_not_rounded_by_the_same_chance():
    weights = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    options = Optim(optimizer="adamw_bf16", learning_rate=1e-3, max_grad_norm=0)
    release = Release(build_optimizer(options, {str(number): weight for number, weight in enumerate(weights)}), options)

    release.begin(1)
    with release.whole_after(True):
        sum(weight.sum() for weight in weights).backward()
    release.finish()

    assert not torch.equal(*weights)


@pytest.mark.parametrize("is_released", [False, True], ids=["held", "released"])
def test_no_more_gradients_are_there_than_of_the_largest_tensors(is_released):
    sizes = [(64, 64), (64, 64), (96, 64), (64, 96), (64, 64), (64, 64), (64, 64)]
    most = Counter[str]()
    with Tracker() as tracker:
        layers = nn.Sequential(*(nn.Linear(wide, high) for high, wide in sizes))

        def look(parameter: Tensor) -> None:
            tracker.name([parameter.grad], "gradients")
            most["bytes"] = max(most["bytes"], tracker.bytes["gradients"])

        for parameter in layers.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        options = Optim(optimizer="adamw_bf16", grad_clip_method="tensor")
        optimizer = build_optimizer(options, dict(layers.named_parameters()))
        release = Release(optimizer, options)
        release.begin(1)
        loss = layers(torch.randn(4, 64)).square().mean()
        with release.whole_after(is_released):
            loss.backward()
    largest, everything = (4 * count([parameter.numel() for parameter in layers.parameters()]) for count in (max, sum))

    assert most["bytes"] == (largest if is_released else everything)


def fails_in_backward(monkeypatch: Any, at_call: int, after_updates: int) -> None:
    """Have memory run out in a backward pass of a run when so many tensors were updated."""
    from simpletuner.training import release

    update, calls = release.Release._update, Counter[str]()

    def failing(self: Release, parameter: Tensor) -> None:
        if self._step >= at_call and len(self._norms) == after_updates and not calls["failed"]:
            calls["failed"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        update(self, parameter)

    monkeypatch.setattr(release.Release, "_update", failing)


def test_a_step_that_is_half_done_is_not_tried_again_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "whole", **RELEASED)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "torn", **RELEASED)
    with monkeypatch.context() as short:
        fails_in_backward(short, at_call=5, after_updates=3)
        assert train_in_process(tmp_path / "torn") == 4
    said = " ".join(capsys.readouterr().err.split())

    assert "memory ran out in step 5 when 3 of" in said and "The last checkpoint is whole" in said
    assert [path.name for path in (tmp_path / "torn" / "output").glob("checkpoint-*")] == ["checkpoint-3"]
    assert train_in_process(tmp_path / "torn") == 0
    assert weights(tmp_path / "torn") == weights(tmp_path / "whole")


def test_a_step_of_which_nothing_is_done_is_tried_again(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "whole", **RELEASED)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "again", **RELEASED)
    fails_in_backward(monkeypatch, at_call=5, after_updates=0)

    assert train_in_process(tmp_path / "again") == 0

    assert "memory ran out in step 5 with pictures of 32x32: tried again" in " ".join(capsys.readouterr().out.split())
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_weights_that_go_on_in_another_format_begin_with_a_new_state(tmp_path, capsys):
    write_run(tmp_path, **FULL, mixed_precision="bf16", optimizer="adamw_bf16", max_train_steps=1)
    assert train_in_process(tmp_path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "full, bf16" in said

    assert train_in_process(tmp_path, "--base_model_default_dtype", "fp32", "--max_train_steps", "2", "--lr_scale") == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "the weights were trained in bfloat16 and now are in float32" in said
    assert "full, float32" in said
    assert "lr_scale multiplies learning_rate 0.001 by 2 pictures a step: 0.002" in said and "rate 0.002" in said


def test_weights_take_another_format_only_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    """What all runs of earlier releases were trained in has to stay where nobody said otherwise."""
    write_run(tmp_path, **FULL, mixed_precision="bf16", optimizer="torch-adamw", max_train_steps=1)
    assert train_in_process(tmp_path) == 0
    further = ("--max_train_steps", "2")
    capsys.readouterr()

    with monkeypatch.context() as nothing:
        nothing.setattr("simpletuner.training.preparing.fill_caches", None)
        assert train_in_process(tmp_path, *further, "--optimizer", "adamw_bf16") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-1 was trained in fp32" in said and "rounded for good" in said and "base_model_default_dtype to fp32 to go on as before" in said

    assert train_in_process(tmp_path, *further, "--optimizer", "adamw_bf16", "--base_model_default_dtype", "bf16") == 0
    assert "the weights were trained in float32 and now are in bfloat16" in " ".join(capsys.readouterr().out.split())

    assert train_in_process(tmp_path, "--max_train_steps", "3") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-2 was trained in bf16" in said and "now is fp32" in said


def test_an_update_that_runs_out_of_memory_names_itself():
    training = Training("torch-adamw", is_released=True)
    release = training.release
    assert release is not None

    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    training.optimizer.step = no_memory  # type: ignore[method-assign]
    release.begin(7)
    with pytest.raises(MemoryLimitError, match="updated the weights in step 7"), release.whole_after(True):
        training.loss(0).backward()

    assert release.is_torn
    assert len(training.optimizer.param_groups) == 2


def test_parts_of_a_batch_are_updated_after_the_last():
    whole, parted = (Training("torch-adamw", is_released=True) for _ in range(2))
    for training, shares in ((whole, 1), (parted, 2)):
        assert training.release is not None
        training.release.begin(1)
        for share in range(shares):
            with training.release.whole_after(share == shares - 1):
                (training.loss(0) / shares).backward()
        training.release.finish()

    for key, parameter in whole.parameters.items():
        torch.testing.assert_close(parted.parameters[key], parameter, rtol=1e-5, atol=1e-7)


def weights(folder: Any) -> bytes:
    return (folder / "output" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
