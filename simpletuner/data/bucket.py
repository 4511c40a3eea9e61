"""A folder in a bucket of Amazon S3, or of any server that speaks its protocol (MinIO, R2, B2, Ceph, ...), and how it is reached."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from simpletuner.data.backend import EntryOptions, Secret, without_secrets
from simpletuner.data.extras import lacking
from simpletuner.errors import DatasetError

CONNECT_SECONDS = 10
READ_SECONDS = 60
TRIES = 4
"""How often a request is made before it has failed; boto3 waits longer each time."""
CONNECTIONS = 32
"""More than the threads that read at once."""
COPY_BYTES = 1 << 20
CREDENTIALS = (
    "set aws_access_key_id and aws_secret_access_key ('{env:NAME}' takes one from the environment), "
    "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile of the AWS tools"
)
REASONS = {
    "NoSuchBucket": ("there is no such bucket", "Check aws_bucket_name, and aws_endpoint_url if the bucket is not Amazon's."),
    "NoSuchKey": ("there is no such file", None),
    "404": ("there is no such bucket or file", "Check aws_bucket_name and aws_data_prefix."),
    "403": ("access is denied", f"The key must be allowed to list the bucket and to read from it: {CREDENTIALS}."),
    "AccessDenied": (
        "access is denied",
        "The key must be allowed s3:ListBucket on the bucket and s3:GetObject on its files; for caches s3:PutObject and s3:DeleteObject too.",
    ),
    "InvalidAccessKeyId": ("the server does not know the access key", f"Check the credentials: {CREDENTIALS}."),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", f"Check the credentials: {CREDENTIALS}."),
    "ExpiredToken": ("the credentials are too old", "Fetch new ones."),
    "PermanentRedirect": ("the bucket lies in another region", "Set aws_region_name."),
    "AuthorizationHeaderMalformed": ("the bucket lies in another region", "Set aws_region_name."),
    "IllegalLocationConstraintException": ("the bucket lies in another region", "Set aws_region_name."),
}
"""Codes of S3 to what they mean, and what to do."""


class BucketOptions(EntryOptions):
    """Keys of whatever lies in a bucket."""

    aws_bucket_name: str
    """The bucket."""
    aws_data_prefix: str = ""
    """The folder in it; all of the bucket if not given."""
    aws_endpoint_url: str | None = None
    """Address of the server, https://...; Amazon's own if not given."""
    aws_region_name: str | None = None
    """Region of the bucket; from the environment or profile if not given."""
    aws_access_key_id: Secret | None = None
    """Name of the key; from the environment or profile if not given."""
    aws_secret_access_key: Secret | None = None
    """The key; from the environment or profile if not given. Better not written into a file: `{env:NAME}` takes it from elsewhere."""

    def bucket_problems(self) -> Iterator[str]:
        """Say what is wrong between these keys."""
        yield from lacking("boto3", "s3", "type 'aws'")
        if self.aws_endpoint_url is not None and not self.aws_endpoint_url.startswith(("https://", "http://")):
            yield f"aws_endpoint_url is {without_secrets(self.aws_endpoint_url)!r}; it must begin with https:// or http://"
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            yield "aws_access_key_id and aws_secret_access_key go together; leave out both to take them from the environment or profile"


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a bucket, as a listing tells of it."""

    name: str
    """Its key without the prefix."""
    size_bytes: int
    etag: str
    modified: float
    """Seconds since 1970, by the server's clock."""


