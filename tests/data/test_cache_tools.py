"""Looking into cache folders, checking them, clearing them out, and copying them for other tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.data import cache_tools
from simpletuner.data.cache_export import export
from simpletuner.data.cache_tools import cache_folders, check, find_unused, rewrite, survey, take_stock, to_rewrite
from simpletuner.data.store import Store, key_of
from simpletuner.errors import DatasetError
from tests.builders.run import ROOT
from tests.builders.shards import damage_entries, flip, places_in, shards_in


def key(number: int) -> str:
    return key_of(number=number)


def row(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((300,), float(number)), "std": torch.ones(5, dtype=torch.bfloat16)}


def fill(folder: Path, numbers: range, **facts: str) -> None:
    """One sealed shard."""
    store = Store(folder)
    store.put_many((key(number), row(number), {"kind": "latents", "sample": f"cats/{number}.png", **facts}) for number in numbers)
    store.close()


def clear(folder: Path, used: set[str] | None = None, before: float | None = None) -> int:
    """As `cache gc` does it."""
    unused = find_unused(take_stock(folder), used, before)
    names = to_rewrite(take_stock(folder), unused.places)
    Store(folder).drop(unused.places)
    return rewrite(folder, take_stock(folder), names, lambda count: None)


def is_all_there(folder: Path, numbers) -> bool:
    store = Store(folder)
    return store.keys() == {key(number) for number in numbers} and all(
        torch.equal(store.get(key(number))["mean"], row(number)["mean"]) for number in numbers
    )


def test_a_survey_counts_entries_by_what_made_them(tmp_path):
    fill(tmp_path / "vae", range(5), vae="a" * 32)
    fill(tmp_path / "vae", range(3, 9), vae="a" * 32)  # two of them again
    fill(tmp_path / "vae", range(20, 23), vae="b" * 32)
    Store(tmp_path / "text").put(key(1), row(1), {"kind": "text", "prompt": "a cat", "encoders": "c" * 32})

    held = {
        (Path(str(one.place)).name, one.about.get("vae"), one.about["kind"]): one for folder in cache_folders([tmp_path]) for one in survey(folder)
    }

    counts = {what: one.entries for what, one in held.items()}
    assert counts == {("vae", "a" * 32, "latents"): 9, ("vae", "b" * 32, "latents"): 3, ("text", None, "text"): 1}
    assert held["vae", "b" * 32, "latents"].bytes == pytest.approx(3 * 1210, rel=0.3)
    assert abs(held["text", None, "text"].used - time.time()) < 60


def test_reading_notes_when_a_file_was_last_used(tmp_path):
    fill(tmp_path, range(5))
    os.utime(shards_in(tmp_path)[0], (1e9, 1e9))
    assert survey(tmp_path)[0].used == 1e9
    check(tmp_path, take_stock(tmp_path), lambda count: None)
    assert survey(tmp_path)[0].used == 1e9  # checking is not using

    Store(tmp_path).get(key(0))

    assert time.time() - survey(tmp_path)[0].used < 60


def test_a_check_names_each_damaged_entry_and_no_other(tmp_path):
    fill(tmp_path, range(5))
    [path] = shards_in(tmp_path)
    place = places_in(path)[key(3)]
    assert check(tmp_path, take_stock(tmp_path), lambda count: None) == ([], {})
    flip(path, place.offset + place.length - 1)
    counted: list[int] = []

    damaged, faults = check(tmp_path, take_stock(tmp_path), counted.append)

    assert [(one.key, one.about["sample"], one.problem) for one in damaged] == [(key(3), "cats/3.png", "its checksum does not match")]
    assert faults == {} and sum(counted) == 5


def test_a_damaged_entry_that_was_made_again_is_no_damage(tmp_path):
    fill(tmp_path, range(5))
    damage_entries(tmp_path)
    fill(tmp_path, range(1, 5))

    damaged, _ = check(tmp_path, take_stock(tmp_path), lambda count: None)

    assert [one.key for one in damaged] == [key(0)]


def test_what_costs_no_entry_is_told_apart_and_mended_by_rewriting(tmp_path):
    fill(tmp_path, range(5))
    fill(tmp_path, range(5, 9))
    index, header = shards_in(tmp_path)
    flip(index, index.stat().st_size - 1)
    flip(header, 9)

    damaged, faults = check(tmp_path, take_stock(tmp_path), lambda count: None)
    clear(tmp_path)

    assert damaged == [] and "index" in faults[index.name] and "other tools" in faults[header.name]
    assert check(tmp_path, take_stock(tmp_path), lambda count: None) == ([], {})
    assert is_all_there(tmp_path, range(9))


def test_entries_nobody_uses_go_and_their_bytes_with_them(tmp_path):
    fill(tmp_path, range(100))
    before = shards_in(tmp_path)[0].stat().st_size

    freed = clear(tmp_path, used={key(number) for number in range(30)})

    [path] = shards_in(tmp_path)
    assert freed >= before - path.stat().st_size > 70 * 1200
    assert [one.suffix for one in tmp_path.iterdir()] == [".safetensors"]
    assert is_all_there(tmp_path, range(30))


def test_a_file_of_which_most_is_used_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_tools, "SMALL_SHARD", 0)
    fill(tmp_path, range(100))
    [path] = shards_in(tmp_path)

    clear(tmp_path, used={key(number) for number in range(80)})

    assert path.exists() and is_all_there(tmp_path, range(80))
    with_more = survey(tmp_path)[0]
    assert with_more.entries == 80


def test_small_files_are_put_together(tmp_path):
    for number in range(6):
        fill(tmp_path, range(2 * number, 2 * number + 2))

    clear(tmp_path)

    assert len(shards_in(tmp_path)) == 1 and is_all_there(tmp_path, range(12))
    again = shards_in(tmp_path)
    clear(tmp_path)
    assert shards_in(tmp_path) == again


def test_only_files_not_read_for_long_are_cleared_by_age(tmp_path):
    fill(tmp_path, range(5))
    old = shards_in(tmp_path)[0]
    os.utime(old, (time.time() - 100 * 86400,) * 2)
    fill(tmp_path, range(5, 10))

    clear(tmp_path, used={key(0), key(7)}, before=time.time() - 30 * 86400)

    assert is_all_there(tmp_path, [0, *range(5, 10)])


def test_a_folder_of_which_nothing_is_used_is_left_alone(tmp_path):
    fill(tmp_path, range(5))

    unused = find_unused(take_stock(tmp_path), {key(99)}, None)

    assert unused.is_foreign and unused.places == () and unused.kept == 5


@pytest.mark.parametrize("older_goes", [False, True], ids=["both files go", "the older file goes"])
def test_the_only_whole_one_of_two_copies_is_kept(tmp_path, monkeypatch, older_goes):
    monkeypatch.setattr(cache_tools, "SMALL_SHARD", 0)
    fill(tmp_path, range(10))
    [older] = shards_in(tmp_path)
    fill(tmp_path, range(20))
    [newer] = [path for path in shards_in(tmp_path) if path != older]
    place = places_in(newer)[key(3)]
    flip(newer, place.offset + place.length - 1)
    assert check(tmp_path, take_stock(tmp_path), lambda count: None) == ([], {})

    rewrite(tmp_path, take_stock(tmp_path), [older.name] if older_goes else [older.name, newer.name], lambda count: None)

    assert not older.exists() and is_all_there(tmp_path, range(20))


def test_whoever_reads_meanwhile_finds_every_entry(tmp_path):
    for number in range(5):
        fill(tmp_path, range(10 * number, 10 * number + 10))
    reader = Store(tmp_path)
    reader.keys()

    clear(tmp_path, used={key(number) for number in range(0, 50, 3)})

    assert all(torch.equal(reader.get(key(number))["mean"], row(number)["mean"]) for number in range(0, 50, 3))


KILLED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_cache_tools import clear, fill, is_all_there, key
from simpletuner.data import shard_writer
from simpletuner.data.store import Store

shard_writer.HEADER_BYTES = 12_000
used = {key(number) for number in range(0, 120, 3)}
for milliseconds in (3, 15, 60):
    folder = Path(sys.argv[1]) / str(milliseconds)
    fill(folder, range(120))
    child = os.fork()
    if child == 0:
        clear(folder, used)
        os._exit(0)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store = Store(folder)
    assert all(store.get(key(number))["mean"][0] == number for number in range(0, 120, 3))
    store.sweep(0)
    clear(folder, used)
    assert is_all_there(folder, range(0, 120, 3))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting so many processes anew would take long")
def test_a_rewriting_that_is_killed_loses_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("is_one_file_each", [False, True])
def test_an_export_is_read_without_us(tmp_path, monkeypatch, is_one_file_each):
    monkeypatch.setattr("simpletuner.data.cache_export.SHARD_BYTES", 5 * 1300)
    fill(tmp_path / "cache", range(12), vae="a" * 32)
    to = tmp_path / "to" / "them"

    damaged = export(tmp_path / "cache", to, take_stock(tmp_path / "cache"), lambda count: None, is_one_file_each=is_one_file_each)

    index = json.loads((to / "index.json").read_text())
    assert damaged == [] and len(list(to.rglob("*.safetensors"))) == (12 if is_one_file_each else 3)
    assert index["entries"].keys() == {key(number) for number in range(12)}
    for number in range(12):
        entry = index["entries"][key(number)]
        read = load_file(to / entry["file"])
        assert all(torch.equal(read[entry["tensors"][name]], tensor) for name, tensor in row(number).items())
        assert entry["about"] == {"kind": "latents", "sample": f"cats/{number}.png", "vae": "a" * 32}


def test_an_export_leaves_out_what_is_damaged_and_overwrites_nothing(tmp_path):
    fill(tmp_path / "cache", range(3))
    path = shards_in(tmp_path / "cache")[0]
    flip(path, places_in(path)[key(1)].offset + 100)

    damaged = export(tmp_path / "cache", tmp_path / "to", take_stock(tmp_path / "cache"), lambda count: None, is_one_file_each=False)

    assert [one.key for one in damaged] == [key(1)]
    assert json.loads((tmp_path / "to" / "index.json").read_text())["entries"].keys() == {key(0), key(2)}
    with pytest.raises(DatasetError, match="is there already"):
        export(tmp_path / "cache", tmp_path / "to", take_stock(tmp_path / "cache"), lambda count: None, is_one_file_each=False)
