from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from simpletuner.data.backends.local import LocalBackend, LocalOptions
from simpletuner.data.faults import Header
from simpletuner.data.index import Changes, open_index, record
from simpletuner.errors import DatasetError, MemoryLimitError


class Reader(LocalBackend):
    """The folder `images`, counting which files are opened, and which of them whole."""

    def __init__(self) -> None:
        super().__init__(LocalOptions(id="set", instance_data_dir="images"))
        self.opened: list[str] = []
        self.read_whole: list[str] = []

    def entries(self):
        return list(self.list())

    def read_head(self, name: str, count: int) -> bytes:
        if name not in self.opened:
            self.opened.append(name)
        return super().read_head(name, count)

    def read(self, name: str) -> bytes:
        self.read_whole.append(name)
        return super().read(name)

    def read_text(self, name: str) -> tuple[str, str]:
        self.opened.append(name)
        return super().read_text(name)


@pytest.fixture
def reader(workplace) -> Reader:
    (workplace / "images").mkdir()
    return Reader()


@pytest.fixture
def look(reader, console):
    """Open the index as a new start would, and bring the images up to date."""

    def run():
        reader.opened.clear()
        reader.read_whole.clear()
        with open_index(Path("cache/set.sqlite")) as index:
            changes, unreadable = index.refresh(reader.entries(), reader, lambda total: console.bar("index", total))
            index.take_up({})
            return {name: seen for name, seen in index.images() if name not in unreadable}, changes

    return run


@pytest.fixture
def read_texts(reader, console):
    def run():
        reader.opened.clear()
        with open_index(Path("cache/set.sqlite")) as index:
            found = index.texts(reader.entries(), reader.read_text, lambda total: console.bar("captions", total))
            index.take_up({})
            return found

    return run


def test_changes_are_kept_until_a_run_takes_them_up(save, look, reader, console, workplace):
    def glimpse():
        """What somebody sees who looks and does not train."""
        with open_index(Path("cache/set.sqlite")) as index:
            return index.refresh(reader.entries(), reader, lambda total: console.bar("index", total))[0]

    for number in range(4):
        save(f"{number}.png", seed=number)
    assert glimpse() == glimpse() == Changes(new=4)
    look()
    assert glimpse() == Changes()

    save("0.png", seed=10)
    save("new.png", seed=11)
    save("fleeting.png", seed=12)
    (workplace / "images/1.png").unlink()
    (workplace / "images/2.png").unlink()
    assert glimpse() == Changes(new=2, changed=1, gone=2)
    (workplace / "images/fleeting.png").unlink()
    save("2.png", seed=13)
    save("0.png", seed=14)
    save("new.png", seed=15)
    assert glimpse() == glimpse() == Changes(new=1, changed=2, gone=1)
    look()
    assert glimpse() == Changes()


def test_images_are_known_by_size_digest_and_traits(save, look):
    path = save("a.png", 40, 24)

    seen, changes = look()

    assert seen["a.png"].content == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert (seen["a.png"].header.width, seen["a.png"].header.height, seen["a.png"].header.fault) == (40, 24, None)
    assert changes == Changes(new=1)


def test_a_second_start_opens_no_file(save, look, reader):
    for number in range(5):
        save(f"{number}.png", seed=number)
    before, _ = look()
    assert len(reader.opened) == 5

    after, changes = look()

    assert reader.opened == []
    assert after == before
    assert changes == Changes()
    assert str(changes) == "nothing changed"


def test_only_what_changed_is_opened_and_counted(save, look, reader, workplace):
    for number in range(4):
        save(f"{number}.png", seed=number)
    look()

    save("1.png", seed=99)
    save("new.png", 16, 16)
    (workplace / "images/3.png").unlink()
    seen, changes = look()

    assert sorted(reader.opened) == ["1.png", "new.png"]
    assert str(changes) == "1 new, 1 changed, 1 gone"
    assert sorted(seen) == ["0.png", "1.png", "2.png", "new.png"]


def test_a_file_that_was_only_touched_did_not_change(save, look, reader):
    os.utime(save("a.png"), ns=(1, 1))
    look()
    os.utime(Path("images/a.png"), ns=(2, 2))

    _, changes = look()

    assert reader.opened == ["a.png"]
    assert changes == Changes()
    look()
    assert reader.opened == []


def test_faults_are_remembered_too(look, reader, workplace):
    (workplace / "images/bad.png").write_bytes(b"bad")
    first, _ = look()

    second, _ = look()

    assert reader.opened == []
    assert first["bad.png"].header.fault == second["bad.png"].header.fault == "broken"


