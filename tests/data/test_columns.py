from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.backends.local import LocalBackend, LocalOptions
from simpletuner.data.columns import Table, TableBackend, captions_in, read_rows, size_in, text_of
from simpletuner.data.discover import discover, take_up
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.types import Size

KINDS = ["jsonl", "csv", "parquet"]
Rows = list[dict[str, Any]]


def write_table(path: Path, rows: Rows) -> Path:
    """Write rows in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.fixture
def described(workplace: Path) -> Callable[..., TableBackend]:
    """The folder `images` with a table beside it."""

    def make(path: str, *files: str, **keys: Any) -> TableBackend:
        for name in files:
            (workplace / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (workplace / "images" / name).write_bytes(b"x")
        return TableBackend(
            LocalBackend(LocalOptions(id="set", instance_data_dir="images")), Table.model_validate({"path": path, "filename_column": "file", **keys})
        )

    return make


def captions_by_name(backend: TableBackend) -> dict[str, tuple[str, ...] | None]:
    return {entry.name: entry.captions for entry in backend.list() if not entry.name.endswith((".jsonl", ".csv", ".parquet"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["images", "elsewhere"])
def test_a_table_says_captions_and_sizes_of_files(described, kind, folder):
    write_table(
        Path(f"{folder}/table.{kind}"),
        [
            {"file": "cat", "text": "a cat, \u2028 grey", "other": "not this", "w": 300, "h": 200},
            {"file": "in/dog.jpg", "text": "", "other": "the other", "w": 30, "h": 20},
            {"file": "nobody", "text": "x", "other": "", "w": 0, "h": 1},
            {"file": "blank", "text": " ", "other": "", "w": 0, "h": 1},
        ],
    )
    path = f"table.{kind}" if folder == "images" else f"{folder}/table.{kind}"
    keys = {"caption_column": "text", "fallback_caption_column": "other", "width_column": "w", "height_column": "h"}
    backend = described(path, "cat.png", "in/dog.jpg", "unlisted.png", "blank.png", **keys)

    found = {entry.name: (entry.captions, entry.size) for entry in backend.list() if not entry.name.startswith("table")}

    assert backend.missing() is None
    assert found == {
        "blank.png": (None, None),
        "cat.png": (("a cat, \u2028 grey",), Size(300, 200)),
        "in/dog.jpg": (("the other",), Size(30, 20)),
        "unlisted.png": (None, None),
    }
    assert backend.read("cat.png") == b"x" and backend.read_head("cat.png", 1) == b"x" and backend.exists("in/dog.jpg")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_in_a_cell_is_a_list_of_alternatives_and_so_are_several_rows(described, kind):
    write_table(
        Path(f"t.{kind}"), [{"file": "a.png", "text": ["one", " ", "two"]}, {"file": "a", "text": ["three", "one"]}, {"file": "b", "text": []}]
    )

    assert captions_by_name(described(f"t.{kind}", "a.png", "b.png", caption_column="text")) == {"a.png": ("one", "two", "three"), "b.png": None}


def test_names_are_compared_with_or_without_their_suffix(described):
    write_table(
        Path("t.jsonl"),
        [{"file": "v1.5", "text": "dots"}, {"file": "a.png", "text": "png"}, {"file": "./in\\b.JPG", "text": "windows"}, {"file": 7, "text": "id"}],
    )
    files = ("v1.5.png", "a.png", "a.jpg", "in/b.jpg", "7.webp")

    without = captions_by_name(described("t.jsonl", *files, caption_column="text"))
    within = captions_by_name(described("t.jsonl", *files, caption_column="text", identifier_includes_extension=True))

    assert without == {"v1.5.png": ("dots",), "a.png": ("png",), "a.jpg": ("png",), "in/b.jpg": ("windows",), "7.webp": ("id",)}
    assert within == {"v1.5.png": None, "a.png": ("png",), "a.jpg": None, "in/b.jpg": None, "7.webp": None}


def test_names_in_a_table_open_no_file(described, workplace):
    (workplace / "secret.png").write_bytes(b"secret")
    write_table(Path("t.jsonl"), [{"file": name, "text": "x"} for name in ("../secret.png", "/etc/passwd", "good.png", "in/../../secret")])

    assert captions_by_name(described("t.jsonl", "good.png", caption_column="text")) == {"good.png": ("x",)}


def test_a_table_that_fits_no_file_is_an_error_that_shows_both_sides(described):
    write_table(Path("t.jsonl"), [{"file": "images/a.png", "text": "x"}])

    with pytest.raises(DatasetError) as caught:
        list(described("t.jsonl", "a.png", caption_column="text").list())

    assert "column 'file' says 'images/a', an image is 'a.png'" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.jsonl", b'{"file": "a"}\n{"file": \n', "t.jsonl line 2 is not JSON"),
        ("t.jsonl", b'{"file": "a", "text": "x"}\n[1]\n', "t.jsonl line 2 is not an object"),
        ("t.jsonl", b'{"file": "a", "txt": "x"}\n', "t.jsonl has no column 'text'"),
        ("t.csv", b"file;text\na;b\n", "t.csv has no column 'file'"),
        ("t.csv", b"", "t.csv has no column 'file'"),
        ("t.csv", b'file,text\na,"' + b"x" * 200_000 + b'"\n', "t.csv line 2 cannot be read as csv: field larger than field limit"),
        ("t.parquet", b"PAR1 not really", "t.parquet cannot be read as parquet"),
    ],
)
def test_a_damaged_table_is_named_with_the_place(described, name, content, problem):
    Path(name).write_bytes(content)

    with pytest.raises(DatasetError) as caught:
        list(described(name, "a.png", caption_column="text").list())

    assert problem in caught.value.message


def test_a_lacking_column_offers_the_nearest_one(workplace):
    path = write_table(Path("t.csv"), [{"file": "a", "captions": "x"}])

    with pytest.raises(DatasetError) as caught:
        list(read_rows(path, "t.csv", ["caption"]))

    assert "did you mean 'captions'?" in str(caught.value.hint)


def test_a_table_that_is_nowhere_is_said_before_anything_is_read(described):
    assert described("gone.jsonl", "a.png").missing() == "parquet.path gone.jsonl is neither a file in images nor one where the command runs"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"metadata_backend": "parquet"}, "metadata_backend 'parquet' needs the block 'parquet'"),
        ({"parquet": {"path": "t.jsonl"}}, "parquet.filename_column is needed"),
        (
            {"parquet": {"path": "t.jsonl", "filename_column": "f", "captoin_column": "c"}},
            "unknown key 'captoin_column'; did you mean 'caption_column'?",
        ),
        ({"parquet": {"path": "t.xlsx", "filename_column": "f"}}, "parquet.path is 't.xlsx'; tables end in .parquet, .jsonl, .csv"),
        ({"parquet": {"path": "t.jsonl", "filename_column": "f", "width_column": "w"}}, "parquet.width_column and parquet.height_column go together"),
        (
            {"metadata_backend": "discovery", "parquet": {"path": "t.jsonl", "filename_column": "f"}},
            "the block 'parquet' needs metadata_backend 'parquet', not 'discovery'",
        ),
        ({"metadata_backend": "parkett"}, "metadata_backend is 'parkett'; it must be 'discovery'"),
        ({"caption_strategy": "parquet"}, "caption_strategy is 'parquet', but 'local' knows no captions without a column that holds them"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_rule(plan_of, keys, problem):
    with pytest.raises(ConfigError) as caught:
        plan_of({"id": "set", "instance_data_dir": ".", **keys})

    assert problem in caught.value.message


def test_a_package_that_is_not_installed_names_the_extra(plan_of, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)

    with pytest.raises(ConfigError, match=r"a .parquet table needs the package pyarrow, .*: pip install 'simpletuner\[datasets\]'"):
        plan_of({"id": "set", "instance_data_dir": ".", "parquet": {"path": "t.parquet", "filename_column": "f"}})


def test_a_table_s_captions_reach_the_samples_and_their_changes_are_told(dataset_of, save, console, workplace):
    for name in ("a.png", "b.png", "c.png"):
        save(name)
    keys = {
        "caption_strategy": "parquet",
        "metadata_backend": "parquet",
        "parquet": {"_comment": "x", "path": "{output_dir}/{id}.jsonl", "filename_column": "file", "caption_column": "text"},
    }
    write_table(Path("output/set.jsonl"), [{"file": "a", "text": "a cat"}, {"file": "b", "text": ["one\nline", "two"]}])

    def found():
        found = discover(dataset_of(**keys), Path("cache/index"), 1, console)
        take_up(dataset_of(**keys), Path("cache/index"), 1)
        return found

    first = found()
    again = found()
    write_table(Path("output/set.jsonl"), [{"file": "a", "text": "the cat"}, {"file": "c", "text": "new"}])
    changed = found()

    assert {sample.name: sample.captions for sample in first.samples} == {"a.png": ("a cat",), "b.png": ("one\nline", "two")}
    assert first.skipped == {"no caption": ("c.png",)}
    assert (str(first.caption_changes), str(again.caption_changes), str(changed.caption_changes)) == (
        "2 new",
        "nothing changed",
        "1 new, 1 changed, 1 gone",
    )


@given(st.one_of(st.none(), st.floats(), st.integers(), st.booleans(), st.text(), st.lists(st.one_of(st.none(), st.text()))))
def test_any_cell_gives_captions_without_blank_ones(cell):
    assert all(caption and caption == caption.strip() for caption in captions_in(cell))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_size_is_read_from_numbers_and_from_text(width, height):
    assert size_in(width, height) == size_in(str(width), f" {height} ") == size_in(float(width), height) == Size(width, height)


@pytest.mark.parametrize("cell", [None, "", "wide", 0, -1, 2.5, float("nan"), float("inf"), True])
def test_what_is_no_size_is_none(cell):
    assert size_in(cell, 10) is None
    assert text_of(None) == text_of(float("nan")) == ""