class Bucket:
    """A folder in a bucket. The names of its files are their keys without the prefix. Safe to use from many threads."""

    def __init__(self, options: BucketOptions, folder: str = "") -> None:
        """
        Args:
            folder: below `aws_data_prefix`.
        """
        self._options = options
        prefix = "/".join(part for part in (options.aws_data_prefix.strip("/"), folder.strip("/")) if part)
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()

    def where(self, name: str = "") -> str:
        """What messages call the folder, or a file in it; without secrets."""
        server = self._options.aws_endpoint_url
        return f"s3://{self._options.aws_bucket_name}/{self._prefix}{name}" + (f" at {without_secrets(server)}" if server else "")

    def missing(self, *, may_be_empty: bool) -> str | None:
        """Say why the folder cannot be listed, or that nothing is in it; None if all is well."""
        try:
            with self._told_plainly():
                found = self._client.list_objects_v2(Bucket=self._options.aws_bucket_name, Prefix=self._prefix, MaxKeys=1)
        except DatasetError as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message
        return None if found.get("KeyCount") or may_be_empty else f"{self.where()} holds nothing"

    def list(self) -> Iterator[Listed]:
        """Every file below the prefix: a request for each thousand.

        Raises:
            DatasetError: it cannot be listed.
        """
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._options.aws_bucket_name, Prefix=self._prefix)
        with self._told_plainly():
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Listed(item["Key"][len(self._prefix) :], item["Size"], item["ETag"], item["LastModified"].timestamp())

    def read(self, name: str, start: int = 0, length: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        """Read a file or a part of it; shorter than asked for where the file ends.

        Args:
            limit_bytes: refuse a file of so many bytes or more.

        Raises:
            FileNotThereError: there is no such file.
            DatasetError: it cannot be read.
        """
        from botocore import exceptions

        if length == 0:
            return b""
        headers = {} if start == 0 and length is None else {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"}
        with self._told_plainly(name):
            for is_last in (*[False] * (TRIES - 1), True):
                try:
                    answer = self._client.get_object(Bucket=self._options.aws_bucket_name, Key=self._prefix + name, **headers)
                    with closing(answer["Body"]) as body:  # as its own context it gives the bare stream, which does not count its bytes
                        if limit_bytes is not None and answer["ContentLength"] >= limit_bytes:  # replaced by a larger one since it was listed
                            raise DatasetError(f"{self.where(name)} has {limit_bytes:,} bytes or more", hint="Take it out of the dataset.")
                        return bytes(body.read())
                except exceptions.ClientError as error:
                    if error.response.get("Error", {}).get("Code") == "InvalidRange":  # behind the last byte there is none
                        return b""
                    raise
                except (exceptions.ResponseStreamingError, exceptions.IncompleteReadError, exceptions.ReadTimeoutError):
                    if is_last:  # boto3 itself repeats requests, not answers that break off
                        raise
        raise AssertionError("the last try returns or raises")

    def download(self, name: str, file: BinaryIO) -> None:
        """Write a whole file into another, a piece at a time.

        Raises:
            DatasetError: as `read` does; what was written is a part of it.
            OSError: it cannot be written.
        """
        with self._told_plainly(name):
            answer = self._client.get_object(Bucket=self._options.aws_bucket_name, Key=self._prefix + name)
            with closing(answer["Body"]) as body:
                for piece in body.iter_chunks(COPY_BYTES):
                    file.write(piece)

    def write(self, name: str, data: bytes | BinaryIO) -> None:
        """Write a file, or replace it, in one request: it appears whole, and one that breaks off leaves nothing behind.

        Raises:
            DatasetError: it cannot be written.
        """
        with self._told_plainly(name, "written"):
            self._client.put_object(Bucket=self._options.aws_bucket_name, Key=self._prefix + name, Body=data, ContentMD5=md5_of(data))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._told_plainly(name, "deleted"):
            self._client.delete_object(Bucket=self._options.aws_bucket_name, Key=self._prefix + name)

    def size_of(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        try:
            with self._told_plainly(name):
                return int(self._client.head_object(Bucket=self._options.aws_bucket_name, Key=self._prefix + name)["ContentLength"])
        except FileNotThereError:
            return None

    @property
    def _client(self) -> Any:
        with self._lock:  # one client serves all threads, but making one is not safe in several
            return self._made_client

    @cached_property
    def _made_client(self) -> Any:
        import boto3
        from botocore.config import Config

        options = self._options
        settings: dict[str, Any] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": TRIES, "mode": "standard"},
            "max_pool_connections": CONNECTIONS,
            # Servers other than Amazon's rarely have a host name for each bucket.
            "s3": {"addressing_style": "path"} if options.aws_endpoint_url else {},
        }
        if "request_checksum_calculation" in Config.OPTION_DEFAULTS:
            # The trailers that newer versions send are refused by some servers, and we send an MD5 with all that is written.
            settings |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        with self._told_plainly():
            return boto3.session.Session().client(
                "s3",
                region_name=options.aws_region_name,
                endpoint_url=options.aws_endpoint_url,
                aws_access_key_id=revealed(options.aws_access_key_id),
                aws_secret_access_key=revealed(options.aws_secret_access_key),
                config=Config(**settings),
            )

    @contextmanager
    def _told_plainly(self, name: str = "", done: str = "read") -> Iterator[None]:
        """Turn what boto3 raises into what is wrong and what to do. Its own words may quote requests, so codes alone are passed on."""
        from botocore import exceptions

        where = self.where(name)
        try:
            yield
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            what, hint = REASONS.get(code, (f"the server refuses with {code}", None))
            kind = FileNotThereError if name and code in ("404", "NoSuchKey") else DatasetError
            raise kind(f"{where} cannot be {done}: {what}", hint=hint) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            raise DatasetError(f"{where} cannot be {done}: there are no credentials", hint=f"You may {CREDENTIALS}.") from None
        except exceptions.NoRegionError:
            raise DatasetError(f"{where} cannot be {done}: no region is known", hint="Set aws_region_name.") from None
        except (exceptions.HTTPClientError, exceptions.EndpointConnectionError) as error:
            reason = type(error).__name__.removesuffix("Error")
            raise DatasetError(
                f"{where} cannot be reached ({reason})", hint="Check aws_endpoint_url and aws_region_name, the network, and that the server runs."
            ) from None
        except (exceptions.BotoCoreError, ValueError) as error:
            raise DatasetError(f"{where} cannot be {done}: {type(error).__name__}", hint="Check the keys that begin with aws_.") from None


class FileNotThereError(DatasetError):
    """A bucket has no file of this name."""


def md5_of(data: bytes | BinaryIO) -> str:
    """What S3 compares with what arrived."""
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(data, bytes):
        digest.update(data)
    else:
        while piece := data.read(COPY_BYTES):
            digest.update(piece)
        data.seek(0, os.SEEK_SET)
    return base64.b64encode(digest.digest()).decode()


def revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
