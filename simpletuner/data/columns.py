"""Tables of captions and sizes: rows of a parquet, jsonl or csv file, and how they describe the files of another place.

A table's names are only compared with names that the place itself lists. They never open a file, so they cannot lead out of it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simpletuner.data.backend import Block, DataBackend, DatasetOptions, Entry, OpenBar, check_name, stamp
from simpletuner.data.captions import decode
from simpletuner.data.extras import lacking
from simpletuner.data.faults import FOREIGN_SUFFIXES, SUFFIXES
from simpletuner.errors import DatasetError, choose
from simpletuner.types import Size

KINDS = (".parquet", ".jsonl", ".csv")
"""Suffixes of the tables that are read."""
IMAGE_SUFFIXES = SUFFIXES | FOREIGN_SUFFIXES
Row = dict[str, Any]


class Table(Block):
    """Keys of the block `parquet`: a table that describes the images of a folder or bucket."""

    path: str
    """The table, .parquet, .jsonl or .csv: its name inside the dataset, or else a path from where the command runs."""
    filename_column: str
    """Column with the name of the image inside the dataset."""
    caption_column: str | None = None
    """Column with the caption, or with a list of alternatives."""
    fallback_caption_column: str | None = None
    """Column to take where the caption is missing or blank."""
    width_column: str | None = None
    """Column with the upright width in pixels."""
    height_column: str | None = None
    """Column with the upright height in pixels."""
    identifier_includes_extension: bool = False
    """Whether names are compared with their suffix; else `cat` and `cat.png` in the table both mean the image cat.png, cat.jpg or so."""

    def columns(self) -> list[str]:
        named = (self.filename_column, self.caption_column, self.fallback_caption_column, self.width_column, self.height_column)
        return list(dict.fromkeys(column for column in named if column is not None))


class TableOptions(DatasetOptions):
    """Keys of a place of files that a table may describe."""

    metadata_backend: Literal["discovery", "json", "filesystem", "parquet"] | None = None
    """`parquet` to take captions and sizes from the table that the block `parquet` names; otherwise the files say all."""
    parquet: Table | None = None
    """The table."""

    @property
    def knows_captions(self) -> bool:
        return self.parquet is not None and self.parquet.caption_column is not None

    def problems(self) -> Iterator[str]:
        if self.parquet is None:
            if self.metadata_backend == "parquet":
                yield "metadata_backend 'parquet' needs the block 'parquet' with at least path and filename_column"
            return
        if self.metadata_backend not in (None, "parquet"):
            yield f"the block 'parquet' needs metadata_backend 'parquet', not {self.metadata_backend!r}"
        if (self.parquet.width_column is None) != (self.parquet.height_column is None):
            yield "parquet.width_column and parquet.height_column go together"
        suffix = posixpath.splitext(self.parquet.path)[1].lower()
        if suffix not in KINDS:
            yield f"parquet.path is {self.parquet.path!r}; tables end in {', '.join(KINDS)}"
        elif suffix == ".parquet":
            yield from lacking("pyarrow", "datasets", "a .parquet table")


@dataclass(slots=True)
class Described:
    """What the rows of one file say."""

    captions: tuple[str, ...]
    size: Size | None


def open_place(backend_type: type[DataBackend], options: DatasetOptions, index_folder: Path | None = None) -> DataBackend:
    """Give access to a place, with the table beside its images if it has one.

    Args:
        index_folder: where the place may keep what it learns of its files.
    """
    backend = backend_type(options)
    table = options.parquet if isinstance(options, TableOptions) else None
    place = TableBackend(backend, table) if table else backend
    if index_folder is not None:
        place.keep_in(index_folder)
    return place


class TableBackend(DataBackend):
    """The files of another place, with the captions and sizes of a table."""

    options_type = TableOptions

    def __init__(self, backend: DataBackend, table: Table) -> None:
        self._backend, self._table = backend, table

    @property
    def place(self) -> str:
        return self._backend.place

    def missing(self) -> str | None:
        fault = self._backend.missing()
        if fault is None and not self._is_inside() and not Path(self._table.path).expanduser().is_file():
            fault = f"parquet.path {self._table.path} is neither a file in {self.place} nor one where the command runs"
        return fault

    def prepare(self, bar: OpenBar) -> tuple[str, ...]:
        return self._backend.prepare(bar)

    def list(self) -> Iterator[Entry]:
        described = self._describe()
        example, is_any_met = None, not described
        for entry in self._backend.list():
            known = described.get(self._key(entry.name)) if entry.fault is None else None
            if known is not None:
                is_any_met = True
                # A size that the table tells is part of the stamp: when the table is mended, the image is looked at anew.
                modified_ns = entry.modified_ns if known.size is None else stamp(entry.modified_ns, known.size)
                yield Entry(entry.name, entry.size_bytes, modified_ns, entry.fault, known.captions or None, known.size)
            else:
                example = example or (entry.name if posixpath.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES else None)
                yield entry
        if not is_any_met and example is not None:
            raise DatasetError(
                f"none of the {len(described)} names in {self._table.path} is the name of an image in {self.place}: "
                f"column {self._table.filename_column!r} says {next(iter(described))!r}, an image is {example!r}",
                hint="Names are relative to the dataset, folders included; check filename_column and identifier_includes_extension.",
            )

    def read(self, name: str) -> bytes:
        return self._backend.read(name)

    def read_head(self, name: str, count: int) -> bytes:
        return self._backend.read_head(name, count)

    def exists(self, name: str) -> bool:
        return self._backend.exists(name)

    def _is_inside(self) -> bool:
        try:
            check_name(self._table.path)
        except DatasetError:
            return False
        return self._backend.exists(self._table.path)

    def _key(self, name: str) -> str:
        stem, suffix = posixpath.splitext(name)
        return stem if suffix.lower() in IMAGE_SUFFIXES and not self._table.identifier_includes_extension else name

    def _describe(self) -> dict[str, Described]:
        """Read the table: the name of each file, as it is compared, to what its rows say. Several rows of one file are alternatives."""
        table = self._table
        source = self._backend.read(table.path) if self._is_inside() else Path(table.path).expanduser()
        found: dict[str, Described] = {}
        for row in read_rows(source, table.path, table.columns()):
            name = text_of(row[table.filename_column]).replace("\\", "/").removeprefix("./")
            if not name:
                continue
            captions = captions_in(row[table.caption_column]) if table.caption_column else ()
            if not captions and table.fallback_caption_column:
                captions = captions_in(row[table.fallback_caption_column])
            size = size_in(row[table.width_column], row[table.height_column]) if table.width_column and table.height_column else None
            known = found.setdefault(self._key(name), Described((), size))
            known.captions = tuple(dict.fromkeys((*known.captions, *captions)))
        return found


def read_rows(source: bytes | Path, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Give the rows of a table, with these columns at least.

    Args:
        source: the table itself, or where it lies.
        name: for messages, and its suffix says what kind it is.
        columns: those that are needed; of parquet, no others are read.

    Raises:
        DatasetError: it cannot be read, or lacks a column.
    """
    suffix = posixpath.splitext(name)[1].lower()
    if suffix == ".parquet":
        return read_parquet(source, name, columns)
    try:
        text, _ = decode(source if isinstance(source, bytes) else source.read_bytes())
    except OSError as error:
        raise DatasetError(f"{name} cannot be read: {error.strerror}") from error
    return read_jsonl(text, name, columns) if suffix == ".jsonl" else read_csv(text, name, columns)


