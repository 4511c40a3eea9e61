"""A cache in a bucket: nothing that was written is lost, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from simpletuner.data import bucket_shelf, shard_writer
from simpletuner.data.store import Store
from simpletuner.data.write_behind import WriteBehind
from simpletuner.errors import DatasetError
from tests.builders.bucket_caches import fill, is_all_there, key, objects, shards, wait_until
from tests.builders.run import ROOT
from tests.builders.s3 import BUCKET, SECRET, ask
from tests.builders.shards import tensors


def test_what_one_machine_wrote_another_reads(machine, client):
    fill(machine("one"), range(10), closes=False).close()

    assert len(shards(client)) == 1 and shards(client)[0].startswith("vae/set/shard-")
    assert is_all_there(machine("two"), range(10))


def test_an_entry_is_seen_at_once_here_and_elsewhere_when_its_shard_is_closed(machine):
    store = fill(machine("one"), range(4), closes=False)
    elsewhere = Store(machine("two"))

    assert is_all_there(machine("one"), range(4))
    assert elsewhere.keys() == set()
    store.close()

    assert elsewhere.keys() == {key(number) for number in range(4)}
    assert is_all_there(machine("one"), range(4))


def test_a_full_shard_is_uploaded_while_the_next_one_grows(machine, client, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", shard_writer.HEADER_BYTES + 5_000)
    store = Store(machine())

    for number in range(60):
        store.put(key(number), tensors(number), {})

    wait_until(lambda: len(shards(client)) > 1)
    store.close()
    assert is_all_there(machine("two"), range(60))


WRITER = """
import os, sys, time
from pathlib import Path
from simpletuner.data import bucket_shelf
from simpletuner.data.store import Store
from tests.builders.s3 import place_in
from tests.builders.shards import tensors
from simpletuner.data.store import key_of

bucket_shelf.FREE_BYTES = 0
store = Store(place_in(sys.argv[1], Path(sys.argv[2])))
first, last = int(sys.argv[3]), int(sys.argv[4])
for number in range(first, last):
    store.put(key_of(number=number), tensors(number), {})
    if number % 20 == 10:
        store.close()
print("written", flush=True)
if sys.argv[5] == "waits":
    time.sleep(60)
"""


def start_writer(endpoint: str, machine: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, endpoint, str(machine), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_killed_writer_had_not_uploaded_is_used_and_uploaded_by_the_next_start(machine, client, endpoint, tmp_path):
    writer = start_writer(endpoint, tmp_path / "one", "0", "37", "waits")
    assert writer.stdout is not None and writer.stdout.readline() == "written\n"
    before = Store(machine("one"))
    assert before.sweep() == 0  # its shard is locked: it lives
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(Store(machine("two")).keys()) < 37

    assert is_all_there(machine("one"), range(37))
    store = Store(machine("one"))
    assert store.sweep() >= 1
    store.close()

    assert is_all_there(machine("two"), range(37))
    assert [path.name for path in (tmp_path / "one/root/vae/set").glob("shard-*")] == []


WRITERS = """
import os, sys
from pathlib import Path
from simpletuner.data import bucket_shelf
from simpletuner.data.store import Store, key_of
from tests.builders.s3 import place_in
from tests.builders.shards import tensors

bucket_shelf.FREE_BYTES = 0
children = []
for name, first in (("one", 0), ("one", 20), ("two", 40), ("three", 60)):
    child = os.fork()
    if child:
        children.append(child)
        continue
    store = Store(place_in(sys.argv[1], Path(sys.argv[2]) / name))
    for number in range(first, first + 30):
        store.put(key_of(number=number), tensors(number), {})
        if number % 10 == 0:
            store.close()
    store.close()
    os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting so many processes anew would take long")
