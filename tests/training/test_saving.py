"""Checkpoints that are written behind the run: the bytes of their step, none lost, no failure lost, and nobody leaves before they are there."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.adapter import Keep, Write
from simpletuner.console import Console
from simpletuner.errors import SimpleTunerError
from simpletuner.optim.build import build_optimizer
from simpletuner.options.optim import Optim
from simpletuner.training import saving
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.saving import Copies, Count, GivenUp, Saver, save_torch
from simpletuner.training.signals import StopRequest

CPU = torch.device("cpu")


class Run:
    """A saver, its output folder, and a weight that goes on changing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weight, self.said, self.saved = folder, torch.zeros(1000), StringIO(), []
        self.gate, self.stop = threading.Event(), StopRequest()
        self.gate.set()
        self.failure: Exception | None = None
        self.checkpoints = CheckpointFolder(folder, 2, pytest.fail)
        self.saver = Saver(self.checkpoints, CPU, Console(stream=self.said, width=300), self.stop, self._saved)

    def _saved(self, path: Path) -> None:
        self.saved.append((path.name, path.is_dir(), threading.current_thread() is threading.main_thread()))

    def content(self, keep: Keep) -> Sequence[Write]:
        kept = keep({"weight": self.weight})

        def write(folder: Path) -> None:
            assert self.gate.wait(20)
            if self.failure is not None:
                raise self.failure
            save_torch(kept, folder / "weight.pt", self.saver.go_on)

        return [write]

    def save(self, step: int, **named: Any) -> None:
        self.weight.fill_(step)
        self.saver.save(step, self.content, **named)

    def steps(self) -> list[int]:
        return [one.step for one in self.checkpoints.all()]

    def value(self, step: int) -> float:
        return float(torch.load(self.folder / f"checkpoint-{step}" / "weight.pt")["weight"].unique())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.gate.set()
    made.saver._thread.shutdown()


def test_a_checkpoint_holds_what_there_was_at_its_step_and_has_no_name_until_it_is_whole(run):
    run.gate.clear()
    run.save(3)
    run.weight.fill_(99)  # training goes on

    assert run.steps() == [] and run.saved == []

    run.gate.set()
    run.saver.finish()

    assert run.steps() == [3] and run.value(3) == 3 and run.checkpoints.all()[0].problem() is None
    assert run.saved == [("checkpoint-3", True, False)]  # told by the thread that wrote it, once it had its name


def test_a_second_save_waits_for_the_first_and_older_ones_go_after_it_is_there(run):
    run.gate.clear()
    run.save(1)
    threading.Timer(0.1, run.gate.set).start()

    run.save(2)

    assert 1 in run.steps()
    run.save(3)
    run.saver.finish()
    assert run.steps() == [2, 3] and run.value(2) == 2


def test_the_last_one_is_written_at_once_and_the_same_step_only_once(run):
    run.save(1)
    run.save(2, is_last=True)

    assert run.steps() == [1, 2] and run.saved[-1] == ("checkpoint-2", True, True)
    run.save(2, is_last=True)
    assert len(run.saved) == 2


@pytest.mark.parametrize("ends", [None, RuntimeError("a fault"), SimpleTunerError("no number")], ids=["the last step", "a fault", "an error of ours"])
def test_nobody_leaves_before_what_was_begun_is_there(run, ends):
    def body() -> None:
        with run.saver.running():
            run.gate.clear()
            run.save(5)
            threading.Timer(0.1, run.gate.set).start()
            if ends:
                raise ends

    if ends:
        with pytest.raises(type(ends), match=str(ends)):
            body()
    else:
        body()

    assert run.steps() == [5] and run.checkpoints.all()[0].problem() is None


@pytest.mark.parametrize("way", ["check", "finish", "save"])
def test_a_write_that_fails_is_raised_as_it_was_by_whatever_comes_next(run, way):
    run.save(1)
    run.saver.finish()
    run.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weight.pt")
    run.save(2)
    run.saver.settle()

    with pytest.raises(OSError) as raised:
        {"check": run.saver.check, "finish": run.saver.finish, "save": lambda: run.save(3)}[way]()

    assert raised.value is run.failure and run.steps() == [1]


def test_a_write_that_fails_while_the_run_ends_for_another_reason_is_said(run):
    with pytest.raises(SimpleTunerError, match="no number"), run.saver.running():
        run.failure = OSError(errno.ENOSPC, "No space left on device")
        run.save(2)
        raise SimpleTunerError("no number")

    assert "last checkpoint was not written" in run.said.getvalue() and "No space" in run.said.getvalue()


