"""Two processes train one adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.builders.run import adapter_bytes, command, write_run
from tests.builders.shards import entries_in


def run(folder: Path) -> str:
    process = command(folder, "--num_processes", "2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_two_processes_share_the_work_and_a_stopped_run_ends_with_the_same_bytes(tmp_path):
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 3, "learning_rate": 0.004}
    write_run(tmp_path / "whole", pictures=8, train_batch_size=1, report_to="jsonl", **schedule)
    said = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    (tmp_path / "resumed" / "output" / "pytorch_lora_weights.safetensors").unlink()

    run(tmp_path / "resumed")

    assert said.count("Done in") == 1  # one process speaks
    rows = [json.loads(line) for line in (tmp_path / "whole" / "output" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004 * 2 / 3, 0.004 / 3])  # optimizer steps
    state = json.loads((tmp_path / "whole" / "output" / "checkpoint-6" / "training_state.json").read_text())
    assert state["position"] == 12
    assert len(entries_in(tmp_path / "whole" / "cache" / "vae")) == 8
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_pictures_and_render_those_of_one(tmp_path):
    looks = {"validation_prompt": "a picture", "num_validation_images": 3, "validation_resolution": "32", "validation_num_inference_steps": 2}
    for name, way in {"shared": "batch-parallel", "alone": "single-gpu"}.items():
        write_run(tmp_path / name, pictures=8, train_batch_size=1, validation_multigpu=way, **looks)
        run(tmp_path / name)

    folders = [tmp_path / name / "output" / "validation_images" for name in ("shared", "alone")]
    names = [sorted(path.name for path in folder.glob("*.png")) for folder in folders]
    assert names[0] == names[1] and sum("base" in name for name in names[0]) == 4  # and their grid
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names[0])
