"""A sealed shard is a safetensors file like any other, and stays within its bounds."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.data import shard_writer
from simpletuner.data.records import DTYPES, DamagedEntry, pack, unpack
from simpletuner.data.shards import contents
from simpletuner.data.shelf import Shelf
from simpletuner.data.store import Store, key_of
from tests.builders.shards import flip, places_in, shards_in

KEYS = [key_of(number=number) for number in range(3000)]
ROW = {"mean": torch.randn(4, 3, 5), "mask": torch.tensor([True, False, True]), "half": torch.randn(7, dtype=torch.bfloat16)}


def test_other_tools_read_a_sealed_shard(tmp_path):
    rows = [{name: tensor + number if tensor.is_floating_point() else tensor for name, tensor in ROW.items()} for number in range(5)]
    store = Store(tmp_path)
    for key, row in zip(KEYS, rows):
        store.put(key, row, {})
    store.put(KEYS[1], rows[4], {})  # written twice: the last counts
    store.close()

    read = load_file(shards_in(tmp_path)[0])

    for key, row in zip(KEYS, [rows[0], rows[4], *rows[2:]]):
        assert all(torch.equal(read[f"{key}/{name}"], tensor) for name, tensor in row.items())
    assert {name for name in read if not name.endswith("~") and name != "~index"} == {f"{key}/{name}" for key in KEYS[:5] for name in ROW}


def test_tensors_lie_aligned_to_their_items(tmp_path):
    store = Store(tmp_path)
    for key in KEYS[:9]:
        store.put(key, ROW, {"prompt": "x" * (int(key[:2], 16) % 11)})
    store.close()
    [path] = shards_in(tmp_path)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])

    assert length % 8 == 0
    for name, entry in header.items():
        if name.endswith(("mean", "half")):
            assert (8 + length + entry["data_offsets"][0]) % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0


@pytest.mark.parametrize("limit", ["bytes", "header"])
def test_a_shard_that_is_full_is_sealed_and_another_begun(tmp_path, monkeypatch, limit):
    if limit == "bytes":
        monkeypatch.setattr(shard_writer, "SHARD_BYTES", shard_writer.HEADER_BYTES + 100_000)
    else:
        monkeypatch.setattr(shard_writer, "HEADER_BYTES", 40_000)
    store = Store(tmp_path)

    store.put_many((key, ROW, {"kind": "latents"}) for key in KEYS[:1000])
    store.close()

    paths = shards_in(tmp_path)
    assert len(paths) > 3 and {path.suffix for path in paths} == {".safetensors"}
    if limit == "bytes":
        assert max(path.stat().st_size for path in paths) < shard_writer.HEADER_BYTES + 200_000
    assert Store(tmp_path).keys() == set(KEYS[:1000])
    for path in paths:
        with safe_open(path, "pt") as file:
            assert len(file.keys()) > 100


def test_an_entry_larger_than_a_shard_has_one_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 5000)
    monkeypatch.setattr(shard_writer, "HEADER_BYTES", 3000)
    wide = {f"tensor {number}": torch.tensor([number]) for number in range(500)}
    store = Store(tmp_path)

    store.put_many([(KEYS[0], ROW, {}), (KEYS[1], {"mean": torch.randn(9999)}, {}), (KEYS[2], wide, {}), (KEYS[3], ROW, {})])
    store.close()

    assert len(shards_in(tmp_path)) == 4
    assert Store(tmp_path).get(KEYS[2]).keys() == wide.keys()
    assert all(load_file(path) for path in shards_in(tmp_path))


def test_the_index_says_what_entries_have_in_common(tmp_path):
    store = Store(tmp_path)
    for number, key in enumerate(KEYS[:6]):
        store.put(key, ROW, {"kind": "latents", "vae": f"vae {number % 2}", "sample": f"cats/{number}.png"})
    store.close()
    [path] = shards_in(tmp_path)
    looked_up = contents(Shelf(tmp_path), path.name, path.stat().st_size)
    flip(path, path.stat().st_size - 1)
    damaged = contents(Shelf(tmp_path), path.name, path.stat().st_size)

    for found in (looked_up, damaged):
        assert list(found.groups) == [{"kind": "latents", "vae": "vae 0"}, {"kind": "latents", "vae": "vae 1"}]
        assert found.rows["group"].tolist() == [0, 1] * 3
        assert found.rows["offset"].tolist() == [places_in(path)[key].offset for key in KEYS[:6]]
    assert looked_up.is_whole and not damaged.is_whole


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=8), st.text(max_size=30), max_size=3),
    st.data(),
)
def test_any_tensors_and_facts_make_a_record_and_any_changed_byte_is_noticed(shapes, about, data):
    rows = {name: torch.randint(0, 100, shape).to(DTYPES[dtype]) for name, (dtype, shape) in shapes.items()}
    record = pack(bytes(16), rows, about)
    packed = bytearray(b"".join(bytes(piece) for piece in record.pieces))

    read = unpack(bytes(16), bytearray(packed))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))

    assert len(packed) == record.length and record.text.about == about
    assert read.keys() == rows.keys()
    for name, tensor in rows.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with pytest.raises(DamagedEntry):
        unpack(bytes(16), packed)
