"""Publishing, against a server that speaks what huggingface_hub asks for."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from simpletuner.cli.main import main
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.reporting.hub import files_of, open_repository, publish
from simpletuner.reporting.uploads import Uploads
from tests.builders.hub_server import TOKEN, HubServer, hub_server

ROOT = Path(__file__).parents[2]
PAGE = "---\ntags:\n- lora\n---\n\n```python\nfolder = 'output'  # what was trained\n\nprint(folder)\n```\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        point_to(server.address, monkeypatch)
        yield server


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As these variables do, for the library that is imported already and for processes that are started."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


def write_result(folder: Path, weights: bytes = b"weights" * 1000) -> Path:
    """Write what a run leaves, with much that is none of the public's business."""
    for name, content in {
        "pytorch_lora_weights.safetensors": weights,
        "README.md": PAGE.encode(),
        "card/1.jpg": b"a picture",
        "simpletuner_config.json": b"{}",
        "ema/pytorch_lora_weights.safetensors": b"smooth",
        "optimizer.pt": b"state",
        "training_state.json": b"{}",
        "logs/run.log": b"log",
        "cache/latents.bin": b"latents",
        "checkpoint-3/pytorch_lora_weights.safetensors": b"older",
        ".lock": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


PUBLISHED = {
    "README.md",
    "card/1.jpg",
    "ema/pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.safetensors",
    "simpletuner_config.json",
}


def test_what_is_received_is_what_lies_on_the_disk_and_no_more(tmp_path, hub):
    folder = write_result(tmp_path / "output")

    address = publish(folder, "portrait", private=True, message="Finished")

    received = hub.repositories["ada/portrait"]
    assert received.keys() == PUBLISHED
    assert all(received[name] == (folder / name).read_bytes() for name in received)
    assert "snapshot_download('ada/portrait')" in received["README.md"].decode()
    assert (address, hub.commits, hub.private) == (f"{hub.address}/ada/portrait", ["Finished"], {"ada/portrait": True})


def test_of_a_whole_model_the_pipeline_is_at_the_top(tmp_path):
    folder = tmp_path / "output"
    for name in ("pipeline/model_index.json", "pipeline/transformer/model.safetensors", "README.md", "checkpoint-2/transformer/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")

    assert files_of(folder).keys() == {"README.md", "model_index.json", "transformer/model.safetensors"}


def test_a_folder_without_a_result_is_refused_before_the_hub_is_asked(tmp_path, hub):
    with pytest.raises(ConfigError, match="no adapter and no pipeline"):
        publish(tmp_path, "portrait", private=True, message="x")

    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "role", "token", "says"),
    [
        ("portrait", "write", "hf_wrong", "does not accept the token"),
        ("portrait", "read", TOKEN, "can only read"),
        ("adah/portrait", "write", TOKEN, "may not write to adah"),
        ("museum/portrait", "write", TOKEN, "may not write to museum"),
    ],
)
def test_what_is_surely_wrong_is_refused_without_a_second_try(tmp_path, hub, monkeypatch, name, role, token, says):
    hub.role = role
    monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(ConfigError, match=says) as refused:
        publish(write_result(tmp_path), name, private=True, message="x", waits=(60,))

    assert hub.asked == ["GET /api/whoami-v2"]
    assert token not in str(refused.value)


def test_a_missing_token_is_named(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))

    with pytest.raises(ConfigError, match="there is no token"):
        open_repository("portrait", private=True)


def test_an_organisation_that_the_account_may_write_to_is_taken(hub):
    assert open_repository("Studio/portrait", private=False) == "Studio/portrait"
    assert hub.private == {"Studio/portrait": False}


@pytest.mark.parametrize("code", [500, 503, 0])
def test_a_commit_that_fails_is_tried_again_and_is_then_whole(tmp_path, hub, code):
    hub.failing = {"/commit/": [code]}
    said: list[str] = []

    publish(write_result(tmp_path), "portrait", private=True, message="x", waits=(0.01,), say=said.append)

    assert hub.repositories["ada/portrait"].keys() == PUBLISHED
    assert len(said) == 1 and "trying again in 0.01 s" in said[0]


