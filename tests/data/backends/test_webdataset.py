from __future__ import annotations

import io
import json
import os
import sqlite3
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.backends.webdataset import WebdatasetBackend, WebdatasetOptions
from simpletuner.data.discover import discover
from simpletuner.data.tars import index_shard
from simpletuner.errors import DatasetError

Files = dict[str, bytes | tarfile.TarInfo]


def write_tar(path: Path, files: Files, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                item = tarfile.TarInfo(name)
                item.size = len(content)
                tar.addfile(item, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    item = tarfile.TarInfo(name)
    item.type, item.linkname = kind, target
    return item


@pytest.fixture
def shards(workplace: Path) -> Callable[..., WebdatasetBackend]:
    """The place `shards`, or what `source` says, with other keys."""

    def make(source: str = "shards", **keys: object) -> WebdatasetBackend:
        return WebdatasetBackend(WebdatasetOptions.model_validate({"id": "set", "type": "webdataset", "source": source, **keys}))

    return make


def test_files_are_listed_by_shard_and_name_and_read_where_they_lie(shards):
    write_tar(Path("shards/one.tar"), {"b.png": b"bb", "./a/ü.png": b"aaa", "a/ü.txt": b"a cat", ".hidden.png": b"x", "a/.git/x.png": b"x"})
    write_tar(Path("shards/more/two.tar"), {"b.png": b"two"})

    place = shards()

    assert [(entry.name, entry.size_bytes) for entry in place.list()] == [
        ("more/two.tar/b.png", 3),
        ("one.tar/a/ü.png", 3),
        ("one.tar/a/ü.txt", 5),
        ("one.tar/b.png", 2),
    ]
    assert place.missing() is None
    assert [place.read(entry.name) for entry in place.list()] == [b"two", b"aaa", b"a cat", b"bb"]
    assert place.read_head("one.tar/a/ü.png", 2) == b"aa" and place.read_head("one.tar/b.png", 100) == b"bb"
    assert place.exists("one.tar/b.png") and not place.exists("one.tar/c.png") and not place.exists("three.tar/b.png")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_way_to_write_a_tar_file_is_read(shards, format):
    files: Files = {f"{'long/' * 18}{number}.png": bytes([number]) * (number * 100) for number in range(20)}
    write_tar(Path("shards/x.tar"), files, format)
    place = shards()

    with ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(lambda entry: (entry.name, place.read(entry.name)), place.list()))

    assert found == {f"x.tar/{name}": content for name, content in files.items()}


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}\.(png|jpg|txt)", fullmatch=True), st.binary(max_size=2000), max_size=8))
def test_an_index_finds_the_bytes_that_tarfile_finds(tmp_path_factory, files):
    path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", dict(files))

    shard = index_shard(path)

    assert shard.is_whole
    assert {name: shard.read(member, member.size_bytes) for name, member in shard.members.items()} == files


def test_captions_come_from_the_sample_s_json_or_its_text(shards):
    write_tar(
        Path("shards/x.tar"),
        {
            "a.png": b"a",
            "a.json": json.dumps({"caption": "a cat", "width": 3}).encode(),
            "a.txt": b"not this",
            "b.jpg": b"b",
            "b.json": json.dumps({"caption": ["one", " two ", ""]}).encode(),
            "c.webp": b"c",
            "c.txt": b"first\r\n\r\nsecond\n",
            "d.png": b"d",
            "d.json": b"{broken",
            "d.txt": b"from the text",
            "e.png": b"e",
            "f.png": b"f",
            "f.json": b"[1]",
        },
    )

    captions = {entry.name[6:]: entry.captions for entry in shards().list() if entry.captions}

    assert captions == {"a.png": ("a cat",), "b.jpg": ("one", "two"), "c.webp": ("first", "second"), "d.png": ("from the text",)}
    whole = {entry.name: entry.captions for entry in shards(disable_multiline_split=True).list()}
    assert whole["x.tar/c.webp"] == ("first\r\n\r\nsecond",)
    assert not [entry for entry in shards(caption_strategy="filename").list() if entry.captions]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("../evil.png", b"x", "outside"),
        ("a/../../evil.png", b"x", "outside"),
        ("/etc/evil.png", b"x", "outside"),
        ("soft.png", link("soft.png", "/etc/passwd"), "outside"),
        ("hard.png", link("hard.png", "good.png", tarfile.LNKTYPE), "outside"),
        ("device.png", link("device.png", "", tarfile.CHRTYPE), "outside"),
    ],
)
def test_names_that_lead_out_links_and_devices_are_refused(shards, name, content, fault):
    write_tar(Path("shards/x.tar"), {"good.png": b"good", name: content})
    place = shards()

    entries = list(place.list())

    assert sorted(str(entry.fault) for entry in entries) == ["None", fault]
    assert not [entry for entry in entries if ".." in entry.name or entry.name.startswith("/")]
    for tried in (f"x.tar/{name}", *(entry.name for entry in entries if entry.fault)):
        with pytest.raises(DatasetError):
            place.read(tried)