def test_an_output_folder_that_is_gone_is_an_error(run):
    run.gate.clear()
    run.save(1)
    for _ in range(200):
        if (staged := run.folder / "checkpoint-1.tmp").is_dir():
            break
        time.sleep(0.01)
    staged.rmdir()
    run.gate.set()

    with pytest.raises(FileNotFoundError):
        run.saver.finish()


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(run):
    child = os.fork()
    if child == 0:
        run.save(1)
        run.saver.finish()
        run.gate.clear()
        run.save(2)
        time.sleep(20)
        os._exit(1)
    deadline = time.monotonic() + 20
    while not (run.folder / "checkpoint-2.tmp").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    assert (run.folder / "checkpoint-2.tmp").is_dir()
    latest = run.checkpoints.latest()
    assert latest is not None and latest.step == 1


def test_a_second_signal_gives_up_what_is_written(run):
    def ask() -> None:
        run.stop.is_urgent = True
        run.gate.set()

    with pytest.raises(RuntimeError, match="at once"), run.saver.running():
        run.gate.clear()
        run.save(1)
        threading.Timer(0.1, ask).start()
        raise RuntimeError("at once")

    assert run.steps() == [] and run.said.getvalue() == ""


def test_a_large_file_is_given_up_in_its_middle(tmp_path):
    asked = []

    def go_on() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise GivenUp

    with pytest.raises(GivenUp):
        save_torch({str(number): torch.zeros(100_000) for number in range(50)}, tmp_path / "many.pt", go_on)

    assert (tmp_path / "many.pt").stat().st_size < 3_000_000


def test_where_main_memory_is_short_the_run_waits_for_the_disk_and_says_so_once(run, monkeypatch):
    monkeypatch.setattr(saving, "left_in_main", lambda: 7_999)  # the weight has 4,000 bytes
    run.save(1)

    assert run.steps() == [1] and run.saved == [("checkpoint-1", True, True)]
    run.save(2)
    assert run.said.getvalue().count("training waits while checkpoints are written") == 1
    monkeypatch.setattr(saving, "left_in_main", lambda: 8_000)
    run.save(3)
    run.saver.finish()
    assert run.saved[-1] == ("checkpoint-3", True, False)


def stepped(name: str) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = {str(number): nn.Parameter(torch.randn(4096 + number)) for number in range(3)}
    optimizer = build_optimizer(Optim(optimizer=name), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def saved_bytes(content: object) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTENTS: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: stepped("torch-adamw").state_dict(),
    "AdamW in bf16": lambda: stepped("adamw_bf16").state_dict(),
    "state in 8 bits of torchao": lambda: stepped("ao-adamw8bit").state_dict(),
    "state in 8 bits of bitsandbytes": lambda: stepped("bnb-adamw8bit").state_dict(),
    "views of one storage": lambda: dict(zip("abc", torch.arange(30.0).reshape(3, 10))),
    "one tensor twice, a transposed one, a part": lambda: [x := torch.randn(4, 6), (x, {"t": x.T.contiguous().T}), torch.randn(9)[2:5], None, "x"],
}


SLOW = ("state in 8 bits of torchao",)  # compiles its step


@pytest.mark.parametrize("make", [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, make in CONTENTS.items()])
def test_copies_are_saved_as_the_same_bytes_and_share_nothing(make):
    content = make()
    before = saved_bytes(content)

    copied = Copies(CPU)(content)

    assert saved_bytes(copied) == before
    for tensor in saving.tensors_in(content):
        for part in saving.parts_of(tensor):
            part.zero_()
    assert saved_bytes(copied) == before


def test_what_copies_take_is_counted_once_for_each_tensor():
    one: Tensor = torch.zeros(100)
    exact, rounded = Count(is_rounded=False), Count(is_rounded=True)

    for count in (exact, rounded):
        assert count({"a": one, "b": [one, torch.zeros(3)]})["a"] is one

    assert exact.bytes == 412 and rounded.bytes == 512 + 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a card copies by itself")
def test_a_card_is_asked_nothing_and_changes_nothing_before_it_is_copied(tmp_path):
    weights = {str(number): torch.zeros(1 << 22, device="cuda") for number in range(8)}
    copies = Copies(torch.device("cuda"))
    copies(weights)  # page-locked memory is made here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = copies(weights)
        for weight in weights.values():
            weight.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copies.wait(tmp_path)

    assert all(one.device.type == "cpu" and one.is_pinned() and not one.any() for one in kept.values())
