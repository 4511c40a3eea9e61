from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simpletuner.data.backends.aws import AwsBackend, AwsOptions
from simpletuner.data.discover import discover
from simpletuner.data.faults import LIMIT_BYTES
from simpletuner.errors import ConfigError, DatasetError

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
SECRET = "hunter2-the-secret-key"


def ask(address: str, text: str = "") -> None:
    """Tell the server something about itself."""
    request = urllib.request.Request(address, data=text.encode(), headers={"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(request, timeout=20).close()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A real S3 server on this machine."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def clean(endpoint, monkeypatch, tmp_path) -> None:
    """An empty server that lets everybody in, and no credentials of whoever runs the tests."""
    ask(f"{endpoint}/moto-api/reset")
    ask(f"{endpoint}/moto-api/reset-auth", "inf")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def client(endpoint):
    made = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key=SECRET)
    made.create_bucket(Bucket="pictures")
    return made


@pytest.fixture
def put(client) -> Callable[..., None]:
    def write(**files: bytes) -> None:
        for name, data in files.items():
            client.put_object(Bucket="pictures", Key=name, Body=data)

    return write


@pytest.fixture
def backend(endpoint) -> Callable[..., AwsBackend]:
    def make(**keys: str | None) -> AwsBackend:
        usual = {
            "id": "set",
            "type": "aws",
            "aws_bucket_name": "pictures",
            "aws_endpoint_url": endpoint,
            "aws_region_name": "us-east-1",
            "aws_access_key_id": "key",
            "aws_secret_access_key": SECRET,
        }
        return AwsBackend(AwsOptions.model_validate({key: value for key, value in {**usual, **keys}.items() if value is not None}))

    return make


def test_files_are_listed_by_name_without_hidden_ones_and_folders(put, backend):
    put(**{"in/b.png": b"bb", "in/a/ü.png": b"a", "in/.hidden.png": b"x", "in/.git/x.png": b"x", "in/folder/": b"", "out/c.png": b"c"})

    entries = list(backend(aws_data_prefix="/in/").list())

    assert [(entry.name, entry.size_bytes, entry.fault) for entry in entries] == [("a/ü.png", 1, None), ("b.png", 2, None)]


def test_listing_goes_on_over_many_pages(put, backend, client):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: client.put_object(Bucket="pictures", Key=f"{number:04d}.png", Body=b"x"), range(1003)))

    assert len({entry.name for entry in backend().list()}) == 1003


def test_what_is_listed_can_be_read_from_many_threads(put, backend):
    put(**{f"{number}.png": bytes([number]) * 100 for number in range(40)})
    place = backend()

    names = [entry.name for entry in place.list()]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(place.read, names))

    assert found == [bytes([int(name.split(".")[0])]) * 100 for name in names]
    assert place.exists("3.png") and not place.exists("none.png")


def test_the_beginning_of_a_file_is_read_alone(put, backend):
    put(**{"long.png": b"0123456789", "short.png": b"01", "empty.png": b""})

    assert [backend().read_head(name, 4) for name in ("long.png", "short.png", "empty.png")] == [b"0123", b"01", b""]


def test_a_stamp_changes_with_the_content_alone(put, backend):
    put(**{"a.png": b"one"})
    (first,) = backend().list()
    put(**{"a.png": b"one"})
    (again,) = backend().list()
    put(**{"a.png": b"two"})
    (changed,) = backend().list()

    assert first == again != changed


@pytest.mark.parametrize("name", ["../secret.png", "a/../../b.png", "//a.png", "a//b.png", "./a.png"])
def test_keys_that_are_no_plain_names_are_listed_as_outside(put, backend, name):
    put(**{f"in/{name}": b"x", "in/good.png": b"x"})
    place = backend(aws_data_prefix="in")

    entries = {entry.name: entry.fault for entry in place.list()}

    assert entries.pop("good.png") is None
    assert list(entries.values()) == ["outside"]
    assert not [part for found in entries for part in found.split("/") if part in ("", "..")]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", ""])
def test_names_that_lead_out_are_not_asked_for(backend, client, name):
    with pytest.raises(DatasetError, match="is no file name inside a dataset"):
        backend().read(name)


def test_huge_files_are_neither_listed_as_images_nor_read(put, backend, monkeypatch):
    put(**{"a.png": b"x" * 100})
    monkeypatch.setattr("simpletuner.data.backends.aws.LIMIT_BYTES", 100)

    assert [entry.fault for entry in backend().list()] == ["too many bytes"]
    with pytest.raises(DatasetError, match=r"s3://pictures/a.png at .* has 100 bytes or more"):
        backend().read("a.png")
    assert LIMIT_BYTES > 2**29


