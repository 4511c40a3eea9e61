"""Images in rows of a table: a dataset of the Hugging Face hub, a folder that `datasets` can read, or parquet files."""

from __future__ import annotations

import glob
import importlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.data.backend import Block, DataBackend, DatasetOptions, Entry, OpenBar, check_name, is_hidden, stamp
from simpletuner.data.backends.local import is_inside
from simpletuner.data.columns import IMAGE_SUFFIXES, captions_in, require_columns, size_in
from simpletuner.data.extras import lacking
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.data.rows import ArrowRows, Outline, ParquetRows, Rows
from simpletuner.errors import DatasetError, choose

USUAL_CAPTIONS = ("caption", "text")
USUAL_SUFFIX = ".png"
"""Given to an image without a name; what it holds is told by its content anyway."""


class Filter(Block):
    """Keys of `huggingface.filter_func`: which rows are used. A row whose cell is empty is left out."""

    collection: str | tuple[str, ...] = ()
    """Only rows of these collections."""
    quality: float | dict[str, float] | None = None
    """Only rows of at least this quality; with names, at least so much in each of these columns or fields of `quality_column`."""
    min_width: int = 0
    min_height: int = 0


class RowOptions(Block):
    """Keys of the block `huggingface`."""

    filter_func: Filter | None = None
    image_column: str | None = None
    caption_column: str | None = None
    width_column: str | None = None
    height_column: str | None = None
    quality_column: str = "quality"
    collection_column: str = "collection"
    auto_load: bool = True
    """Without effect: a dataset is loaded when it is needed."""


class HuggingfaceOptions(DatasetOptions):
    """Keys of an image dataset in rows."""

    dataset_name: str
    """Name on the hub, a folder, a .parquet file, or a pattern of such files."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub."""
    image_column: str | None = None
    """Column of the images; `image` if not given."""
    caption_column: str | None = None
    """Column of captions, or of lists of alternatives; `caption` or `text` if not given."""
    streaming: bool = False
    """Read parquet files where they lie, a row group at a time, instead of copying all of them first."""
    huggingface: RowOptions = RowOptions()

    @property
    def knows_captions(self) -> bool:
        return True

    def problems(self) -> Iterator[str]:
        yield from lacking("datasets", "datasets", "type 'huggingface'")
        block = self.huggingface
        for key, own, other in (
            ("image_column", self.image_column, block.image_column),
            ("caption_column", self.caption_column, block.caption_column),
        ):
            if own and other and own != other:
                yield f"{key} is {own!r}, but huggingface.{key} is {other!r}; write it once"
        if self.streaming and "[" in self.split:
            yield f"split {self.split!r} takes a part of it, which streaming cannot; name the split alone, and set max_num_samples"
        if (block.width_column is None) != (block.height_column is None):
            yield "huggingface.width_column and huggingface.height_column go together"