def test_machines_and_processes_write_into_one_bucket_at_once(machine, endpoint, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    result = subprocess.run([sys.executable, "-c", WRITERS, endpoint, str(tmp_path)], env=environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    for name in ("one", "four"):
        assert is_all_there(machine(name), range(90))


def test_a_process_that_ends_in_peace_uploads_what_it_never_closed(machine, endpoint, tmp_path):
    writer = start_writer(endpoint, tmp_path / "one", "0", "15", "ends")

    assert writer.communicate(timeout=120) == ("written\n", "")

    assert is_all_there(machine("two"), range(15))


def test_a_shard_left_between_sealing_and_uploading_is_uploaded(machine, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bucket_shelf.BucketShelf, "_upload_soon", lambda self, name: None)  # as if killed here
        fill(machine(), range(5))
    assert shards(client) == [] and is_all_there(machine(), range(5))

    store = Store(machine())
    assert store.sweep() == 1
    store.close()

    assert is_all_there(machine("two"), range(5))


def test_wrong_credentials_stop_before_anything_is_made_and_are_not_shown(machine, endpoint, tmp_path):
    ask(f"{endpoint}/moto-api/reset-auth", "0")  # from now on the server looks at keys

    fault = machine().missing()
    with pytest.raises(DatasetError, match="the server does not know the access key") as caught:
        Store(machine()).put(key(0), tensors(), {})

    assert fault is not None and "s3://caches/vae/set/ at http://127" in fault
    assert SECRET not in f"{fault}{caught.value!r}{caught.value.hint}" and "aws_secret_access_key" in str(caught.value.hint)
    assert list(tmp_path.rglob("shard-*")) == []


def test_a_bucket_that_may_be_listed_and_not_written_stops_before_anything_is_made(machine, monkeypatch, tmp_path):
    store = Store(machine())
    assert store.keys() == set()

    def refuse(self, name, data):
        raise DatasetError(f"{self.where(name)} cannot be written: access is denied")

    monkeypatch.setattr(bucket_shelf.Bucket, "write", refuse)
    with pytest.raises(DatasetError, match=r"about\.txt .* cannot be written: access is denied"):
        store.put(key(0), tensors(), {})
    assert list(tmp_path.rglob("shard-*")) == []


def test_a_bucket_that_goes_in_the_middle_costs_nothing(machine, client, tmp_path):
    store = fill(machine(), range(10), closes=False)
    for name in objects(client):
        client.delete_object(Bucket=BUCKET, Key=name)
    client.delete_bucket(Bucket=BUCKET)
    store.put(key(10), tensors(10), {})

    with pytest.raises(DatasetError, match="cannot be written: there is no such bucket") as caught:
        store.close()
    assert str(tmp_path / "one/root/vae/set") in str(caught.value.hint) and "uploads it" in str(caught.value.hint)
    client.create_bucket(Bucket=BUCKET)
    again = Store(machine())
    again.sweep()
    again.close()

    assert is_all_there(machine("one"), range(11)) and is_all_there(machine("two"), range(11))


def test_a_fill_whose_upload_fails_says_so_at_its_end(machine, client):
    store = Store(machine())
    with pytest.raises(DatasetError, match="there is no such bucket"), WriteBehind(4) as writer:
        for number in range(8):
            writer.put(store, key(number), tensors(number), {})
        wait_until(lambda: (machine().workplace / ".copies").parent.exists() and "vae/set/about.txt" in objects(client))
        client.delete_object(Bucket=BUCKET, Key="vae/set/about.txt")
        client.delete_bucket(Bucket=BUCKET)


def test_a_second_close_tries_again_what_the_first_could_not_upload(machine, client):
    store = fill(machine(), range(5), closes=False)
    client.delete_object(Bucket=BUCKET, Key="vae/set/about.txt")
    client.delete_bucket(Bucket=BUCKET)
    for _ in range(2):
        with pytest.raises(DatasetError, match="there is no such bucket"):
            store.close()
    client.create_bucket(Bucket=BUCKET)

    store.close()

    assert len(shards(client)) == 1 and is_all_there(machine("two"), range(5))


def test_close_raises_what_keeps_a_shard_from_being_sealed_and_tries_again(machine, client, monkeypatch):
    store = fill(machine(), range(5), closes=False)

    def refuse(*arguments):
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch, pytest.raises(DatasetError, match="cannot be used"):
        patch.setattr(shard_writer, "seal", refuse)
        store.close()
    assert shards(client) == [] and is_all_there(machine(), range(5))

    store.close()

    assert len(shards(client)) == 1 and is_all_there(machine("two"), range(5))


@pytest.fixture
def held_elsewhere(machine, monkeypatch):
    """A finished shard in the workplace that another process has locked to upload it."""
    fcntl = pytest.importorskip("fcntl")
    with monkeypatch.context() as patch:
        patch.setattr(bucket_shelf.BucketShelf, "_upload_soon", lambda self, name: None)
        fill(machine(), range(5))
    [path] = machine().workplace.glob("shard-*.safetensors")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_close_waits_for_a_shard_that_another_process_holds(machine, client, held_elsewhere):
    store = Store(machine())
    assert store.sweep() == 1
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(1)
    assert closing.is_alive() and shards(client) == []

    held_elsewhere.close()  # that process was killed
    closing.join(20)

    assert not closing.is_alive() and len(shards(client)) == 1 and is_all_there(machine("two"), range(5))


def test_close_says_when_another_process_never_lets_go_of_a_shard(machine, client, held_elsewhere, monkeypatch):
    monkeypatch.setattr(bucket_shelf, "WAIT_SECONDS", 0.3)
    store = Store(machine())
    store.sweep()

    with pytest.raises(DatasetError, match=r"another process holds .*shard-.* and has not uploaded it") as caught:
        store.close()

    assert "the next run on this machine uses it and uploads it" in str(caught.value.hint) and is_all_there(machine(), range(5))


def test_a_shard_that_lies_in_the_bucket_is_not_uploaded_again(machine, client):
    fill(machine(), range(5))
    [copy], [name] = machine().workplace.glob(".copies/*"), shards(client)
    before = client.head_object(Bucket=BUCKET, Key=name)["LastModified"]
    data = copy.read_bytes()
    copy.rename(machine().workplace / copy.name).write_bytes(data[:-9])  # as if killed behind the upload, by what harmed the disk too

    store = Store(machine())
    store.sweep()
    store.close()

    assert client.get_object(Bucket=BUCKET, Key=name)["Body"].read() == data
    assert client.head_object(Bucket=BUCKET, Key=name)["LastModified"] == before
    assert is_all_there(machine(), range(5)) and list(machine().workplace.glob("shard-*")) == []


def test_copies_are_counted_once_and_not_for_each_shard(machine, monkeypatch):
    counted: list[Path] = []
    real = bucket_shelf.copied_bytes
    monkeypatch.setattr(bucket_shelf, "copied_bytes", lambda root: counted.append(root) or real(root))
    store = Store(machine())
    for number in range(10):
        store.put(key(number), tensors(number), {})
        store.close()

    assert len(counted) == 1 and len(list(machine().workplace.glob(".copies/*"))) == 10


def test_copies_stay_within_their_room(machine):
    sizes = [path.stat().st_size for path in fill(machine("one"), range(5)).place.workplace.glob(".copies/*")]
    place = machine("two", copies_bytes=int(2.5 * sizes[0]))
    for start in range(0, 20, 5):
        fill(place, range(start, start + 5))

    assert len(list(place.workplace.glob(".copies/*"))) == 2 and list(place.workplace.glob("shard-*")) == []
    assert is_all_there(place, range(20))


def test_a_copy_that_vanishes_while_copies_are_counted_keeps_no_shard_from_its_place(machine, client):
    folder = machine().workplace / ".copies"
    folder.mkdir(parents=True)
    (folder / "shard-gone.safetensors").symlink_to(folder / "nowhere")  # listed, and not there when it is looked at

    fill(machine(), range(5))

    assert len(shards(client)) == 1 and list(machine().workplace.glob("shard-*")) == []


FILL_DISK = """
import sys, torch
from pathlib import Path
from simpletuner.data import bucket_shelf
from simpletuner.data.store import Store, key_of
from simpletuner.errors import MemoryLimitError
from tests.builders.s3 import place_in
bucket_shelf.FREE_BYTES = 0
place = place_in(sys.argv[2], Path(sys.argv[1]))
store, put = Store(place), 0
try:
    while True:
        store.put_many([(key_of(number=put + more), {"mean": torch.full((100,), float(put + more))}, {}) for more in range(20)])
        put += 20
except MemoryLimitError as error:
    print(error.message)
store.close()
held = Store(place_in(sys.argv[2], Path(sys.argv[1]) / "elsewhere", copies_bytes=0)).keys()
assert put <= len(held) < put + 20, (put, len(held))
print("uploaded")
"""


def test_a_full_disk_of_the_workplace_keeps_what_was_written(endpoint, client, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = f"mount -t tmpfs -o size=1m none $1 && {sys.executable} -c '{FILL_DISK}' $1 $2"

    result = subprocess.run(["unshare", "-rm", "sh", "-ec", script, "sh", str(tmp_path), endpoint], env=environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert f"no space is left for the cache folder {tmp_path}/root/vae/set" in result.stdout and "uploaded" in result.stdout
