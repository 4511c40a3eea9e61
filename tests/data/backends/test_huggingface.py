from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data import rows as rows_module
from simpletuner.data.backends.huggingface import HuggingfaceBackend, HuggingfaceOptions
from simpletuner.data.discover import discover
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.types import Size

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

BOTH = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """What `datasets` prepares goes into the test's folder, and the hub is not asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def write(workplace: Path) -> Callable[..., Path]:
    """Write rows to a parquet file, two to a row group; `image` may be bytes or bytes and a path."""

    def save(*rows: dict[str, Any], name: str = "set/data/train-00000.parquet", **columns: Any) -> Path:
        path = workplace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [row if isinstance(row["image"], dict) else {**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({key: pa.array([cell.get(key) for cell in cells], kind if key == "image" else None) for key in cells[0]})
        pq.write_table(table, path, row_group_size=2)
        return path

    return save


@pytest.fixture
def place(workplace: Path) -> Callable[..., HuggingfaceBackend]:
    def make(name: str = "set", **keys: Any) -> HuggingfaceBackend:
        return HuggingfaceBackend(HuggingfaceOptions.model_validate({"id": "set", "type": "huggingface", "dataset_name": name, **keys}))

    return make


def named(data: bytes, path: str | None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


@BOTH
@pytest.mark.parametrize("name", ["set", "set/data/train-00000.parquet", "set/data/*.parquet"])
def test_rows_are_listed_and_read_wherever_they_lie(write, place, streaming, name):
    write(*({"image": bytes([number]) * (number + 1), "text": f"caption {number}"} for number in range(7)))
    backend = place(name, streaming=streaming)

    entries = list(backend.list())

    assert backend.missing() is None
    assert [entry.name for entry in entries] == [f"{number:08d}.png" for number in range(7)]
    assert [entry.captions for entry in entries] == [(f"caption {number}",) for number in range(7)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(backend.read, [entry.name for entry in entries]))
    assert found == [bytes([number]) * (number + 1) for number in range(7)]
    assert all(entry.size_bytes >= len(data) for entry, data in zip(entries, found))
    assert backend.exists("00000003.png") and not backend.exists("00000007.png")
    with pytest.raises(DatasetError, match=r"has no row for 'none\.png'"):
        backend.read("none.png")


@BOTH
def test_an_image_is_named_as_its_row_says_if_that_is_harmless_and_its_own(write, place, streaming):
    paths = ["a/cat.jpg", "dog.png", "dog.png", "../evil.png", "/etc/evil.png", ".hidden.png", None, "no suffix", "x\\y.png"]
    write(*({"image": named(bytes([number]), path)} for number, path in enumerate(paths)))
    backend = place(streaming=streaming)

    names = {backend.read(entry.name)[0]: entry.name for entry in backend.list()}

    assert names == {
        0: "a/cat.jpg",
        1: "00000001/dog.png",
        2: "00000002/dog.png",
        3: "00000003/evil.png",
        4: "00000004/evil.png",
        5: "00000005/hidden.png",
        6: "00000006.png",
        7: "00000007/no suffix.png",
        8: "00000008/x\\y.png",
    }


@BOTH
def test_columns_say_captions_and_sizes(write, place, streaming):
    write(
        {"image": b"a", "words": ["one", " two ", ""], "w": 300, "h": 200},
        {"image": b"b", "words": [], "w": 0, "h": 200},
        {"image": b"c", "words": None, "w": None, "h": None},
    )

    entries = list(place(streaming=streaming, caption_column="words", huggingface={"width_column": "w", "height_column": "h"}).list())

    assert [(entry.captions, entry.size) for entry in entries] == [(("one", "two"), Size(300, 200)), (None, None), (None, None)]


@BOTH
def test_a_filter_leaves_out_rows_and_does_not_rename_the_others(write, place, streaming):
    write(
        *(
            {
                "image": bytes([number]),
                "width": 100 * number,
                "height": 500,
                "collection": "ab"[number % 2],
                "quality": number / 10,
                "marks": {"clip": number},
            }
            for number in range(8)
        )
    )

    def kept(**rules: Any) -> list[int]:
        backend = place(streaming=streaming, huggingface={"filter_func": rules, "quality_column": rules.pop("column", "quality")})
        (note,) = backend.prepare(lambda total: nullcontext())  # type: ignore[arg-type, return-value]
        found = [int(entry.name[:8]) for entry in backend.list()]
        assert note == f"filter_func leaves {len(found)} of 8 rows of set (train)"
        return found

    assert kept(collection="a") == [0, 2, 4, 6]
    assert kept(collection=["a", "b"], min_width=500) == [5, 6, 7]
    assert kept(quality=0.6) == [6, 7]
    assert kept(quality={"clip": 3, "width": 600}, column="marks") == [6, 7]
    with pytest.raises(DatasetError, match="has no column 'qualiti'") as caught:
        kept(quality=0.5, column="qualiti")
    assert "did you mean 'quality'?" in str(caught.value.hint)


@BOTH
def test_a_stamp_changes_with_the_file(write, place, streaming):
    path = write({"image": b"a"}, {"image": b"b"})
    first = list(place(streaming=streaming).list())
    again = list(place(streaming=streaming).list())
    write({"image": b"a"}, {"image": b"c"})
    os.utime(path, (1, 1))
    changed = list(place(streaming=streaming).list())

    assert first == again
    assert len({entry.modified_ns for entry in (*first, *changed)}) == 4
    assert place(streaming=streaming).read("00000001.png") == b"c"


def test_streaming_reads_a_row_group_once_for_its_neighbours(write, place, monkeypatch):
    write(*({"image": bytes([number]) * 1000} for number in range(6)))
    write(*({"image": bytes([100 + number]) * 1000} for number in range(3)), name="set/data/train-00001.parquet")
    backend = place(streaming=True)
    names = [entry.name for entry in backend.list()]
    opened: list[str] = []
    monkeypatch.setattr(rows_module, "opened", lambda address, real=rows_module.opened: opened.append(address) or real(address))
    monkeypatch.setattr(rows_module, "HELD_BYTES", 1)

    found = [backend.read(name)[0] for name in names]

    assert found == [0, 1, 2, 3, 4, 5, 100, 101, 102]
    assert len(opened) == 5  # row groups, two rows each and a last one


def test_a_picture_without_bytes_is_named(write, place):
    write({"image": named(b"a", "a.png")}, {"image": {"bytes": None, "path": None}}, {"image": b""})

    entries = list(place().list())

    assert [(entry.name, entry.fault, entry.size_bytes) for entry in entries] == [
        ("00000001.png", "zero-byte", 0),
        ("00000002.png", None, 0),
        ("a.png", None, 1),
    ]


def test_paths_in_rows_lead_nowhere_else(write, place, workplace):
    (workplace / "secret.png").write_bytes(b"secret")
    (workplace / "set").mkdir()
    (workplace / "set/beside.png").write_bytes(b"beside")
    paths = ["beside.png", "gone.png", "../secret.png", str(workplace / "secret.png"), "/etc/passwd", "https://host/x.png"]
    write(*({"image": {"bytes": None, "path": path}} for path in paths))
    backend = place()

    faults = {entry.name: entry.fault for entry in backend.list()}

    assert list(faults.values()).count("outside") == 3 and list(faults.values()).count(None) == 1
    assert backend.read("beside.png") == b"beside"
    for name, fault in faults.items():
        if fault is not None:
            with pytest.raises(DatasetError):
                backend.read(name)


def test_a_folder_of_images_is_read_as_datasets_does(save, place):
    save("train/cats/a.png")
    path = save("train/dogs/b.jpg", 60, 40)
    backend = place("images")

    assert [entry.name for entry in backend.list()] == ["train/cats/a.png", "train/dogs/b.jpg"]
    assert backend.read("train/dogs/b.jpg") == path.read_bytes()


def test_a_dataset_that_was_saved_to_disk_is_read(place, workplace):
    made = datasets.Dataset.from_dict({"image": [b"a", b"b", b"c"], "text": ["x", "y", "z"]}).select([2, 0])
    made.save_to_disk("alone")
    datasets.DatasetDict({"test": made}).save_to_disk("split")

    for backend in (place("alone"), place("split", split="test")):
        assert [(backend.read(entry.name), entry.captions) for entry in backend.list()] == [(b"c", ("z",)), (b"a", ("x",))]


def test_a_split_may_be_cut(write, place):
    write(*({"image": bytes([number])} for number in range(6)))

    assert [place(split="train[2:4]").read(entry.name) for entry in place(split="train[2:4]").list()] == [bytes([2]), bytes([3])]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"image_column": "img"}, "set (train) has no column 'img'; "),
        ({"image_column": "text"}, "column 'text' holds"),
        ({"caption_column": "texts"}, "has no column 'texts'"),
        ({"split": "trian"}, "trian"),
        ({"split": "trian", "streaming": True}, "set has no split 'trian'"),
        ({"huggingface": {"filter_func": {"min_width": 3}}}, "has no column 'width'"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_data(write, place, keys, problem):
    write({"image": b"a", "text": "x"})

    with pytest.raises(DatasetError) as caught:
        list(place(**keys).list())

    assert problem in f"{caught.value.message}; {caught.value.hint}" and caught.value.exit_code == 3


def test_streaming_needs_parquet_files(save, place):
    save("train/a.png")

    with pytest.raises(DatasetError, match=r"images \(train\) is not kept in parquet files, which streaming needs"):
        list(place("images", streaming=True).list())


def test_the_place_says_what_is_wrong_with_it(place):
    assert place("gone/*.parquet").missing() == "dataset_name gone/*.parquet: there is no such file"
    assert "there is no such folder" in str(place("./gone").missing())
    assert place("owner/name").missing() is None


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"huggingface": {"filter_fun": {}}}, "huggingface: unknown key 'filter_fun'; did you mean 'filter_func'?"),
        ({"huggingface": {"filter_func": {"min_width": "wide"}}}, "huggingface.filter_func.min_width is 'wide'; it must be a whole number"),
        ({"huggingface": {"width_column": "w"}}, "huggingface.width_column and huggingface.height_column go together"),
        ({"image_column": "a", "huggingface": {"image_column": "b"}}, "image_column is 'a', but huggingface.image_column is 'b'; write it once"),
    ],
)
def test_settings_that_cannot_be_are_refused(plan_of, keys, problem):
    with pytest.raises(ConfigError) as caught:
        plan_of({"id": "set", "type": "huggingface", "dataset_name": "owner/name", **keys})

    assert problem in caught.value.message


def test_a_package_that_is_not_installed_names_the_extra_even_beside_a_folder_of_its_name(plan_of, monkeypatch, workplace):
    (workplace / "datasets").mkdir()
    monkeypatch.delitem(__import__("sys").modules, "datasets")
    monkeypatch.setattr("sys.path", [str(workplace)])

    with pytest.raises(ConfigError, match=r"needs the package datasets, .*: pip install 'simpletuner\[datasets\]'"):
        plan_of({"id": "set", "type": "huggingface", "dataset_name": "owner/name"})


@BOTH
def test_rows_are_a_dataset_like_a_folder(write, plan_of, save, console, streaming):
    one, other = save("a.png").read_bytes(), save("b.webp", 60, 40).read_bytes()
    write(
        {"image": named(one, "a.png"), "text": "a cat"},
        {"image": other, "text": ["x"][0]},
        {"image": b"broken", "text": "y"},
        {"image": one, "text": ""},
    )
    entry = {
        "id": "set",
        "type": "huggingface",
        "dataset_name": "{output_dir}/set",
        "caption_strategy": "huggingface",
        "metadata_backend": "huggingface",
    }
    dataset = plan_of({**entry, "streaming": streaming}, variables={"output_dir": os.getcwd()}).datasets[0]

    found = discover(dataset, Path("cache/index"), 1, console)

    assert [(sample.name, sample.captions, str(sample.geometry.original)) for sample in found.samples] == [
        ("00000001.png", ("x",), "60x40"),
        ("a.png", ("a cat",), "48x32"),
    ]
    assert found.skipped == {"broken": ("00000002.png",), "no caption": ("00000003.png",)}