class HuggingfaceBackend(DataBackend):
    """A split of a dataset. An image is named as its row says, if that is a name and no other row has it, else by the row's number."""

    options_type = HuggingfaceOptions

    def __init__(self, options: HuggingfaceOptions) -> None:
        self._options = options
        self._block = options.huggingface
        self._image_column = options.image_column or self._block.image_column or "image"
        self._lock = threading.RLock()

    @property
    def place(self) -> str:
        return f"{self._options.dataset_name} ({self._options.split})"

    def missing(self) -> str | None:
        name = self._options.dataset_name
        path = Path(name).expanduser()
        if is_file_or_pattern(name):
            return None if self._files() else f"dataset_name {name}: there is no such file"
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        return f"dataset_name {name}: there is no such folder, and it is no name on the hub" if looks_local and not path.is_dir() else None

    def prepare(self, bar: OpenBar) -> tuple[str, ...]:
        if self._block.filter_func is None:
            return ()
        kept = self._kept
        return (f"filter_func leaves {sum(kept)} of {len(kept)} rows of {self.place}",)

    def list(self) -> Iterator[Entry]:
        rows, kept = self._rows, self._kept
        captions = self._cells(self._caption_column)
        widths, heights = self._cells(self._block.width_column), self._cells(self._block.height_column)
        with self._told_plainly():
            entries = [
                self._entry(name, row, outline, captions_in(captions[row]) if captions else (), (widths[row], heights[row]) if widths else None)
                for row, (name, outline) in enumerate(zip(self._names, rows.outlines()))
                if kept[row]
            ]
        yield from sorted(entries, key=lambda entry: entry.name)

    def _entry(self, name: str, row: int, outline: Outline, captions: tuple[str, ...], size: tuple[object, object] | None) -> Entry:
        size_bytes, mark, fault = outline.size_bytes or 0, stamp(*self._rows.stamp(row)), None
        if outline.size_bytes is None and outline.path is None:
            fault = "zero-byte"
        elif outline.size_bytes is None:
            path = self._path(outline.path or "")
            if path is None:
                return Entry(name, 0, 0, fault="outside")
            try:
                facts = path.stat()
            except OSError:
                return Entry(name, 0, 0, fault="unreadable")
            size_bytes, mark = facts.st_size, facts.st_mtime_ns
        if size_bytes >= LIMIT_BYTES and not self._options.streaming:
            fault = "too many bytes"
        return Entry(name, size_bytes, mark, fault, captions or None, size_in(*size) if size else None)

    def read(self, name: str) -> bytes:
        check_name(name)
        row = self._numbers.get(name)
        if row is None:
            raise DatasetError(f"{self.place} has no row for {name!r}")
        with self._told_plainly():
            data, given = self._rows.picture(row)
            path = self._path(given) if data is None and given else None
            data = path.read_bytes() if path is not None else data
        if data is None or len(data) >= LIMIT_BYTES:
            raise DatasetError(f"{name} of {self.place} holds {'nothing that may be read' if data is None else f'{LIMIT_BYTES:,} bytes or more'}")
        return data

    def exists(self, name: str) -> bool:
        check_name(name)
        return name in self._numbers

    def _path(self, given: str) -> Path | None:
        """Where a path of a row leads, if that is in the dataset's own folder, or where `datasets` keeps downloads; else None."""
        from huggingface_hub import constants

        root = os.path.realpath(os.path.expanduser(self._options.dataset_name))
        homes = [root, *map(os.path.realpath, (library().config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE))]
        path = os.path.realpath(os.path.join(root, given))
        return Path(path) if any(is_inside(path, home) for home in homes) else None

    def _cells(self, column: str | None) -> Sequence[Any]:
        """A column; nothing if none is named."""
        if column is None:
            return []
        require_columns([column], self._rows.columns, self.place)
        with self._told_plainly():
            return self._rows.values(column)

    @property
    def _caption_column(self) -> str | None:
        named = self._options.caption_column or self._block.caption_column
        return named or next((column for column in USUAL_CAPTIONS if column in self._rows.columns), None)

    @property
    def _rows(self) -> Rows:
        with self._lock:
            return self._opened

    @cached_property
    def _opened(self) -> Rows:
        """Find the rows, and fetch them where `datasets` must."""
        with self._told_plainly():
            if self._options.streaming:
                found: Rows = ParquetRows(self._parquet_files(), self._image_column)
            else:
                dataset = self._load()
                require_columns([self._image_column], dataset.column_names, self.place)
                found = ArrowRows(dataset.data.table, self._image_column, dataset._fingerprint)
            return found

    def _load(self) -> Any:
        """The split as `datasets` prepares it: in Arrow files of its own cache, made anew when what they were made from changes."""
        name, split = self._options.dataset_name, self._options.split
        folder = Path(name).expanduser()
        if (folder / "dataset_dict.json").is_file():
            return library().load_from_disk(str(folder / split)).flatten_indices()
        if (folder / "state.json").is_file():
            return library().load_from_disk(str(folder)).flatten_indices()
        return library().load_dataset(**self._source(), split=split)

    def _source(self) -> dict[str, Any]:
        """What `datasets` is asked for."""
        name = self._options.dataset_name
        if is_file_or_pattern(name):
            return {"path": "parquet", "data_files": {self._options.split.split("[")[0]: self._files()}}
        local = os.path.expanduser(name)
        return {"path": local} if os.path.isdir(local) else {"path": name, "revision": self._options.revision}

    def _parquet_files(self) -> Sequence[tuple[str, object]]:
        """Address of each parquet file of the split, and a mark that changes with the file."""
        builder = library().load_dataset_builder(**self._source())
        found = builder.config.data_files or {}
        if self._options.split not in found:
            raise DatasetError(
                f"{self._options.dataset_name} has no split {self._options.split!r}", hint=choose(self._options.split, map(str, found), "splits")
            )
        files = found[self._options.split]
        if not all(str(file).endswith(".parquet") for file in files):
            raise DatasetError(f"{self.place} is not kept in parquet files, which streaming needs", hint="Set streaming to false.")
        return [(str(file), mark) for file, mark in zip(files, files.origin_metadata)]

    def _files(self) -> Sequence[str]:
        return sorted(glob.glob(os.path.expanduser(self._options.dataset_name), recursive=True))

    @cached_property
    def _kept(self) -> Sequence[bool]:
        """Whether each row is used."""
        kept = [True] * len(self._names)
        for column, test in tests_of(self._block, self._rows.columns, self.place):
            kept = [was and test(cell) for was, cell in zip(kept, self._cells(column))]
        return kept

    @property
    def _names(self) -> Sequence[str]:
        with self._lock:
            return self._made_names

    @cached_property
    def _made_names(self) -> Sequence[str]:
        """The name of each row's image; the same whatever is filtered."""
        with self._told_plainly():
            paths = [outline.path for outline in self._rows.outlines()]
        root = os.path.realpath(os.path.expanduser(self._options.dataset_name))
        inner = [None if path is None else os.path.relpath(path, root) if is_inside(path, root) else path for path in paths]
        counts = Counter(inner)
        return [name_of(row, path, counts[path] == 1) for row, path in enumerate(inner)]

    @property
    def _numbers(self) -> dict[str, int]:
        with self._lock:
            return self._made_numbers

    @cached_property
    def _made_numbers(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._made_names)}

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turn what `datasets`, the hub and Arrow raise into one error. Their words tell best what is wrong."""
        import pyarrow as pa

        try:
            yield
        except DatasetError:
            raise
        except (OSError, ValueError, KeyError, pa.ArrowException, library().exceptions.DatasetsError) as error:
            hint = "Check dataset_name, split and revision; a dataset on the hub also needs a network, and some need 'hf auth login'."
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise DatasetError(f"{self.place} cannot be read: {words[0][:300]}", hint=hint) from error


def library() -> Any:
    """The package `datasets`; by its name, as the folder `datasets` of somebody's pictures looks like a package to those who check types."""
    return importlib.import_module("datasets")


