from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner import plugins
from simpletuner.data.backend import DataBackend, DatasetOptions, check_name
from simpletuner.data.backends.huggingface import Filter, RowOptions
from simpletuner.data.backends.local import LocalBackend, LocalOptions
from simpletuner.data.columns import Table
from simpletuner.errors import DatasetError


@pytest.fixture
def folder(workplace):
    for name in ("b.png", "a/z.png", "a/y.txt", ".hidden.png", ".cache/x.png", "a b/ü.png"):
        path = workplace / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (workplace / "secret.png").write_bytes(b"secret")
    return workplace / "images"


@pytest.fixture
def backend(folder) -> LocalBackend:
    return LocalBackend(LocalOptions(id="set", instance_data_dir="images"))


@pytest.mark.parametrize("name", plugins.names("simpletuner.data.backends"))
def test_every_backend_declares_its_keys(name):
    kind = plugins.load("simpletuner.data.backends", name, DataBackend)  # type: ignore[type-abstract]

    assert issubclass(kind.options_type, DatasetOptions) and kind.options_type is not DatasetOptions


@pytest.mark.parametrize("name", plugins.names("simpletuner.data.backends"))
def test_every_key_of_every_place_is_in_the_manual(name):
    manual = (Path(__file__).parents[2] / "docs" / "dataloader.md").read_text(encoding="utf-8").split("## Places")[1].split("\n## ")[0]
    kind = plugins.load("simpletuner.data.backends", name, DataBackend)  # type: ignore[type-abstract]

    keys = set(kind.options_type.model_fields) - set(DatasetOptions.model_fields)
    for block in (Table, RowOptions, Filter):
        keys |= set(block.model_fields)
    assert not [key for key in keys if f"`{key}`" not in manual]


def test_files_are_listed_by_name_without_hidden_ones(backend, folder):
    entries = list(backend.list())

    assert [entry.name for entry in entries] == ["a b/ü.png", "a/y.txt", "a/z.png", "b.png"]
    facts = (folder / "b.png").stat()
    assert (entries[-1].size_bytes, entries[-1].modified_ns, entries[-1].fault) == (facts.st_size, facts.st_mtime_ns, None)


def test_what_is_listed_can_be_read(backend):
    for entry in backend.list():
        assert backend.exists(entry.name)
        assert backend.read(entry.name) == entry.name.encode()
    assert backend.read_text("a/y.txt") == ("a/y.txt", "utf-8")


def test_a_missing_file_is_named(backend):
    assert not backend.exists("a/none.png")
    with pytest.raises(DatasetError, match=r"images/a/none.png cannot be read: No such file"):
        backend.read("a/none.png")


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "", ".", "a\0b"])
def test_names_that_lead_out_are_refused(backend, name):
    with pytest.raises(DatasetError, match="is no file name inside a dataset"):
        backend.read(name)
    with pytest.raises(DatasetError):
        check_name(name)


def test_links_are_followed_inside_the_folder_only(backend, folder):
    (folder / "in.png").symlink_to("a/z.png")
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "outer").symlink_to("..")
    (folder / "again").symlink_to(".")
    (folder / "a" / "up").symlink_to("../a")

    found = {entry.name: entry.fault for entry in backend.list()}

    assert found["in.png"] is None
    assert backend.read("in.png") == b"a/z.png"
    assert [found[name] for name in ("out.png", "nowhere.png", "outer")] == ["outside"] * 3
    assert not [name for name in found if name.startswith(("again", "a/up"))]
    for name in ("out.png", "outer/secret.png"):
        with pytest.raises(DatasetError, match="link out of the dataset's folder"):
            backend.read(name)


def test_the_folder_itself_may_be_a_link(folder, workplace):
    (workplace / "link").symlink_to("images")
    backend = LocalBackend(LocalOptions(id="set", instance_data_dir="link"))

    assert backend.missing() is None
    assert backend.read(next(backend.list()).name) == "a b/ü.png".encode()


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_no_text_is_listed_as_unreadable(backend, folder):
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")

    assert [entry.name for entry in backend.list() if entry.fault == "unreadable"] == ["caf?.png"]


def test_the_place_says_what_is_wrong_with_it(workplace):
    (workplace / "file").write_bytes(b"")

    def missing(place: str) -> str | None:
        return LocalBackend(LocalOptions(id="set", instance_data_dir=place)).missing()

    assert missing("none") == "folder none does not exist"
    assert missing("file") == "file is a file, not a folder"
    assert missing(".") is None


def test_values_written_as_text_are_read_as_what_they_mean():
    options = LocalOptions.model_validate(
        {"id": "set", "instance_data_dir": "x", "crop": "true", "resolution": "1024", "repeats": "3", "crop_aspect_buckets": ["1.0", 0.5]}
    )

    assert options.crop is True
    assert (options.resolution, options.repeats, options.crop_aspect_buckets) == (1024.0, 3, (1.0, 0.5))
