from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from simpletuner.models.identity import MEMO_FILE, digest_files, learn, unread


def write(path: Path, content: bytes, age_seconds: float = 100.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {"config.json": write(tmp_path / "a" / "config.json", b"{}"), "model.safetensors": write(tmp_path / "a" / "weights", b"w" * 5000)}


def test_the_same_files_elsewhere_have_the_same_digest(files, tmp_path):
    moved = {name: write(tmp_path / "b" / name, path.read_bytes()) for name, path in files.items()}

    assert digest_files(moved) == digest_files(files)


def test_a_changed_byte_a_changed_name_and_another_file_change_the_digest(files, tmp_path):
    before = digest_files(files)
    more = {**files, "extra.json": write(tmp_path / "extra", b"")}
    renamed = {"config.json": files["config.json"], "other.safetensors": files["model.safetensors"]}
    swapped = {"config.json": files["model.safetensors"], "model.safetensors": files["config.json"]}

    write(files["model.safetensors"], b"w" * 4999 + b"x")

    assert len({before, digest_files(files), digest_files(more), digest_files(renamed), digest_files(swapped)}) == 5


def test_a_blob_of_the_hub_cache_is_known_by_its_name_and_not_read(tmp_path):
    content = b"weights of some gigabytes"
    plain = write(tmp_path / "folder" / "model.safetensors", content)
    blob = write(tmp_path / "models--a--b" / "blobs" / hashlib.sha256(content).hexdigest(), b"never read")
    link = tmp_path / "models--a--b" / "snapshots" / "1234" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)

    assert digest_files({"model.safetensors": link}) == digest_files({"model.safetensors": plain})


def test_small_files_of_the_hub_cache_are_read_because_their_names_are_of_another_kind(tmp_path):
    blobs = tmp_path / "blobs"
    first, second = (write(blobs / ("0" * 40), b"{}"), write(tmp_path / "blobs2" / "blobs" / ("0" * 40), b"[]"))

    assert digest_files({"config.json": first}) != digest_files({"config.json": second})


def test_a_remembered_digest_saves_reading_the_file_again(files, tmp_path):
    memo = tmp_path / "memo"
    before = digest_files(files, memo)
    weights = files["model.safetensors"]
    found = weights.stat()
    weights.write_bytes(b"x" * 5000)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))

    assert digest_files(files, memo) == before
    assert digest_files(files) != before


@pytest.mark.parametrize("content", [b"x" * 5000, b"w" * 5001], ids=["another time", "another size"])
def test_a_file_of_another_size_or_time_is_read_again(files, tmp_path, content):
    memo = tmp_path / "memo"
    before = digest_files(files, memo)

    write(files["model.safetensors"], content, age_seconds=50)

    assert digest_files(files, memo) == digest_files(files) != before


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path):
    memo = tmp_path / "memo"
    weights = write(tmp_path / "weights", b"w" * 5000, age_seconds=0)
    digest_files({"weights": weights}, memo)
    found = weights.stat()
    weights.write_bytes(b"x" * 5000)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))

    assert digest_files({"weights": weights}, memo) == digest_files({"weights": weights})


@pytest.mark.parametrize("damage", [b"{", b"[]", b""])
def test_a_damaged_memo_is_as_good_as_none(files, tmp_path, damage):
    memo = tmp_path / "memo"
    digest_files(files, memo)
    (memo / MEMO_FILE).write_bytes(damage)

    assert digest_files(files, memo) == digest_files(files)
    assert len(json.loads((memo / MEMO_FILE).read_text())) == 2


def test_no_path_is_written_down(files, tmp_path):
    memo = tmp_path / "memo"

    digest_files(files, memo)

    assert tmp_path.name not in (memo / MEMO_FILE).read_text() and [path.name for path in memo.iterdir()] == [MEMO_FILE]


def test_a_file_moved_into_anothers_place_with_its_time_is_read(files, tmp_path):
    memo = tmp_path / "memo"
    before = digest_files(files, memo)
    weights = files["model.safetensors"]
    found = weights.stat()
    other = write(tmp_path / "other", b"x" * 5000)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))

    other.replace(weights)

    assert digest_files(files, memo) == digest_files(files) != before


def test_what_was_learned_beforehand_is_not_read_again(files, tmp_path, monkeypatch):
    memo, read = tmp_path / "memo", []
    first, second = sorted(files.values())

    assert unread([first, second, first], memo) == [first, second]
    learn([first, second], memo, read.append)

    assert sum(read) == sum(path.stat().st_size for path in files.values())
    assert unread(files.values(), memo) == []
    monkeypatch.setattr("simpletuner.models.identity._sha256", None)
    assert digest_files(files, memo)