def read_parquet(source: bytes | Path, name: str, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source) as file:
            require_columns(columns, file.schema_arrow.names, name)
            for batch in file.iter_batches(columns=list(columns), batch_size=8192):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{name} cannot be read as parquet: {error}") from error


def read_jsonl(text: str, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """One object a line; a line may leave out columns, as long as some line has each."""
    lacking_still = set(columns)
    seen: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold its other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{name} line {number} is not JSON: {error}", hint="Each line of a .jsonl file is one object in braces.") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{name} line {number} is not an object", hint="Each line of a .jsonl file is one object in braces.")
        lacking_still.difference_update(row)
        seen.update(dict.fromkeys(row))
        yield {**dict.fromkeys(columns), **row}
    if seen:
        require_columns(sorted(lacking_still), list(seen), name)


def read_csv(text: str, name: str, columns: Sequence[str]) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        require_columns(columns, list(reader.fieldnames or ()), name)
        yield from reader
    except csv.Error as error:
        raise DatasetError(f"{name} line {reader.line_num + 1} cannot be read as csv: {error}") from error


def require_columns(wanted: Iterable[str], there: Sequence[str], name: str) -> None:
    """Refuse a table that lacks a column, offering the nearest one."""
    for column in wanted:
        if column not in there:
            raise DatasetError(f"{name} has no column {column!r}", hint=choose(column, there, f"columns of {name}"))


def text_of(value: object) -> str:
    """A cell as text; a number that pandas made a float is whole again, and nothing is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def captions_in(cell: object) -> tuple[str, ...]:
    """The captions of a cell: of a list each is an alternative; blank ones do not count."""
    cells = cell if isinstance(cell, (list, tuple)) else (cell,)
    return tuple(text for each in cells if (text := text_of(each)))


def size_in(width: object, height: object) -> Size | None:
    """The size that two cells say, or None if it is not two whole numbers above 0."""
    try:
        size = Size(int(text_of(width)), int(text_of(height)))
    except ValueError:
        return None
    return size if size.width > 0 and size.height > 0 else None