def is_file_or_pattern(name: str) -> bool:
    return name.endswith(".parquet") or glob.has_magic(name)


def name_of(row: int, path: str | None, is_only_one: bool) -> str:
    """Name a row's image by its path if that is a harmless name that no other row has, else by the row's number."""
    stem, suffix = os.path.splitext(os.path.basename(path or ""))
    if path is None or suffix.lower() not in IMAGE_SUFFIXES:
        return f"{row:08d}/{stem.lstrip('.')}{USUAL_SUFFIX}" if stem.strip(".") else f"{row:08d}{USUAL_SUFFIX}"
    plain = PurePosixPath(path)
    is_harmless = not plain.is_absolute() and ".." not in plain.parts and "\0" not in path and "\\" not in path and not is_hidden(path)
    return plain.as_posix() if is_only_one and is_harmless else f"{row:08d}/{plain.name.lstrip('.')}"


def tests_of(block: RowOptions, columns: Sequence[str], place: str) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """Give column and test of each rule of `filter_func`.

    Raises:
        DatasetError: a column is not there.
    """
    rules = block.filter_func or Filter()
    wanted = {rules.collection} if isinstance(rules.collection, str) else set(rules.collection)
    if wanted:
        yield block.collection_column, lambda cell: not wanted.isdisjoint(cell if isinstance(cell, list) else [cell])
    for least, column in ((rules.min_width, block.width_column or "width"), (rules.min_height, block.height_column or "height")):
        if least:
            yield column, partial(is_at_least, least)
    if isinstance(rules.quality, dict):
        for name, least_quality in rules.quality.items():
            if name in columns:
                yield name, partial(is_at_least, least_quality)
            else:
                require_columns([block.quality_column], columns, place)
                yield block.quality_column, partial(is_field_at_least, name, least_quality)
    elif rules.quality is not None:
        yield block.quality_column, partial(is_at_least, rules.quality)


def is_at_least(least: float, cell: Any) -> bool:
    return isinstance(cell, (int, float)) and cell >= least


def is_field_at_least(name: str, least: float, cell: Any) -> bool:
    return isinstance(cell, dict) and is_at_least(least, cell.get(name))
