"""Images in a bucket of Amazon S3, or of any server that speaks its protocol (MinIO, R2, B2, Ceph, ...)."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.data.backend import DataBackend, Entry, check_name, is_hidden, refused, stamp
from simpletuner.data.bucket import Bucket, BucketOptions
from simpletuner.data.columns import TableOptions
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import DatasetError


class AwsOptions(TableOptions, BucketOptions):
    """Keys of an image dataset in a bucket."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.bucket_problems()


class AwsBackend(DataBackend):
    """A bucket, or a folder in it. The names of its files are their keys without the prefix."""

    options_type = AwsOptions

    def __init__(self, options: AwsOptions) -> None:
        self._bucket = Bucket(options)

    @property
    def place(self) -> str:
        return self._bucket.where()

    def missing(self) -> str | None:
        return self._bucket.missing(may_be_empty=False)

    def list(self) -> Iterator[Entry]:
        yield from sorted(self._entries(), key=lambda entry: entry.name)

    def _entries(self) -> Iterator[Entry]:
        """A file's stamp is made of its ETag, which changes with its content and not when it is copied unchanged."""
        for item in self._bucket.list():
            if not item.name or item.name.endswith("/"):
                continue  # what consoles make to show a folder
            if not is_plain(item.name):
                yield refused(item.name)
            elif is_hidden(item.name):
                continue
            elif item.size_bytes >= LIMIT_BYTES:
                yield Entry(item.name, item.size_bytes, 0, fault="too many bytes")
            else:
                yield Entry(item.name, item.size_bytes, stamp(item.etag))

    def read(self, name: str) -> bytes:
        check_name(name)
        return self._bucket.read(name, limit_bytes=LIMIT_BYTES)

    def read_head(self, name: str, count: int) -> bytes:
        check_name(name)
        return self._bucket.read(name, 0, count)

    def exists(self, name: str) -> bool:
        check_name(name)
        return self._bucket.size_of(name) is not None


def is_plain(name: str) -> bool:
    """Whether a key is a name that a file could have, inside a folder."""
    try:
        return check_name(name).as_posix() == name
    except DatasetError:
        return False