def test_tries_are_bounded_and_nothing_half_is_there(tmp_path, hub):
    hub.failing = {"/commit/": [500] * 9}

    with pytest.raises(SimpleTunerError, match="answered 500 for ada/portrait: the server says no"):
        publish(write_result(tmp_path), "portrait", private=True, message="x", waits=(0.01, 0.01))

    assert len(hub.failing["/commit/"]) == 6
    assert hub.repositories["ada/portrait"] == {}


def test_a_refusal_to_write_is_final(tmp_path, hub):
    hub.failing = {"/preupload/": [403] * 9}

    with pytest.raises(ConfigError, match="may not write to ada/portrait"):
        publish(write_result(tmp_path), "portrait", private=True, message="x", waits=(60,))


def test_a_hub_that_is_not_there_is_no_wrong_setting(monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)

    with pytest.raises(SimpleTunerError, match="cannot be reached for portrait") as failed:
        open_repository("portrait", private=True)

    assert not isinstance(failed.value, ConfigError)


def test_a_hub_that_takes_the_connection_and_says_nothing_is_waited_for_no_longer_than_its_bound(monkeypatch):
    monkeypatch.setattr("simpletuner.reporting.hub.ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(SimpleTunerError, match=r"cannot be reached for portrait: no answer within 0\.3 s") as failed:
            open_repository("portrait", private=True)

    assert not isinstance(failed.value, ConfigError)


def test_an_upload_that_hangs_is_ended_at_its_bound_and_says_what_to_run_later(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("simpletuner.reporting.uploads.LIMIT_SECONDS", 1.0)
    warned: list[str] = []
    hub.gate.clear()
    uploads = Uploads("ada/portrait", True, tmp_path / ".hub", warned.append, lambda: False)
    folder = write_result(tmp_path / "output")

    assert uploads.finish(folder, "Finished") is None

    assert len(warned) == 1 and "the hub had not taken it within" in warned[0] and f"simpletuner push {folder} --to ada/portrait" in warned[0]


def test_the_command_publishes_a_checkpoint_by_hand(tmp_path, hub, capsys):
    folder = write_result(tmp_path / "output") / "checkpoint-3"

    assert main(["push", str(folder), "--to", "studio/portrait", "--public"]) == 0

    assert hub.repositories["studio/portrait"] == {"pytorch_lora_weights.safetensors": b"older"}
    assert hub.private == {"studio/portrait": False}
    assert f"Published: {hub.address}/studio/portrait" in capsys.readouterr().out


def test_of_checkpoints_that_wait_the_newest_is_uploaded_and_the_result_last(tmp_path, hub):
    warned: list[str] = []
    uploads = Uploads("ada/portrait", True, tmp_path / ".hub", warned.append, lambda: False)
    hub.gate.clear()
    for step in (1, 2, 3):
        folder = write_result(tmp_path / f"checkpoint-{step}", b"step %d" % step)
        uploads.offer(folder, {}, f"Step {step}")
        if step == 1:
            wait_for(hub, "/commit/")
        folder.rename(tmp_path / f"gone-{step}")  # as when older checkpoints are deleted
    hub.gate.set()
    uploads.wait()

    address = uploads.finish(write_result(tmp_path / "output", b"the end"), "Finished")
    uploads.close()

    assert hub.commits == ["Step 1", "Step 3", "Finished"]
    assert hub.repositories["ada/portrait"]["pytorch_lora_weights.safetensors"] == b"the end"
    assert address == f"{hub.address}/ada/portrait"
    assert len(warned) == 1 and "some checkpoints are not published" in warned[0]
    assert not (tmp_path / ".hub").exists()


def test_an_upload_that_hangs_is_ended_by_a_stop_and_says_what_to_run_later(tmp_path, hub):
    warned: list[str] = []
    hub.gate.clear()
    uploads = Uploads("ada/portrait", True, tmp_path / ".hub", warned.append, lambda: any("/commit/" in path for path in hub.asked))
    folder = write_result(tmp_path / "output")

    began = time.monotonic()
    address = uploads.finish(folder, "Finished")

    assert address is None and time.monotonic() - began < 20
    assert len(warned) == 1
    assert "the upload was stopped" in warned[0] and f"simpletuner push {folder} --to ada/portrait" in warned[0]


def wait_for(hub: HubServer, part: str) -> None:
    deadline = time.monotonic() + 20
    while not any(part in path for path in hub.asked):
        assert time.monotonic() < deadline
        time.sleep(0.02)