def test_huge_files_are_not_read(shards, monkeypatch):
    write_tar(Path("shards/x.tar"), {"big.png": b"x" * 100, "small.png": b"x" * 99})
    monkeypatch.setattr("simpletuner.data.tars.LIMIT_BYTES", 100)
    place = shards()

    assert [(entry.name, entry.fault) for entry in place.list()] == [("x.tar/big.png", "too many bytes"), ("x.tar/small.png", None)]
    with pytest.raises(DatasetError):
        place.read("x.tar/big.png")


def test_a_cut_shard_gives_what_is_whole_and_is_named(shards):
    path = write_tar(Path("shards/x.tar"), {"a.png": b"a" * 600, "b.png": b"b" * 600})
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 100])

    assert [(entry.name, entry.fault) for entry in shards().list()] == [
        ("x.tar", "truncated"),
        ("x.tar/a.png", None),
        ("x.tar/b.png", "truncated"),
    ]


@pytest.mark.parametrize("content", [b"", b"no tar file at all" * 100])
def test_what_is_no_tar_file_is_named(shards, content):
    write_tar(Path("shards/good.tar"), {"a.png": b"a"})
    Path("shards/bad.tar").write_bytes(content)

    assert [(entry.name, entry.fault) for entry in shards().list()] == [("bad.tar", "broken"), ("good.tar/a.png", None)]


def test_damage_in_the_middle_is_not_taken_for_the_end(shards):
    path = write_tar(Path("shards/x.tar"), {"a.png": b"a" * 512, "b.png": b"b" * 512})
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)

    assert [(entry.name, entry.fault) for entry in shards().list()] == [("x.tar", "truncated"), ("x.tar/a.png", None)]


def test_a_stamp_changes_with_the_shard(shards):
    path = write_tar(Path("shards/x.tar"), {"a.png": b"a", "b.png": b"b"})
    first = list(shards().list())
    again = list(shards().list())
    write_tar(path, {"a.png": b"c", "b.png": b"b"})
    os.utime(path, ns=(1, 1))
    changed = list(shards().list())

    assert first == again
    assert len({entry.modified_ns for entry in (*first, *changed)}) == 4


def test_a_shard_that_is_written_anew_during_a_run_is_not_read_at_the_old_places(shards):
    path = write_tar(Path("shards/x.tar"), {"a.png": b"a"})
    place = shards()
    list(place.list())
    write_tar(path, {"0.png": b"0", "a.png": b"another"})

    with pytest.raises(DatasetError, match=r"x\.tar was changed since the run began"):
        place.read("x.tar/a.png")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("shards/one.tar", ["one.tar/a.png"]),
        ("shards/*.tar", ["one.tar/a.png", "two.tar/a.png"]),
        ("sh*/one.tar", ["shards/one.tar/a.png"]),
        ("shards/t[wv]o.tar", ["two.tar/a.png"]),
    ],
)
def test_a_source_may_be_a_file_or_a_pattern(shards, source, names):
    for name in ("one", "two"):
        write_tar(Path(f"shards/{name}.tar"), {"a.png": b"a"})

    assert [entry.name for entry in shards(source).list()] == names


def test_links_out_of_the_folder_are_left_alone(shards, workplace):
    write_tar(Path("elsewhere/x.tar"), {"a.png": b"a"})
    write_tar(Path("shards/in.tar"), {"a.png": b"a"})
    Path("shards/out.tar").symlink_to("../elsewhere/x.tar")

    assert [entry.name for entry in shards().list()] == ["in.tar/a.png"]


def test_the_place_says_what_is_wrong_with_it(shards, workplace):
    Path("empty").mkdir()
    Path("packed").mkdir()
    Path("packed/x.tar.gz").write_bytes(b"")

    assert shards("gone").missing() == "source gone is neither a folder nor a .tar file here, nor a pattern that any file fits"
    assert shards("empty").missing() == "source empty holds no .tar files"
    assert "packed holds packed shards (x.tar.gz), which cannot be read in places" in str(shards("packed").missing())


def test_shards_are_a_dataset_like_a_folder_under_both_names(plan_of, save, console):
    files: Files = {"a.png": save("a.png").read_bytes(), "a.txt": b"a cat", "b.png": save("b.png", 60, 40).read_bytes(), "c.png": b"broken"}
    write_tar(Path("shards/x.tar"), files)
    keys = {"id": "set", "source": "shards", "metadata_backend": "webshart", "webshart": {}}

    one, other = (plan_of({**keys, "type": name, "caption_strategy": name}).datasets[0] for name in ("webshart", "webdataset"))
    found = discover(one, Path("cache/index"), 1, console)

    assert one == other
    assert [(sample.id, sample.captions) for sample in found.samples] == [("set/x.tar/a.png", ("a cat",))]
    assert found.skipped == {"broken": ("x.tar/c.png",), "no caption": ("x.tar/b.png",)}


