"""Embeddings lie where the datasets whose captions they are say, caches may lie in a bucket, and a second run encodes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from simpletuner.cli.main import main
from simpletuner.data import bucket_shelf
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError
from tests.builders.run import add_pictures, train_in_process, write_run
from tests.builders.s3 import BUCKET, SECRET, emptied, keys_of, served

endpoint = pytest.fixture(scope="module", name="endpoint")(served)
PLAIN = {"type": "local", "caption_strategy": "filename", "crop": True, "crop_style": "center"}


@pytest.fixture(autouse=True)
def small_disk(monkeypatch) -> None:
    """Machines on which tests run may have little room."""
    monkeypatch.setattr(bucket_shelf, "FREE_BYTES", 0)


def prompts_in(folder: Path) -> set[str]:
    """The prompts that a cache holds, by its exported index."""
    store = Store(folder)
    assert store.keys()
    assert main(["cache", "export", str(folder), str(folder.with_name(folder.name + "-plain"))]) == 0
    index = json.loads((folder.with_name(folder.name + "-plain") / "index.json").read_text())
    return {entry["about"]["prompt"] for entry in index["entries"].values()}


def test_captions_lie_where_their_datasets_say_and_all_else_in_the_default(tmp_path, capsys):
    add_pictures(tmp_path / "pictures", 3)
    add_pictures(tmp_path / "more", 3, first=2)
    datasets = [
        {**PLAIN, "id": "pictures", "instance_data_dir": "pictures"},
        {**PLAIN, "id": "more", "instance_data_dir": "more", "text_embeds": "own"},
        {"id": "own", "dataset_type": "text_embeds", "cache_dir": "cache/own"},
    ]
    write_run(tmp_path, datasets=datasets, max_train_steps=2, caption_dropout_probability=0.1)

    assert train_in_process(tmp_path) == 0

    assert prompts_in(tmp_path / "cache/text") == {"", "picture 000", "picture 001", "picture 002"}
    assert prompts_in(tmp_path / "cache/own") == {"picture 002", "picture 003", "picture 004"}
    capsys.readouterr()
    assert train_in_process(tmp_path, "--max_train_steps", "3") == 0
    said = capsys.readouterr().out
    assert "text embeddings:" not in said and "made again" not in said


def test_a_run_whose_caches_lie_in_a_bucket_is_encoded_once_for_all_machines(tmp_path, capsys, endpoint, monkeypatch):
    client = emptied(endpoint)
    monkeypatch.chdir(tmp_path)
    keys = keys_of(endpoint, aws_data_prefix="run")
    datasets = [
        {**PLAIN, "id": "pictures", "instance_data_dir": "pictures", "image_embeds": "latents"},
        {"id": "words", "dataset_type": "text_embeds", "default": True, **keys},
        {"id": "latents", "dataset_type": "image_embeds", **keys},
    ]
    write_run(tmp_path, datasets=datasets, max_train_steps=2)
    entries = json.loads(Path("multidatabackend.json").read_text())
    Path("multidatabackend.json").write_text(json.dumps(entries[:-1]))

    assert train_in_process(tmp_path) == 0
    assert "6/6 images" in capsys.readouterr().out
    shutil.rmtree("cache/buckets")  # another machine, as far as the caches go
    assert train_in_process(tmp_path, "--max_train_steps", "4") == 0

    shown = capsys.readouterr()
    assert "latents:" not in shown.out and "text embeddings:" not in shown.out and "made again" not in shown.out
    names = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert {name.rsplit("/", 1)[0] for name in names} == {"run/text/auraflow", "run/vae/auraflow/pictures"}
    assert SECRET not in shown.out + shown.err and not any(
        SECRET.encode() in path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()
    )
    check_commands(capsys)


def test_what_was_made_on_demand_and_cannot_be_uploaded_is_said_at_the_end_and_kept(tmp_path, capsys, endpoint, monkeypatch):
    client = emptied(endpoint)
    monkeypatch.chdir(tmp_path)
    datasets = [
        {**PLAIN, "id": "pictures", "instance_data_dir": "pictures", "image_embeds": "latents"},
        {"id": "latents", "dataset_type": "image_embeds", **keys_of(endpoint, aws_data_prefix="run")},
    ]
    write_run(tmp_path, datasets=datasets, max_train_steps=1, vae_cache_ondemand=True)
    real = bucket_shelf.Bucket.write

    def refuse(self, name, data):
        if name.startswith("shard-"):
            raise DatasetError(f"{self.where(name)} cannot be written: access is denied", hint="Ask for access.")
        real(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(bucket_shelf.Bucket, "write", refuse)
        assert train_in_process(tmp_path) == 0
    said = capsys.readouterr().err.splitlines()

    [line] = [line for line in said if line.startswith("warning: s3://caches/run/vae/")]
    assert "cannot be written: access is denied. Ask for access. What was made lies in cache/buckets/" in line
    assert train_in_process(tmp_path, "--max_train_steps", "2") == 0
    assert "warning:" not in capsys.readouterr().err
    assert any(item["Key"].endswith(".safetensors") for item in client.list_objects_v2(Bucket=BUCKET)["Contents"])


def check_commands(capsys) -> None:
    """Each action of `simpletuner cache` works on these caches, or refuses in a sentence."""
    config = ["--config", "config.json"]
    latents = "s3://caches/run/vae/auraflow/pictures"

    assert main(["cache", "ls", "--json", *config]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["folder"].split(" at ")[0]: (row["entries"], row["last_used"]) for row in rows}[latents] == (6, None)
    assert main(["cache", "verify", latents, *config]) == 0
    assert "6 entries, all whole" in capsys.readouterr().out
    assert main(["cache", "gc", "--json", *config]) == 0
    assert [row["dropped"] for row in json.loads(capsys.readouterr().out)] == [0, 0]
    assert main(["cache", "export", latents, "plain", *config]) == 0
    assert len(json.loads(Path("plain/index.json").read_text())["entries"]) == 6
    capsys.readouterr()
    assert main(["cache", "gc", "--older-than", "3", *config]) == 2
    assert "--older-than: nobody notes when s3://caches/run/" in " ".join(capsys.readouterr().err.split())
    assert main(["cache", "ls", "s3://caches/other", *config]) == 2
    assert "is no cache of this config" in " ".join(capsys.readouterr().err.split())