def test_a_missing_file_is_named_without_secrets(backend, client):
    with pytest.raises(DatasetError, match=r"s3://pictures/none.png at http://127.* cannot be read: there is no such file") as caught:
        backend().read("none.png")
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"aws_bucket_name": "pictuers"}, "cannot be read: there is no such bucket; Check aws_bucket_name"),
        ({"aws_data_prefix": "gone"}, "s3://pictures/gone/ at http://127"),
        ({"aws_access_key_id": None, "aws_secret_access_key": None}, "there are no credentials; You may set aws_access_key_id"),
        ({"aws_endpoint_url": "http://user:pass@127.0.0.1:9"}, "s3://pictures/ at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_the_place_says_what_is_wrong_with_it(put, backend, keys, problem, monkeypatch):
    put(**{"a.png": b"x"})
    monkeypatch.setattr("simpletuner.data.bucket.TRIES", 1)

    fault = backend(**keys).missing()

    assert fault is not None and problem in fault
    assert SECRET not in fault and "user:pass" not in fault
    assert backend().missing() is None


def test_a_wrong_key_is_told_from_a_missing_bucket(put, backend, endpoint):
    put(**{"a.png": b"x"})
    ask(f"{endpoint}/moto-api/reset-auth", "0")  # from now on the server looks at keys

    fault = backend().missing()
    with pytest.raises(DatasetError) as caught:
        list(backend().list())

    assert fault is not None and "the server does not know the access key" in fault
    assert caught.value.exit_code == 3 and caught.value.hint and "aws_secret_access_key" in caught.value.hint
    assert SECRET not in f"{fault}{caught.value}"


def test_credentials_may_come_from_the_environment_or_a_profile(put, backend, monkeypatch, tmp_path):
    put(**{"a.png": b"x"})
    without = {"aws_access_key_id": None, "aws_secret_access_key": None}

    (tmp_path / "credentials").write_text(f"[other]\naws_access_key_id = key\naws_secret_access_key = {SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert backend(**without).missing() is None

    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert backend(**without).missing() is None


def test_an_answer_that_breaks_off_is_asked_for_again(backend, monkeypatch):
    """A server of our own: S3 as far as one file goes, and the first two answers end early."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    body = b"x" * 1000
    served = []

    def serve() -> None:
        for sent in (10, 500, 1000):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                served.append(sent)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n" + body[:sent])

    with listener, ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        data = backend(aws_endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}").read("a.png")

    assert data == body and served == [10, 500, 1000]


def test_secrets_are_in_no_text_that_a_plan_can_show(plan_of, put, endpoint):
    put(**{"a.png": b"x"})
    entry = {"id": "set", "type": "aws", "aws_bucket_name": "pictures", "aws_endpoint_url": endpoint, "aws_region_name": "us-east-1"}

    plan = plan_of({**entry, "aws_access_key_id": "key-id-9", "aws_secret_access_key": SECRET})

    options = plan.datasets[0].options
    for text in (repr(plan), str(options), options.model_dump_json(), json.dumps(options.model_dump(), default=str), *plan.describe(), *plan.notes):
        assert SECRET not in text and "key-id-9" not in text


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"aws_secret_access_key": 778899}, "dataset 'set': aws_secret_access_key is wrong: it must be a text"),
        ({"aws_secret_access_key": "778899"}, "aws_access_key_id and aws_secret_access_key go together"),
        ({"aws_endpoint_url": "ftp://user:778899@host/x"}, "it must begin with https:// or http://"),
        ({"aws_secret_access_key": "778899{env:NO_SUCH_VARIABLE}"}, "is '{env:NO_SUCH_VARIABLE}', but the environment has no variable"),
        ({"aws_bucket_nam": "778899"}, "unknown key 'aws_bucket_nam'; did you mean 'aws_bucket_name'?"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_saying_secrets(plan_of, keys, problem):
    with pytest.raises(ConfigError) as caught:
        plan_of({"id": "set", "type": "aws", "aws_bucket_name": "pictures", **keys})

    assert problem in caught.value.message
    assert "778899" not in caught.value.message


def test_a_package_that_is_not_installed_names_the_extra(plan_of, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)

    with pytest.raises(ConfigError, match=r"type 'aws' needs the package boto3, .*: pip install 'simpletuner\[s3\]'"):
        plan_of({"id": "set", "type": "aws", "aws_bucket_name": "pictures"})


def test_a_table_in_the_bucket_describes_its_images(plan_of, put, endpoint, save, console, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    rows = b'{"file": "a.png", "text": ["a cat", "the cat"], "w": 300, "h": 200}\n'
    put(**{"cats/a.png": save("a.png").read_bytes(), "cats/b.png": save("b.png").read_bytes(), "cats/about/t.jsonl": rows})
    block = {"path": "about/t.jsonl", "filename_column": "file", "caption_column": "text", "width_column": "w", "height_column": "h"}
    entry = {"id": "set", "type": "aws", "aws_bucket_name": "pictures", "aws_data_prefix": "cats", "aws_endpoint_url": endpoint}

    dataset = plan_of({**entry, "aws_region_name": "us-east-1", "caption_strategy": "parquet", "parquet": block}).datasets[0]
    found = discover(dataset, Path("cache/index"), 1, console)

    assert [(sample.name, sample.captions, str(sample.geometry.original)) for sample in found.samples] == [("a.png", ("a cat", "the cat"), "300x200")]
    assert found.skipped == {"no caption": ("b.png",)}


def test_a_bucket_is_a_dataset_like_a_folder(plan_of, put, endpoint, save, console, monkeypatch):
    monkeypatch.setenv("BUCKET_KEY", SECRET)
    put(**{"cats/a.png": save("a.png").read_bytes(), "cats/a.txt": b"a cat\nthe cat", "cats/b.jpg": save("b.jpg").read_bytes()})
    entry = {
        "id": "set",
        "type": "aws",
        "aws_bucket_name": "pictures",
        "aws_data_prefix": "cats",
        "aws_endpoint_url": endpoint,
        "aws_region_name": "us-east-1",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "{env:BUCKET_KEY}",
        "caption_strategy": "textfile",
    }

    dataset = plan_of(entry).datasets[0]
    found = discover(dataset, Path("cache/index"), 1, console)

    assert [(sample.name, sample.captions) for sample in found.samples] == [("a.png", ("a cat", "the cat"))]
    assert found.skipped == {"no caption": ("b.jpg",)}
    assert SECRET not in Path("cache/index/set.sqlite").read_bytes().decode("latin-1")
