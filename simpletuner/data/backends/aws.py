"""Images in a bucket of Amazon S3, or of any server that speaks its protocol (MinIO, R2, B2, Ceph, ...)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

from simpletuner.data.backend import DataBackend, Entry, Secret, check_name, is_hidden, refused, stamp, without_secrets
from simpletuner.data.columns import TableOptions
from simpletuner.data.extras import lacking
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import DatasetError

CONNECT_SECONDS = 10
READ_SECONDS = 60
TRIES = 4
"""How often a request is made before it has failed; boto3 waits longer each time."""
CONNECTIONS = 32
"""More than the threads that read at once."""
CREDENTIALS = (
    "set aws_access_key_id and aws_secret_access_key ('{env:NAME}' takes one from the environment), "
    "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile of the AWS tools"
)
REASONS = {
    "NoSuchBucket": ("there is no such bucket", "Check aws_bucket_name, and aws_endpoint_url if the bucket is not Amazon's."),
    "NoSuchKey": ("there is no such file", None),
    "404": ("there is no such bucket or file", "Check aws_bucket_name and aws_data_prefix."),
    "403": ("access is denied", f"The key must be allowed to list the bucket and to read from it: {CREDENTIALS}."),
    "AccessDenied": ("access is denied", "The key must be allowed s3:ListBucket on the bucket and s3:GetObject on its files."),
    "InvalidAccessKeyId": ("the server does not know the access key", f"Check the credentials: {CREDENTIALS}."),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", f"Check the credentials: {CREDENTIALS}."),
    "ExpiredToken": ("the credentials are too old", "Fetch new ones."),
    "PermanentRedirect": ("the bucket lies in another region", "Set aws_region_name."),
    "AuthorizationHeaderMalformed": ("the bucket lies in another region", "Set aws_region_name."),
    "IllegalLocationConstraintException": ("the bucket lies in another region", "Set aws_region_name."),
}
"""Codes of S3 to what they mean, and what to do."""


class AwsOptions(TableOptions):
    """Keys of an image dataset in a bucket."""

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

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from lacking("boto3", "s3", "type 'aws'")
        if self.aws_endpoint_url is not None and not self.aws_endpoint_url.startswith(("https://", "http://")):
            yield f"aws_endpoint_url is {without_secrets(self.aws_endpoint_url)!r}; it must begin with https:// or http://"
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            yield "aws_access_key_id and aws_secret_access_key go together; leave out both to take them from the environment or profile"


class AwsBackend(DataBackend):
    """A bucket, or a folder in it. The names of its files are their keys without the prefix."""

    options_type = AwsOptions

    def __init__(self, options: AwsOptions) -> None:
        self._options = options
        prefix = options.aws_data_prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        return self._where("")

    def _where(self, name: str) -> str:
        server = self._options.aws_endpoint_url
        return f"s3://{self._options.aws_bucket_name}/{self._prefix}{name}" + (f" at {without_secrets(server)}" if server else "")

    def missing(self) -> str | None:
        try:
            with self._told_plainly():
                found = self._client.list_objects_v2(Bucket=self._options.aws_bucket_name, Prefix=self._prefix, MaxKeys=1)
        except DatasetError as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message
        return None if found.get("KeyCount") else f"{self.place} holds nothing"

    def list(self) -> Iterator[Entry]:
        yield from sorted(self._entries(), key=lambda entry: entry.name)

    def _entries(self) -> Iterator[Entry]:
        """List all pages. A file's stamp is made of its ETag, which changes with its content and not when it is copied unchanged."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._options.aws_bucket_name, Prefix=self._prefix)
        with self._told_plainly():
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"][len(self._prefix) :]
                    if not name or name.endswith("/"):
                        continue  # what consoles make to show a folder
                    if not is_plain(name):
                        yield refused(name)
                    elif is_hidden(name):
                        continue
                    elif item["Size"] >= LIMIT_BYTES:
                        yield Entry(name, item["Size"], 0, fault="too many bytes")
                    else:
                        yield Entry(name, item["Size"], stamp(item["ETag"]))

    def read(self, name: str) -> bytes:
        return self._get(name, {})

    def read_head(self, name: str, count: int) -> bytes:
        return self._get(name, {"Range": f"bytes=0-{count - 1}"})

    def _get(self, name: str, headers: dict[str, str]) -> bytes:
        from botocore import exceptions

        key = self._key(name)
        with self._told_plainly(name):
            for is_last in (*[False] * (TRIES - 1), True):
                try:
                    answer = self._client.get_object(Bucket=self._options.aws_bucket_name, Key=key, **headers)
                    if answer["ContentLength"] >= LIMIT_BYTES:  # it was replaced by a larger one since it was listed
                        raise DatasetError(f"{self._where(name)} has {LIMIT_BYTES:,} bytes or more", hint="Take it out of the dataset.")
                    with closing(answer["Body"]) as body:  # as its own context it gives the bare stream, which does not count its bytes
                        return bytes(body.read())
                except exceptions.ClientError as error:
                    if error.response.get("Error", {}).get("Code") == "InvalidRange":  # of a file without bytes there is no first one
                        return b""
                    raise
                except (exceptions.ResponseStreamingError, exceptions.IncompleteReadError, exceptions.ReadTimeoutError):
                    if is_last:  # boto3 itself repeats requests, not answers that break off
                        raise
        raise AssertionError("the last try returns or raises")

    def exists(self, name: str) -> bool:
        key = self._key(name)
        try:
            with self._told_plainly(name):
                self._client.head_object(Bucket=self._options.aws_bucket_name, Key=key)
        except FileNotThereError:
            return False
        return True

    def _key(self, name: str) -> str:
        check_name(name)
        return self._prefix + name

    @property
    def _client(self) -> Any:
        with self._lock:  # one client serves all threads, but making one is not safe in several
            return self._made_client

    @cached_property
    def _made_client(self) -> Any:
        import boto3
        from botocore.config import Config

        options = self._options
        # Servers other than Amazon's rarely have a host name for each bucket.
        style = {"addressing_style": "path"} if options.aws_endpoint_url else {}
        with self._told_plainly():
            return boto3.session.Session().client(
                "s3",
                region_name=options.aws_region_name,
                endpoint_url=options.aws_endpoint_url,
                aws_access_key_id=revealed(options.aws_access_key_id),
                aws_secret_access_key=revealed(options.aws_secret_access_key),
                config=Config(
                    s3=style,
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"total_max_attempts": TRIES, "mode": "standard"},
                    max_pool_connections=CONNECTIONS,
                ),
            )

    @contextmanager
    def _told_plainly(self, name: str = "") -> Iterator[None]:
        """Turn what boto3 raises into what is wrong and what to do. Its own words may quote requests, so codes alone are passed on."""
        from botocore import exceptions

        where = self._where(name)
        try:
            yield
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            what, hint = REASONS.get(code, (f"the server refuses with {code}", None))
            kind = FileNotThereError if name and code in ("404", "NoSuchKey") else DatasetError
            raise kind(f"{where} cannot be read: {what}", hint=hint) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            raise DatasetError(f"{where} cannot be read: there are no credentials", hint=f"You may {CREDENTIALS}.") from None
        except exceptions.NoRegionError:
            raise DatasetError(f"{where} cannot be read: no region is known", hint="Set aws_region_name.") from None
        except (exceptions.HTTPClientError, exceptions.EndpointConnectionError) as error:
            reason = type(error).__name__.removesuffix("Error")
            raise DatasetError(
                f"{where} cannot be reached ({reason})", hint="Check aws_endpoint_url and aws_region_name, the network, and that the server runs."
            ) from None
        except (exceptions.BotoCoreError, ValueError) as error:
            raise DatasetError(f"{where} cannot be read: {type(error).__name__}", hint="Check the keys that begin with aws_.") from None


class FileNotThereError(DatasetError):
    """A bucket has no file of this name."""


def is_plain(name: str) -> bool:
    """Whether a key is a name that a file could have, inside a folder."""
    try:
        return check_name(name).as_posix() == name
    except DatasetError:
        return False


def revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
