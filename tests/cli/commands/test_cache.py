"""`simpletuner cache`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.cli.main import main
from simpletuner.data.store import Store, key_of
from tests.builders.run import add_pictures, train_in_process, write_run
from tests.builders.s3 import BUCKET, emptied, keys_of, served
from tests.builders.shards import damage_entries, entries_in, flip, places_in, shards_in

endpoint = pytest.fixture(scope="module", name="endpoint")(served)


def key(number: int) -> str:
    return key_of(number=number)


def fill(folder: str, count: int, **facts: str) -> None:
    store = Store(Path(folder))
    for number in range(count):
        store.put(key(number), {"mean": torch.full((50,), float(number))}, {"sample": f"cats/{number}.png", **facts})
    store.close()


def cache(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["cache", *words])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


def test_ls_tables_every_cache_below_a_folder(capsys):
    fill("kept/vae/cats", 12, kind="latents", vae="0123456789abcdef" * 2)
    fill("kept/text", 3, kind="text", encoders="f" * 32)

    code, shown, _ = cache(capsys, "ls", "kept")

    lines = [line.split() for line in shown.splitlines()[1:]]
    assert code == 0
    assert [line[:5] for line in lines] == [["kept/text", "text", "encoders", "ffffffff", "3"], ["kept/vae/cats", "latents", "vae", "01234567", "12"]]
    assert all(line[-2] == time.strftime("%Y-%m-%d") for line in lines)
    rows = json.loads(cache(capsys, "ls", "kept", "--json")[1])
    assert [(row["folder"], row["entries"], row["about"]["kind"]) for row in rows] == [("kept/text", 3, "text"), ("kept/vae/cats", 12, "latents")]


def test_ls_calls_masks_masks(capsys):
    fill("kept/masks", 2, kind="mask", vae="0" * 32)

    assert "kept/masks masks" in " ".join(cache(capsys, "ls", "kept")[1].split())


def test_ls_looks_where_the_config_keeps_its_caches(capsys, write_config):
    write_config(cache_dir="kept")
    datasets = [{"id": "pictures", "instance_data_dir": "gone", "caption_strategy": "filename", "cache_dir_vae": "elsewhere/{id}"}]
    Path("datasets.json").write_text(json.dumps(datasets))
    fill("kept/vae/old", 1, kind="latents")
    fill("elsewhere/pictures", 2, kind="latents")
    fill("neither", 3, kind="latents")

    code, shown, _ = cache(capsys, "ls")

    assert code == 0
    assert "kept/vae/old" in shown and "elsewhere/pictures" in shown and "neither" not in shown


@pytest.mark.parametrize("words", [["ls", "nowhere"], ["verify", "."], ["gc", "empty"], ["export", "empty", "to"], ["export", "empty"]])
def test_a_folder_without_a_cache_is_named(capsys, words):
    Path("empty").mkdir()

    code, _, said = cache(capsys, *words)

    assert code == 2 and "hint:" in said and any(word in said for word in (*words[1:], "export takes"))


def test_verify_lists_what_is_damaged_and_drops_it_if_asked(capsys):
    fill("kept/vae", 5, kind="latents")
    fill("kept/text", 5, kind="text")
    assert cache(capsys, "verify", "kept")[0] == 0
    [path] = shards_in(Path("kept/vae"))
    flip(path, places_in(path)[key(3)].offset + 250)

    code, shown, _ = cache(capsys, "verify", "kept")
    assert code == 3 and "cats/3.png: its checksum does not match" in shown and shown.count("cats/") == 1 and "--delete" in shown
    code, shown, _ = cache(capsys, "verify", "kept", "--json", "--delete")

    assert code == 3
    assert [(one["folder"], [entry["about"]["sample"] for entry in one["damaged"]]) for one in json.loads(shown)] == [
        ("kept/text", []),
        ("kept/vae", ["cats/3.png"]),
    ]
    assert cache(capsys, "verify", "kept")[0] == 0
    assert len(entries_in(Path("kept/vae"))) == 4


HARMS = {
    "cut in half": (lambda data, places: data[: len(data) // 2], "12"),
    "emptied": (lambda data, places: b"", "an unknown number"),
    "flipped everywhere": (lambda data, places: bytes(byte ^ 1 for byte in data), "an unknown number"),
    "a head and the index flipped": (lambda data, places: data[: places[3]] + bytes(8) + data[places[3] + 8 : -60] + bytes(60), "1"),
}


@pytest.mark.parametrize(("harm", "count"), HARMS.values(), ids=HARMS)
def test_verify_counts_the_entries_that_a_damaged_file_lost(capsys, harm, count):
    fill("kept/vae", 12, kind="latents")
    [path] = shards_in(Path("kept/vae"))
    path.write_bytes(harm(path.read_bytes(), [places_in(path)[key(number)].offset for number in range(12)]))

    code, shown, _ = cache(capsys, "verify", "kept")
    shown = " ".join(shown.split())
    assert code == 3 and f"entries, {count} lost" in shown and f"entries lost: {count}" in shown and "no entry is lost" not in shown
    assert "training makes the lost entries anew; --delete, or `simpletuner cache gc kept/vae`" in shown
    assert list(json.loads(cache(capsys, "verify", "kept", "--json")[1])[0]["lost"].values()) == [int(count) if count.isdigit() else None]
    assert cache(capsys, "export", "kept/vae", "to")[0] == 3

    code, shown, _ = cache(capsys, "verify", "kept", "--delete")

    assert code == 3 and "is in new files; training makes the lost entries anew" in " ".join(shown.split())
    assert not path.exists() and len(Store(Path("kept/vae")).keys()) == (11 if count == "1" else 0)
    if count == "1":
        assert cache(capsys, "verify", "kept")[0] == 0


def test_what_gc_leaves_of_a_file_that_lost_entries_is_whole(capsys):
    fill("kept", 12, kind="latents")
    [path] = shards_in(Path("kept"))
    data = bytearray(path.read_bytes())
    data[places_in(path)[key(3)].offset] ^= 1
    path.write_bytes(data[:-1])
    assert cache(capsys, "verify", "kept")[0] == 3

    assert cache(capsys, "gc", "kept")[0] == 0

    assert cache(capsys, "verify", "kept")[0] == 0
    assert Store(Path("kept")).keys() == {key(number) for number in range(12) if number != 3}


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "--config", "config/config.json", "--data_backend_config", "datasets.json", "kept"],
        ["verify", "--data_backend_config=datasets.json", "kept", "--config", "config/config.json"],
        ["verify", "kept", "--gradient_checkpointing", "kept"],
        ["gc", "--config", "config/config.json", "--data_backend_config", "datasets.json", "nowhere"],
        ["export", "--config", "config/config.json", "--seed", "3", "kept", "to"],
        ["export", "kept", "--seed", "3", "to"],
    ],
    ids=" ".join,
)
def test_folders_stand_before_or_behind_flags(capsys, write_config, words):
    write_config()
    fill("kept", 2, kind="latents")

    code, shown, said = cache(capsys, *words)

    if words[0] == "gc":  # of a folder that is there it would ask the model what is used
        assert code == 2 and "nowhere is no cache folder" in said
    else:
        assert code == 0 and ("2 entries, all whole" in shown or "2 entries are in to" in shown)


def test_a_misspelled_flag_is_no_folder(capsys):
    code, _, said = cache(capsys, "verify", "--dryrun", "kept")

    assert code == 2 and "there is no flag --dryrun" in said


def test_the_cache_of_a_dataset_that_the_config_has_no_more_is_shown_the_way_out(capsys, write_config):
    write_config()
    fill("cache/vae/auraflow/old", 2, kind="latents")

    code, _, said = cache(capsys, "gc", "cache/vae/auraflow/old", "--config", "config/config.json")

    said = " ".join(said.split())
    assert code == 2 and "is no cache folder of this config" in said and "delete the folder" in said
    assert "without --config, `simpletuner cache gc cache/vae/auraflow/old --older-than 30`" in said
    assert cache(capsys, "gc", "cache/vae/auraflow/old", "--older-than", "30")[0] == 0


def test_a_cache_in_a_bucket_is_taken_by_the_names_that_are_shown(capsys, write_config, endpoint):
    client = emptied(endpoint)
    path = write_config(cache_dir="kept")
    latents = {"id": "latents", "dataset_type": "image_embeds", "type": "aws", "aws_bucket_name": BUCKET, **keys_of(endpoint)}
    datasets = [{"id": "set", "instance_data_dir": "pictures", "caption_strategy": "filename", "image_embeds": "latents"}, latents]
    Path("datasets.json").write_text(json.dumps(datasets))
    fill("made", 3, kind="latents")
    client.put_object(Bucket=BUCKET, Key="vae/auraflow/set/shard-1-1-1.safetensors", Body=shards_in(Path("made"))[0].read_bytes()[:-1])
    name = f"s3://{BUCKET}/vae/auraflow/set"

    rows = json.loads(cache(capsys, "ls", "--config", str(path), "--json")[1])
    assert [row["folder"] for row in rows] == [name]
    for words in ([name], [f"{name} at {endpoint}"], [name, "at", endpoint], [f"{name}/"]):
        assert cache(capsys, "ls", "--config", str(path), *words)[0] == 0
        assert cache(capsys, "ls", *words, "--config", str(path))[0] == 0
    shown = " ".join(cache(capsys, "verify", "--seed", "3", name, "--config", str(path))[1].split())

    assert f"`simpletuner cache gc {name} --config={path} --seed=3` writes it anew" in shown


def test_export_writes_files_that_need_none_of_us(capsys):
    fill("kept", 4, kind="latents")

    code, shown, _ = cache(capsys, "export", "kept", "to", "--each")

    index = json.loads(Path("to/index.json").read_text())["entries"]
    assert code == 0 and "4 entries" in shown
    assert load_file(Path("to") / index[key(2)]["file"])["mean"][0] == 2
    assert cache(capsys, "export", "kept", "to")[0] == 3  # there is something in it


def test_gc_by_age_alone_needs_no_config_and_touches_no_other_folder(capsys):
    fill("one", 4, kind="latents")
    fill("two", 4, kind="latents")
    for path in (*shards_in(Path("one")), *shards_in(Path("two"))):
        os.utime(path, (time.time() - 40 * 86400,) * 2)

    assert cache(capsys, "gc", "one", "--older-than", "50")[0] == 0
    assert len(Store(Path("one")).keys()) == 4
    assert cache(capsys, "gc", "one", "--older-than", "30")[0] == 0

    assert list(Path("one").iterdir()) == []
    assert Store(Path("two")).keys() == {key(number) for number in range(4)}


def test_gc_drops_what_no_dataset_uses_and_a_run_then_encodes_nothing(tmp_path, capsys):
    write_run(tmp_path, validation_prompt="a prompt", validation_num_inference_steps=1, validation_resolution="32", max_train_steps=1)
    assert train_in_process(tmp_path) == 0
    add_pictures(tmp_path / "pictures", 1, first=70)
    assert train_in_process(tmp_path, "--max_train_steps", "2", "--validation_prompt", "another") == 0
    options = json.loads(Path("config.json").read_text())
    Path("other.json").write_text(json.dumps({**options, "validation_prompt": "another"}))
    (tmp_path / "pictures" / "picture_070.png").unlink()
    fill("cache/vae/other", 3, kind="latents")
    before = entries_in(tmp_path / "cache")
    capsys.readouterr()

    code, shown, _ = cache(capsys, "gc", "--config", "config.json", "--dry-run", "--json")
    assert code == 0 and {row["folder"]: row["dropped"] for row in json.loads(shown)} == {"cache/vae/auraflow/pictures": 1, "cache/text": 2}
    assert entries_in(tmp_path / "cache").keys() == before.keys()
    assert cache(capsys, "gc", "--config", "config.json", "--also", "other.json")[0] == 0

    assert len(before) - len(entries_in(tmp_path / "cache")) == 2
    assert len(Store(Path("cache/vae/other")).keys()) == 3
    assert train_in_process(tmp_path, "--max_train_steps", "3") == 0
    said = capsys.readouterr().out
    assert "latents:" not in said and "text embeddings:" not in said and "made again" not in said


def test_gc_leaves_a_folder_alone_of_which_the_config_uses_nothing(tmp_path, capsys):
    write_run(tmp_path)
    fill("cache/text", 3, kind="text")
    fill("cache/vae/auraflow/pictures", 3, kind="latents")

    code, _, said = cache(capsys, "gc", "--config", "config.json", "--json")

    assert code == 0 and "so none is dropped" in " ".join(said.split())
    assert len(entries_in(tmp_path / "cache")) == 3
    assert cache(capsys, "gc", "cache/text", "--config", "config.json")[0] == 0
    code, _, said = cache(capsys, "gc", "pictures", "--config", "config.json")
    assert code == 2 and "pictures is no cache folder" in said


def test_damage_found_by_verify_is_made_again_by_a_run(tmp_path, capsys):
    write_run(tmp_path, max_train_steps=1)
    assert train_in_process(tmp_path) == 0
    whole = entries_in(tmp_path / "cache")
    damage_entries(tmp_path / "cache" / "vae")
    assert cache(capsys, "verify", "--delete", "--config", "config.json")[0] == 3

    assert train_in_process(tmp_path, "--max_train_steps", "2") == 0

    said = capsys.readouterr().out
    assert "6/6 images" in said and "damaged" not in said
    after = entries_in(tmp_path / "cache")
    assert after.keys() == whole.keys() and all(torch.equal(after[name][part], whole[name][part]) for name in whole for part in whole[name])
