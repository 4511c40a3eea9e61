"""Rows of pictures: an Arrow table in memory maps, or parquet files of which only the row group that is asked for is read.

Both give columns whole, and the picture of one row at a time from any thread.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from simpletuner.errors import DatasetError

HELD_BYTES = 2**29
"""Row groups that are kept in memory while they are read from; the last one is kept whatever its size."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a row's picture is, without the picture."""

    size_bytes: int | None
    """Its length, or for parquet files at most so much; None if it is not in the row."""
    path: str | None
    """As the row has it: a name alone, or where the picture lies if it is not in the row."""


class Rows(ABC):
    """The rows of a split."""

    columns: Sequence[str]

    @abstractmethod
    def values(self, column: str) -> Sequence[Any]:
        """Give one column, of all rows."""

    @abstractmethod
    def outlines(self) -> Iterator[Outline]:
        """Describe the picture of each row."""

    @abstractmethod
    def stamp(self, row: int) -> tuple[object, ...]:
        """Give facts that change when the row may have changed."""

    @abstractmethod
    def picture(self, row: int) -> tuple[bytes | None, str | None]:
        """Give a picture's bytes, None if they are not in the row, and its path, None if it says none; from any thread."""


class ArrowRows(Rows):
    """A table in memory maps, as `datasets` prepares it. A row is stamped with the fingerprint of the whole and its number."""

    def __init__(self, table: Any, image_column: str, fingerprint: str) -> None:
        """
        Args:
            table: a `pyarrow.Table`.
            image_column: of images as `datasets` stores them, or of plain bytes.
            fingerprint: changes with the files that the table was made from.
        """
        self._table, self._fingerprint = table, fingerprint
        self.columns = table.column_names
        self._pictures = table.column(image_column)
        self._is_struct = is_struct(table.schema.field(image_column).type, image_column)

    def values(self, column: str) -> Sequence[Any]:
        found: list[Any] = self._table.column(column).to_pylist()
        return found

    def outlines(self) -> Iterator[Outline]:
        import pyarrow.compute as pc

        for chunk in self._pictures.chunks:
            data = pc.struct_field(chunk, "bytes") if self._is_struct else chunk
            lengths = pc.binary_length(data).to_pylist()
            paths = pc.struct_field(chunk, "path").to_pylist() if self._is_struct else [None] * len(lengths)
            yield from map(Outline, lengths, paths)

    def stamp(self, row: int) -> tuple[object, ...]:
        return self._fingerprint, row

    def picture(self, row: int) -> tuple[bytes | None, str | None]:
        return picture_in(self._pictures[row].as_py())


@dataclass(frozen=True, slots=True)
class Group:
    """A row group of a parquet file."""

    file: int
    number: int
    rows: int
    most_bytes: int
    """Of all pictures in it, unpacked."""


class ParquetRows(Rows):
    """Parquet files, here or elsewhere, of which nothing is copied. A row is stamped with its file's mark and its number.

    Reading in order reads each row group once; jumping about reads some of them again.
    """

    def __init__(self, files: Sequence[tuple[str, object]], image_column: str) -> None:
        """
        Args:
            files: address of each, as fsspec takes it, and a mark that changes when the file does.
            image_column: of images as `datasets` stores them, or of plain bytes.
        """
        import pyarrow.parquet as pq

        self._files, self._image_column = files, image_column
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._about: list[Any] = []
        self._groups: list[Group] = []
        for number, (address, _) in enumerate(files):
            with opened(address) as stream:
                self._about.append(pq.read_metadata(stream))
            schema = self._about[number].schema.to_arrow_schema()
            if number == 0:
                self.columns = schema.names
                self._is_struct = is_struct(schema.field(image_column).type, image_column)
            elif image_column not in schema.names:
                raise DatasetError(f"{address} has no column {image_column!r}, which the files before it have")
            self._groups += [Group(number, group, *self._extent(number, group)) for group in range(self._about[number].num_row_groups)]
        self._starts = [0, *accumulate(group.rows for group in self._groups)]
        self._file_starts = [0, *accumulate(about.num_rows for about in self._about)][:-1]

    def _extent(self, file: int, group: int) -> tuple[int, int]:
        """Rows and unpacked bytes of the pictures of a row group."""
        about = self._about[file].row_group(group)
        chunks = (about.column(number) for number in range(about.num_columns))
        ours = {self._image_column, f"{self._image_column}.bytes"}
        return about.num_rows, sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in ours)

    def values(self, column: str) -> Sequence[Any]:
        return [value for number in range(len(self._files)) for value in self._read(number, column)]

    def _read(self, number: int, column: str) -> list[Any]:
        import pyarrow.parquet as pq

        with opened(self._files[number][0]) as stream:
            found: list[Any] = pq.ParquetFile(stream, metadata=self._about[number]).read(columns=[column]).column(0).to_pylist()
            return found

    def outlines(self) -> Iterator[Outline]:
        paths: Iterator[Any] = iter(self.values(f"{self._image_column}.path") if self._is_struct else ())
        for group in self._groups:
            for _ in range(group.rows):
                value = next(paths, None)
                yield Outline(group.most_bytes, value["path"] if isinstance(value, dict) else None)

    def stamp(self, row: int) -> tuple[object, ...]:
        number = bisect_right(self._file_starts, row) - 1
        return self._files[number][1], row - self._file_starts[number]

    def picture(self, row: int) -> tuple[bytes | None, str | None]:
        number = bisect_right(self._starts, row) - 1
        with self._lock:  # one reader: the next ones mostly want the same group
            group = self._group(number)
        return picture_in(group[row - self._starts[number]].as_py())

    def _group(self, number: int) -> Any:
        """The pictures of a row group, from memory if they were asked for lately."""
        import pyarrow.parquet as pq

        if number not in self._held:
            about = self._groups[number]
            while self._held and sum(column.nbytes for column in self._held.values()) + about.most_bytes > HELD_BYTES:
                self._held.popitem(last=False)
            with opened(self._files[about.file][0]) as stream:
                file = pq.ParquetFile(stream, metadata=self._about[about.file])
                self._held[number] = file.read_row_group(about.number, columns=[self._image_column]).column(0)
        self._held.move_to_end(number)
        return self._held[number]


def opened(address: str) -> Any:
    import fsspec

    return fsspec.open(address, "rb")


def is_struct(kind: Any, column: str) -> bool:
    """Whether images are stored with their names, or as bytes alone.

    Raises:
        DatasetError: the column holds something else.
    """
    import pyarrow.types as types

    if types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return True
    if types.is_binary(kind) or types.is_large_binary(kind):
        return False
    raise DatasetError(
        f"column {column!r} holds {kind}, not images",
        hint="Name the column of images in image_column; for a table of addresses or paths use type 'csv'.",
    )


def picture_in(cell: Any) -> tuple[bytes | None, str | None]:
    return (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
