"""Runs whose captions vary although their embeddings are cached."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.builders.run import adapter_bytes, add_pictures, train_in_process, write_run

DATASET = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "textfile"}
VARIED = {"caption_shuffle": {"count": 3, "position_start": 1}, "caption_tag_dropout": 0.2, "caption_wildcards": True}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def lay(folder: Path, filters: list[str] | None = None, tags: str = "red, on {grass|sand}, at night", **keys: Any) -> None:
    """Lay a run into `folder`, or change the settings of the one that is there."""
    if not (folder / "pictures").exists():
        add_pictures(folder / "pictures", 6)
    for path in (folder / "pictures").glob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem}, {tags}")
    write_run(folder, datasets=[{**DATASET, **keys}])
    if filters:
        plan = folder / "multidatabackend.json"
        images, texts = json.loads(plan.read_text())
        plan.write_text(json.dumps([images, {**texts, "caption_filter_list": filters}]))


def encoded(said: str) -> int:
    """How many captions a run says that it encoded."""
    found = re.findall(r"text embeddings: \d+/(\d+)", said)
    return int(found[-1]) if found else 0


def start(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert train_in_process(folder, *arguments) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_with_varied_captions_gives_the_same_bytes(tmp_path, capsys):
    lay(tmp_path / "whole", **VARIED)
    said = start(tmp_path / "whole", capsys)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    (tmp_path / "resumed" / "output" / "pytorch_lora_weights.safetensors").unlink()

    again = start(tmp_path / "resumed", capsys)

    made = re.search(r"6 captions in 4 versions make (\d+) text embeddings", said)
    assert made and said.count(made[0]) == 2  # before they are made, and in the summary
    assert encoded(said) == int(made[1]) + 1  # and the empty one
    assert encoded(again) == 0 and "resumed from checkpoint-3" in again and "changed since the checkpoint" not in again
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")


def test_changed_settings_take_effect_and_encode_only_what_is_new(tmp_path, capsys):
    shuffle = {"include_original": False, "split_on": "comma"}
    lay(tmp_path, tags="red, on grass", caption_shuffle={**shuffle, "count": 40})
    assert encoded(start(tmp_path, capsys)) == 6 * 6 + 1

    lay(tmp_path, tags="red, on grass", caption_shuffle={**shuffle, "count": 41})
    more = start(tmp_path, capsys, "--max_train_steps", "7")
    lay(tmp_path, tags="red, on grass", caption_shuffle={**shuffle, "count": 40, "position_start": 1})
    kept = start(tmp_path, capsys, "--max_train_steps", "8")
    lay(tmp_path, ["s/grass/sand/"], tags="red, on grass", caption_shuffle={**shuffle, "count": 40, "position_start": 1})
    filtered = start(tmp_path, capsys, "--max_train_steps", "9")

    assert [encoded(said) for said in (more, kept, filtered)] == [0, 0, 6 * 2]
    assert all("changed since the checkpoint" in said for said in (more, kept, filtered))


def test_captions_that_filters_empty_are_counted_and_trained(tmp_path, capsys):
    lay(tmp_path, ["picture_003", "s/picture_00[45]//", "dog"], tags="")

    said = start(tmp_path, capsys)

    assert "3 of 6 captions have no words left: trained without words of their own" in said
    assert "caption_filter_list: 'dog' is found in no caption" in said
    assert encoded(said) == 3 + 1


def test_a_caption_that_is_too_long_counts_once_whatever_its_versions(tmp_path, capsys):
    lay(tmp_path, tags=", ".join(f"word{number}" for number in range(30)), caption_shuffle={"count": 3})

    said = start(tmp_path, capsys)

    assert "6 captions are, in 24 versions, longer than the 24 tokens" in said


def test_a_dry_run_says_how_captions_vary(tmp_path, capsys):
    lay(tmp_path, ["dog"], **VARIED)

    said = start(tmp_path, capsys, "--dry-run")

    assert "captions: textfile, with wildcards, 1 filter, 20% of tags dropped, tags shuffled" in said