@pytest.mark.parametrize("strategy", ["webdataset", "jsonl", "parquet", "csv", "huggingface"])
def test_every_strategy_of_a_place_that_knows_captions_takes_them(shards, strategy):
    write_tar(Path("shards/a.tar"), {"1.png": b"png", "1.txt": b"a cat"})

    assert [entry.captions for entry in shards(caption_strategy=strategy).list() if entry.name.endswith(".png")] == [("a cat",)]


@pytest.mark.parametrize("size", ["-1536", str(2**40), str(2**70)])
def test_a_header_that_claims_an_impossible_size_is_no_crash(shards, size):
    item = tarfile.TarInfo("1.png")
    item.pax_headers = {"size": size}
    write_tar(Path("shards/a.tar"), {"1.png": item, "2.png": b"png"})

    faults = {entry.name: entry.fault for entry in shards().list()}

    assert faults and set(faults.values()) - {None}


def test_a_name_that_is_no_text_is_unreadable(shards):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    write_tar(Path("shards/a.tar"), {name: b"png", "good.png": b"png"}, format=tarfile.GNU_FORMAT)

    entries = list(shards().list())

    assert sorted(entry.fault or "" for entry in entries) == ["", "unreadable"]
    assert all(entry.name.encode() for entry in entries)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that are opened from here on, other than by SQLite."""
    names: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *mode, **how: [names.append(self.name), real(self, *mode, **how)][1])
    return names


@pytest.fixture
def start(shards):
    """Open the place `shards` as a new start does, and list it."""

    def run(**keys):
        place = shards(**keys)
        place.keep_in(Path("cache/index"))
        return place, list(place.list())

    return run


def test_a_second_start_opens_no_shard_and_lists_the_same(start, opened):
    write_tar(Path("shards/one.tar"), {"a.png": b"aa", "a.txt": b"a cat\na dog", "b.png": b"b", "b.json": b'{"caption": ["x", "y"]}'})
    write_tar(Path("shards/two.tar"), {"../c.png": b"c", "d.png": b"dddd", "e.png": link("e.png", "d.png"), "caf\udce9.png": b"f"})
    Path("shards/bad.tar").write_bytes(b"no tar file")
    _, first = start()
    assert set(opened) == {"one.tar", "two.tar", "bad.tar"}
    opened.clear()

    place, second = start()

    assert opened == []
    assert second == first and {entry.fault for entry in second} == {None, "outside", "unreadable", "broken"}
    assert place.read("two.tar/d.png") == b"dddd" and opened == ["two.tar"]


def test_only_shards_that_changed_are_opened_again_and_those_that_are_gone_are_forgotten(start, opened):
    for name in ("a", "b", "c"):
        write_tar(Path(f"shards/{name}.tar"), {"x.png": b"x", "x.txt": name.encode()})
    start()
    write_tar(Path("shards/b.tar"), {"x.png": b"x", "x.txt": b"n"})
    os.utime("shards/b.tar", ns=(7, 7))
    Path("shards/c.tar").unlink()
    opened.clear()

    _, entries = start()

    assert set(opened) == {"b.tar"}
    assert {entry.name: entry.captions for entry in entries if entry.captions} == {"a.tar/x.png": ("a",), "b.tar/x.png": ("n",)}
    with closing(sqlite3.connect("cache/index/tars/set.sqlite")) as base:
        assert {os.fsdecode(path) for (path,) in base.execute("SELECT path FROM shards")} == {os.path.abspath(f"shards/{name}.tar") for name in "ab"}


def test_captions_are_read_when_they_are_first_asked_for_and_split_as_asked(start, opened):
    write_tar(Path("shards/x.tar"), {"a.png": b"a", "a.txt": b"one\ntwo"})
    start(caption_strategy="filename")
    opened.clear()

    asked = start()[1][0].captions
    assert opened
    opened.clear()

    assert (asked, start(disable_multiline_split=True)[1][0].captions) == (("one", "two"), ("one\ntwo",))
    assert opened == []


def test_a_damaged_book_is_made_anew(start):
    write_tar(Path("shards/x.tar"), {"a.png": b"a"})
    _, first = start()
    Path("cache/index/tars/set.sqlite").write_bytes(b"no database" * 100)

    assert start()[1] == first == start()[1]


def test_a_run_keeps_its_book_beside_the_index(plan_of, console, save, opened):
    data = save("0.png").read_bytes()
    write_tar(Path("shards/x.tar"), {"a.png": data, "a.txt": b"a cat"})
    entry = {"id": "set", "type": "webdataset", "source": "shards", "caption_strategy": "webdataset"}
    first = discover(plan_of(entry).datasets[0], Path("cache/index"), 0, console)
    opened.clear()

    second = discover(plan_of(entry).datasets[0], Path("cache/index"), 0, console)

    assert "x.tar" not in opened
    assert second.samples[0].captions == first.samples[0].captions == ("a cat",)
