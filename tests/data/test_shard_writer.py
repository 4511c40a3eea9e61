"""Shards survive kills, full disks and folders that one may only read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from simpletuner.data.store import Store, key_of
from tests.builders.run import ROOT
from tests.builders.shards import filled, readable, same, shards_in, tensors

KEY = key_of(name="an entry")


READ_ONLY = """
import sys
from pathlib import Path
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError
store = Store(Path(sys.argv[1]))
assert len([store.get(key) for key in store.keys()]) == 3 and store.sweep(0) == 0
try:
    store.put("0" * 32, {}, {})
except DatasetError as error:
    print(error.message)
"""


def in_own_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount file systems nobody else sees."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["unshare", "-rm", "sh", "-ec", script, "sh", *arguments], env=environment, capture_output=True, text=True)


def test_a_read_only_file_system_can_be_read(tmp_path):
    filled(tmp_path, 3)

    result = in_own_mounts(f"mount --bind $1 $1 && mount -o remount,ro,bind $1 && {sys.executable} -c '{READ_ONLY}' $1", str(tmp_path))

    assert result.returncode == 0, result.stderr
    assert "Read-only file system" in result.stdout


FILL_DISK = """
import sys, torch
from pathlib import Path
from simpletuner.data.store import Store, key_of
from simpletuner.errors import MemoryLimitError
store, put = Store(Path(sys.argv[1])), 0
try:
    while True:
        store.put_many([(key_of(number=put + more), {"mean": torch.full((100,), float(put + more))}, {}) for more in range(20)])
        put += 20
except MemoryLimitError as error:
    message = error.message
print(message)
for again in (store, Store(Path(sys.argv[1]))):
    held = len(again.keys())  # of the last batch a part may have fitted into the file before
    assert put <= held < put + 20 and f"its {held} finished" in message, (put, held, message)
    assert all(again.get(key_of(number=number))["mean"][0] == number for number in range(put))
print([path.suffix for path in Path(sys.argv[1]).iterdir()])
"""


def test_a_full_disk_keeps_what_was_written(tmp_path):
    result = in_own_mounts(f"mount -t tmpfs -o size=1m none $1 && {sys.executable} -c '{FILL_DISK}' $1", str(tmp_path))

    assert result.returncode == 0, result.stderr
    assert f"no space is left for the cache folder {tmp_path}" in result.stdout


def test_a_shard_taken_away_from_a_writer_that_lives_costs_no_entry(tmp_path):
    slow, sweeper = Store(tmp_path), Store(tmp_path)
    slow.put(KEY, tensors(), {})
    past = time.time() - 4000
    os.utime(shards_in(tmp_path)[0], (past, past))
    assert sweeper.sweep() == 1

    slow.put(key_of(name="later"), tensors(1), {})

    for store in (slow, sweeper, Store(tmp_path)):
        assert same(store.get(KEY), tensors()) and same(store.get(key_of(name="later")), tensors(1))
    slow.close()
    assert [path.suffix for path in shards_in(tmp_path)] == [".safetensors"] * 2


def test_what_a_killed_writer_left_is_sealed_once_it_is_old(tmp_path):
    keys = filled(tmp_path, 3)
    [path] = shards_in(tmp_path)
    left = path.rename(path.with_suffix(".open"))
    with left.open("ab") as file:
        file.write(b"\x93entry\r\nhalf a record")
    (tmp_path / "shard-1.dead.ab12.tmp").write_bytes(b"half")
    store = Store(tmp_path)
    assert store.sweep() == 0 and left.exists()  # they may belong to a writer at work
    for name in tmp_path.iterdir():
        os.utime(name, (time.time() - 4000,) * 2)

    assert store.sweep() == 2

    assert [name.suffix for name in tmp_path.iterdir()] == [".safetensors"]
    assert readable(tmp_path, keys) == {0, 1, 2} and store.keys() == set(keys)


WRITERS = """
import json, os, random, signal, sys, time
import torch
from pathlib import Path
from simpletuner.data import shard_writer
from simpletuner.data.store import Store, key_of

torch.set_num_threads(1)
shard_writer.SHARD_BYTES = shard_writer.HEADER_BYTES + 200_000
folder, turns, chance, promised = Path(sys.argv[1]), 12, random.Random(0), {}

def write(name, pipe):
    store = Store(folder)
    for start in range(0, 10_000_000, 10):
        numbers = range(start, start + 10)
        store.put_many((key_of(writer=name, number=number), {"mean": torch.full((700,), float(number))}, {"sample": name}) for number in numbers)
        os.write(pipe, b"%d\\n" % (start + 10))

for turn in range(turns):
    writers = {}
    for name in (f"{turn}-{number}" for number in range(3)):
        end, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            write(name, pipe)
        os.close(pipe)
        writers[name] = child, end
    time.sleep(chance.uniform(0.02, 0.3))
    for name, (child, end) in writers.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = b"".join(iter(lambda: os.read(end, 1 << 16), b""))
        promised[name] = int((said.split(b"\\n")[-2:-1] or [b"0"])[0])
    if turn % 3:  # or else they are left to lie
        for path in folder.glob("*.open"):
            os.utime(path, (time.time() - 4000,) * 2)
        Store(folder).sweep()
print(json.dumps(promised))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting so many processes anew would take minutes")
def test_writers_that_are_killed_at_any_moment_lose_nothing_that_was_written(tmp_path):
    """Three writers at a time, killed without warning, again and again in one folder; each says what it has been promised."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    result = subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], env=environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    promised = json.loads(result.stdout)
    store = Store(tmp_path)
    held = store.keys()
    for name, count in promised.items():
        for number in range(count):
            assert store.get(key_of(writer=name, number=number))["mean"][699] == number
    assert sum(promised.values()) <= len(held) <= sum(promised.values()) + len(promised) * 20
    assert all(store.get(key)["mean"].shape == (700,) for key in held)
    assert any(count > 70 for count in promised.values()), promised  # some went on to a second shard