def test_a_file_that_could_not_be_opened_is_tried_again(save, look, reader, monkeypatch):
    save("a.png")

    def refuse(name: str, count: int) -> bytes:
        raise DatasetError("no permission")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_head", refuse)
        assert look() == ({}, Changes())

    assert look()[0]["a.png"].header.fault is None


def test_texts_are_kept_and_follow_their_files(workplace, reader, read_texts):
    (workplace / "images/a.txt").write_text("a cat", encoding="utf-8")
    (workplace / "images/b.txt").write_bytes("schön".encode("latin-1"))
    assert read_texts()[0] == {"a.txt": ("a cat", "utf-8"), "b.txt": ("schön", "latin-1")}

    (workplace / "images/a.txt").write_text("a dog, larger", encoding="utf-8")
    rows, changes = read_texts()

    assert reader.opened == ["a.txt"]
    assert rows["a.txt"] == ("a dog, larger", "utf-8")
    assert changes == Changes(changed=1)


@pytest.mark.parametrize("damage", ["garbage", "cut", "version"])
def test_a_damaged_or_foreign_index_is_made_anew(save, look, reader, damage):
    for number in range(30):
        save(f"{number}.png", 8, 8, seed=number)
    before, _ = look()
    path = Path("cache/set.sqlite")
    if damage == "version":
        with closing(sqlite3.connect(path)) as base:
            base.execute("PRAGMA user_version = 999")
    else:
        path.write_bytes(b"garbage" * 1000 if damage == "garbage" else path.read_bytes()[:5000])

    after, changes = look()

    assert after == before
    assert len(reader.opened) == 30
    assert changes == Changes(new=30)


def test_faults_are_looked_at_again_by_another_pillow(look, reader, save, workplace, monkeypatch):
    save("good.png")
    (workplace / "images/bad.png").write_bytes(b"bad")
    look()

    monkeypatch.setattr("PIL.__version__", "99.0")
    look()

    assert reader.opened == ["bad.png"]


def test_an_index_that_cannot_be_written_is_a_clear_error(look, workplace, save):
    save("a.png")
    (workplace / "cache").write_bytes(b"a file where the folder should be")

    with pytest.raises(DatasetError, match=r"the index cache.set.sqlite cannot be used"):
        look()


def test_a_full_disk_is_told_apart(workplace, reader, console):
    (workplace / "images/a.txt").write_text("long " * 10000, encoding="utf-8")

    with pytest.raises(MemoryLimitError, match="the disk is full"), open_index(Path("cache/set.sqlite")) as index:
        index._base.execute("PRAGMA max_page_count = 1")  # SQLite says of this what it says of a full disk
        index.texts(reader.entries(), reader.read_text, lambda total: console.bar("captions", total))


KILLED = """
import sys, time
from pathlib import Path
from simpletuner.console import Console
from simpletuner.data import index
from simpletuner.data.backends.local import LocalBackend, LocalOptions

index.COMMIT_SECONDS = 0.02

class Slow(LocalBackend):
    def read_head(self, name, count):
        time.sleep(0.03)
        print(name, flush=True)
        return super().read_head(name, count)

backend = Slow(LocalOptions(id="set", instance_data_dir="images"))
with index.open_index(Path("cache/set.sqlite")) as found:
    found.refresh(list(backend.list()), backend, lambda total: Console(is_main=False).bar("index", total))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_start_keeps_what_it_had_found(save, look, reader):
    for number in range(300):
        save(f"{number:03}.png", 8, 8, seed=number)
    opened = 0
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(20):
                opened += bool(process.stdout.readline())
            time.sleep(0.1)
            process.send_signal(signal.SIGKILL)

    seen, changes = look()

    assert len(seen) == 300
    assert opened == 40
    assert 0 < len(reader.opened) <= 300 - 20
    assert changes.new == 300


def test_what_is_learned_of_a_file_is_not_written_onto_another_one_of_its_name(tmp_path):
    path = tmp_path / "set.sqlite"
    with open_index(path):
        pass
    with closing(sqlite3.connect(path)) as base:
        base.execute("INSERT INTO images VALUES ('0.png', 1, 2, 'this file', '', 8, 8, '', NULL)")
        base.commit()

    record(path, [("0.png", "the other run's file", "its digest", Header(8, 8))])
    with open_index(path) as index:
        assert list(index.contents()) == []
    record(path, [("0.png", "this file", "a digest", Header(8, 8))])
    with open_index(path) as index:
        assert list(index.contents()) == [("0.png", "this file", "a digest")]
