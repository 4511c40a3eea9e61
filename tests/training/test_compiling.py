"""Runs whose blocks are compiled: they fall back without a compiler, and go on as they would have gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from tests.builders.run import adapter_bytes, add_pictures, train_in_process, write_run
from tests.training.test_recovery import small_memory

LORA = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4, "lora_dropout": 0.3, "train_batch_size": 1}


def test_without_a_compiler_a_run_says_so_and_trains_as_before(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "plain", max_train_steps=2)
    write_run(tmp_path / "wished", max_train_steps=2, dynamo_backend="inductor")
    assert train_in_process(tmp_path / "plain") == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    capsys.readouterr()

    assert train_in_process(tmp_path / "wished") == 0

    assert "dynamo_backend inductor has no effect: no C++ compiler is here (g++)" in capsys.readouterr().out
    assert adapter_bytes(tmp_path / "wished") == adapter_bytes(tmp_path / "plain")


def compile_with(monkeypatch, backend: Callable[..., object]) -> None:
    """Have PyTorch trace blocks as it does, and another make the kernels, which takes no minutes."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, fullgraph=True, backend=backend))
    monkeypatch.setenv("CXX", sys.executable)
    torch._dynamo.reset()


def test_a_signal_while_blocks_are_compiled_ends_the_run_and_is_no_fault_of_the_compiler(tmp_path, monkeypatch, capsys):
    def interrupted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return graph.forward

    compile_with(monkeypatch, interrupted)
    write_run(tmp_path, dynamo_backend="inductor", **LORA)

    assert train_in_process(tmp_path) == 143

    said = " ".join("".join(capsys.readouterr()).split())
    assert "stopped while blocks were compiled" in said and "is not compiled" not in said
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_the_first_batch_goes_through_as_training_does_and_not_at_all_after_the_last_step(tmp_path, monkeypatch, capsys):
    compile_with(monkeypatch, "eager")
    calls = small_memory(monkeypatch, 1)
    options = {"dynamo_backend": "inductor", **LORA, "train_batch_size": 2}

    said = []
    for steps in (1, 2, 2):
        write_run(tmp_path, max_train_steps=steps, **options)
        assert train_in_process(tmp_path) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
        calls.append(0)

    # Tried out, a step as a whole twice, and in two; then both in two; then nothing.
    assert calls == [2, 2, 2, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert "memory ran out while blocks were compiled" in said[0] and "compiled 2 of 2" not in said[0]
    assert "compiled 2 of 2 blocks in" in said[1]
    assert "compil" not in said[2]


def test_an_optimizer_that_is_compiled_says_so_and_names_the_compiler_that_it_lacks(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, max_train_steps=1, optimizer="ao-adamw8bit")
    said = []
    for path in (os.environ["PATH"], str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        with torch.compiler.set_stance("force_eager"):
            code = train_in_process(tmp_path)
        said.append((code, " ".join("".join(capsys.readouterr()).split())))
        shutil.rmtree(tmp_path / "output", ignore_errors=True)

    assert [code for code, _ in said] == [0, 2]
    assert "the first step compiles the optimizer ao-adamw8bit" in said[0][1]
    assert "optimizer ao-adamw8bit is compiled, but no C++ compiler is here (g++)" in said[1][1]


def test_a_memory_budget_is_refused_where_something_drops_out(tmp_path, capsys):
    write_run(tmp_path, max_train_steps=1, dynamo_backend="inductor", activation_memory_budget=0.5)
    settings = json.loads((tmp_path / "lycoris_config.json").read_text())
    (tmp_path / "lycoris_config.json").write_text(json.dumps({**settings, "dropout": 0.1}))

    assert train_in_process(tmp_path) == 2
    assert "activation_memory_budget 0.5 cannot be with dropouts" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.slow
def test_a_compiled_run_that_went_on_gives_the_same_bytes_without_what_was_compiled_before(tmp_path, capsys, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    add_pictures(whole / "pictures", 3)
    add_pictures(whole / "pictures", 3, (40, 72), 3)
    write_run(whole, pictures=0, dynamo_backend="inductor", **LORA)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    assert train_in_process(whole) == 0
    assert "compiled 2 of 2 blocks in" in capsys.readouterr().out
    assert any((whole / "cache" / "compiled").rglob("*.so"))
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "output" / "checkpoint-6")
    (resumed / "output" / "pytorch_lora_weights.safetensors").unlink()
    shutil.rmtree(resumed / "cache" / "compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()

    assert train_in_process(resumed) == 0

    assert adapter_bytes(resumed) == adapter_bytes(whole)
