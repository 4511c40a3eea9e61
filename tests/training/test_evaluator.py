"""The loss on held-out pictures where memory is short: the same figures in parts, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn

from tests.builders.run import adapter_bytes, add_pictures, train_in_process, write_run

HELD_OUT = {"id": "others", "instance_data_dir": "others", "caption_strategy": "filename", "dataset_type": "eval", "crop": True}
OPTIONS = {"max_train_steps": 2, "train_batch_size": 4, "eval_steps_interval": 0, "num_eval_images": 2, "eval_timesteps": 5, "report_to": "jsonl"}
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def lay(folder: Path) -> Path:
    add_pictures(folder / "others", 2, first=50)
    own = {"id": "pictures", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True}
    write_run(folder, datasets=[own, HELD_OUT], **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run for which there was memory enough."""
    folder = lay(tmp_path_factory.mktemp("whole"))
    assert train_in_process(folder) == 0
    return folder


def little_memory(monkeypatch, most: int) -> list[int]:
    """Have every look at an AuraFlow run out of memory that is given more samples than so many; gives the numbers that it is given."""
    calls: list[int] = []
    forward = AuraFlowTransformer2DModel.forward

    def limited(self: nn.Module, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            calls.append(len(hidden_states))
            if len(hidden_states) > most:
                raise FULL
        return forward(self, hidden_states, *arguments, **named)

    monkeypatch.setattr(AuraFlowTransformer2DModel, "forward", limited)
    return calls


def rows_of(folder: Path, name: str = "evaluation.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "output" / name).read_text().splitlines()]


def test_losses_in_parts_are_those_of_the_whole_and_each_event_is_said(whole, tmp_path, monkeypatch, capsys):
    calls = little_memory(monkeypatch, 2)

    assert train_in_process(lay(tmp_path / "short")) == 0

    assert calls[:8] == [4, 4, 2, 2, 1, 2, 2, 1]  # tried again, then in two; the second picture is not tried whole any more
    for short, wanted in zip(rows_of(tmp_path / "short"), rows_of(whole), strict=True):
        assert short == pytest.approx(wanted, rel=1e-6)
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "memory ran out in the held-out loss of step 0 with pictures of 32x32: tried again" in said
    assert "memory ran out in the held-out loss of step 0 with pictures of 32x32: from here on its batches go through 2 at once" in said
    assert "memory ran out twice; no picture was left out; batches of held-out 32x32 went through 2 at once" in said
    logged = [row for row in rows_of(tmp_path / "short", "logs/metrics.jsonl") if "memory/ran_out" in row]
    assert logged == [{"step": 1, "memory/ran_out": 2.0, "memory/samples_at_once_held-out_32x32": 2.0}]


def test_a_look_that_is_too_much_at_one_time_ends_no_run_and_leaves_no_half_mean(whole, tmp_path, monkeypatch, capsys):
    little_memory(monkeypatch, 0)

    assert train_in_process(lay(tmp_path / "short")) == 0

    assert not (tmp_path / "short" / "output" / "evaluation.jsonl").exists()
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "memory ran out in the held-out loss of step 0 with pictures of 32x32, one at once" in said
    assert "no held-out loss of step 2: there was too little memory. Offloading (enable_group_offload) takes less." in said
