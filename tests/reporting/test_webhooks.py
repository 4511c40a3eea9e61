"""Webhooks against a real HTTP receiver."""

from __future__ import annotations

import base64
import io
import threading
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simpletuner.options.webhooks import read_webhooks
from simpletuner.reporting import webhooks
from simpletuner.reporting.events import Events
from simpletuner.reporting.pictures import as_jpeg
from simpletuner.reporting.webhooks import Hook, discord_messages, file_name, raw_messages, refusal_of
from tests.builders.receiver import breaks_off, hangs, receiving, self_signed, slowly


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(webhooks, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", (1.0, 1.0))


def telling(url: str, said: list[str], interval: int | None = None, **keys) -> Events:
    address = "webhook_url" if keys.get("webhook_type") == "discord" else "callback_url"
    hooks, problems = read_webhooks({"webhook_type": "raw", address: url, **keys})
    assert not problems
    return Events([Hook(one, "my run", interval, said.append) for one in hooks])


def noise(size=(64, 48), mode="RGB") -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)).convert(mode)


def test_a_server_gets_json_with_its_token_fields_and_pictures_in_base64():
    said: list[str] = []
    with receiving() as receiver:
        events = telling(receiver.url, said, auth_token="T0P", message_prefix="[gpu 7]")
        events.expect(10)
        events.stage("init_vae_cache")
        events.figures(5, {"train_loss": 0.25, "learning_rate": 1e-4})
        events.pictures(5, {"cat": noise()}, {"cat": "a cat"})
        events.saved(5, "checkpoint-5")
        events.close(5)
    stage, status, pictures, saved = [one.body for one in receiver.taken]

    assert said == [] and receiver.taken[0].headers["X-API-Key"] == "T0P" and receiver.taken[0].path == "/secret-path"
    assert (stage["type"], stage["level"], stage["run"], stage["stage"], stage["status"]) == (
        "lifecycle.stage",
        "info",
        "my run",
        "init_vae_cache",
        "running",
    )
    assert stage["message"] == "[gpu 7] Encoding pictures" and stage["timestamp"].endswith("+00:00")
    assert (status["step"], status["total_steps"], status["figures"]["train_loss"]) == (5, 10, 0.25)
    assert (saved["type"], saved["checkpoint"]) == ("training.checkpoint", "checkpoint-5")
    assert pictures["captions"] == {"cat": "a cat"} and pictures["images"][0]["name"] == "cat"
    assert Image.open(io.BytesIO(base64.b64decode(pictures["images"][0]["data"]))).size == (64, 48)


def test_discord_gets_text_and_files_ten_at_a_time_and_a_prompt_calls_nobody():
    said: list[str] = []
    with receiving() as receiver:
        events = telling(receiver.url, said, webhook_type="discord")
        events.figures(3, {"train_loss": 0.5})
        events.pictures(3, {f"{number} ü/..": noise() for number in range(12)}, {"0 ü/..": "@everyone " + "long " * 500})
        events.close(5)
    first, second = receiver.taken

    assert said == [] and (len(first.files), len(second.files)) == (10, 2)
    assert all(Image.open(io.BytesIO(data)).size == (64, 48) for data in first.files.values())
    assert first.body["allowed_mentions"] == {"parse": []} and len(first.body["content"]) == 2000 and "@everyone" in first.body["content"]
    assert next(iter(first.files)) == "00_0.jpg"


def test_pictures_of_a_message_are_shrunk_until_discord_takes_them(monkeypatch):
    monkeypatch.setattr(webhooks, "MESSAGE_BYTES", 60_000)
    with receiving() as receiver:
        events = telling(receiver.url, [], webhook_type="discord")
        events.pictures(1, {"a": noise((256, 256)), "b": noise((512, 256), "RGBA")}, {})
        events.close(5)

    assert 1000 < sum(len(data) for data in receiver.taken[0].files.values()) <= 60_000


def test_a_failing_receiver_is_tried_again_in_order_and_nothing_is_said():
    said: list[str] = []
    with receiving(answers=[500, breaks_off, 429, 503]) as receiver:
        events = telling(receiver.url, said)
        events.stage("validation")
        events.stage("model_save")
        events.close(5)

    assert [one.body["stage"] for one in receiver.taken] == ["validation", "model_save"] and said == []


def test_the_pause_that_a_receiver_asks_for_is_kept():
    began = time.monotonic()
    with receiving(answers=[(429, {"Retry-After": "0.6"})]) as receiver:
        events = telling(receiver.url, [])
        events.stage("validation")
        events.close(5)

    assert receiver.taken[0].time - began >= 0.6


def test_a_receiver_that_stays_down_is_named_once_without_its_address_and_gets_one_attempt_until_it_is_back():
    said: list[str] = []
    with receiving(answers=[500] * 6) as receiver:
        events = telling(receiver.url, said)
        for stage in ("validation", "model_save", "training_complete"):
            events.stage(stage)
            time.sleep(0.01)
        events.close(10)

    assert receiver.asked == 7 and [one.body["stage"] for one in receiver.taken] == ["training_complete"]  # 5 attempts, 1, 1
    assert said[0] == "webhook raw 127.0.0.1 answered 500: it misses what it does not take. The run goes on"
    assert said[1:] == ["webhook raw 127.0.0.1 was not told of 2 events: it is too slow, or does not answer"]


def test_a_receiver_that_dies_is_named_once_and_its_address_is_shown_nowhere(monkeypatch):
    monkeypatch.setattr(webhooks, "ATTEMPTS", 2)
    said: list[str] = []
    with receiving() as receiver:
        events = telling(receiver.url, said)
        events.stage("validation")
        wait_for(lambda: receiver.taken)
    for _ in range(3):
        events.stage("validation")
    events.close(5)

    assert len(said) == 2 and "cannot be reached, or broke off" in said[0] and "3 events" in said[1]
    assert "secret-path" not in str(said)


@pytest.mark.parametrize("status", [401, 404])
def test_a_receiver_that_wants_nothing_of_us_is_told_nothing_more(status):
    said: list[str] = []
    with receiving(always=status) as receiver:
        events = telling(receiver.url, said)
        events.stage("validation")
        wait_for(lambda: said)
        events.stage("model_save")
        events.close(5)

    assert receiver.asked == 1 and said == [f"webhook raw 127.0.0.1 answered {status}: it is told nothing more. The run goes on"]


def test_a_redirection_is_not_followed_since_it_would_carry_the_token_away():
    said: list[str] = []
    with receiving() as other, receiving() as receiver:
        receiver.always = (307, {"Location": other.url})
        events = telling(receiver.url, said, auth_token="T0P")
        events.stage("validation")
        events.close(5)

    assert other.asked == 0 and "answered 307" in said[0]


def test_a_slow_receiver_holds_nobody_up_and_gets_the_newest_status_alone():
    with receiving(always=slowly(0.2)) as receiver:
        events = telling(receiver.url, [], 1)
        began = time.monotonic()
        for step in range(1, 501):
            events.figures(step, {"train_loss": 1.0})
        events.saved(500, "checkpoint-500")
        seconds = time.monotonic() - began
        events.close(5)

    steps = [one.body["step"] for one in receiver.taken]
    assert seconds < 2 and receiver.types()[-2:] == ["training.status", "training.checkpoint"]
    assert steps[-2:] == [500, 500] and len(steps) < 20 and steps == sorted(steps)


def test_a_receiver_that_hangs_costs_the_end_of_a_run_no_more_than_its_bound():
    said: list[str] = []
    with receiving(always=hangs(3)) as receiver:
        events = telling(receiver.url, said)
        for _ in range(20):
            events.stage("validation")
        began = time.monotonic()
        events.close(0.5)
        seconds = time.monotonic() - began

        time.sleep(1.5)  # by now the thread has had its timeout
    assert seconds < 1.2 and len(said) == 1 and "was not told of 20 events" in said[0]


def test_a_webhook_that_hangs_takes_no_time_from_the_others():
    said: list[str] = []
    with receiving(always=hangs(3)) as first, receiving(always=slowly(0.1)) as second:
        hooks, _ = read_webhooks([{"webhook_type": "raw", "callback_url": one.url} for one in (first, second)])
        events = Events([Hook(one, "my run", None, said.append) for one in hooks])
        for _ in range(30):
            events.stage("validation")
        events.failed(ValueError("a"), 1, is_fault=False)
        events.close(0.9)
        told = second.types()

    assert "error" in told and any("was not told of 31 events" in one for one in said)


def test_what_was_taken_is_not_missed_though_the_thread_still_ends(monkeypatch):
    said: list[str] = []
    with receiving() as receiver:
        hooks, _ = read_webhooks({"webhook_type": "raw", "callback_url": receiver.url})
        hook = Hook(hooks[0], "my run", None, said.append)
        Events([hook]).stage("validation")
        wait_for(lambda: receiver.taken and not hook._in_hand)
        hook.close(time.monotonic() - 1)

    assert said == []


def test_numbers_that_json_does_not_have_are_null():
    said: list[str] = []
    with receiving() as receiver:
        events = telling(receiver.url, said)
        events.figures(3, {"loss/val/a": float("nan"), "loss/val/b": float("inf"), "loss/val/c": 0.5})
        events.close(5)

    assert said == [] and receiver.taken[0].body["figures"] == {"loss/val/a": None, "loss/val/b": None, "loss/val/c": 0.5}


def test_pictures_in_base64_keep_to_the_size_of_a_message(monkeypatch):
    monkeypatch.setattr(webhooks, "MESSAGE_BYTES", 60_000)
    kept = []
    Events([type("Keep", (), {"take": lambda self, event: kept.append(event)})()]).pictures(1, {"a": noise((512, 256)), "b": noise((512, 256))}, {})

    (message,) = raw_messages(kept[0], "", "run")

    assert 1000 < sum(len(image["data"]) for image in message.body["images"]) <= 60_000


def test_how_a_run_ended_is_told_first_where_there_is_no_time_for_all():
    gate = threading.Event()

    def wait(handler):
        gate.wait(5)
        return 204

    with receiving(answers=[wait], always=slowly(0.1)) as receiver:
        events = telling(receiver.url, [])
        for _ in range(30):
            events.stage("validation")
        wait_for(lambda: receiver.asked)
        events.failed(ValueError("bad /home/me/pictures/a.png"), 1, is_fault=False)
        threading.Timer(0.2, gate.set).start()  # by when it is known that the run ends
        events.close(1)

    error = receiver.taken[1].body
    assert (error["type"], error["level"], error["message"]) == ("error", "error", "ValueError: bad a.png")


def test_what_waits_is_bounded_and_errors_always_find_room(monkeypatch):
    monkeypatch.setattr(webhooks, "HELD", 5)
    gate, said = threading.Event(), []

    def wait(handler):
        gate.wait(5)
        return 204

    with receiving(answers=[wait]) as receiver:
        events = telling(receiver.url, said)
        events.stage("validation")
        wait_for(lambda: receiver.asked)
        events.pictures(1, {str(number): noise((8, 8)) for number in range(9)}, {})
        for _ in range(9):
            events.stage("validation")
        events.failed(MemoryError(), 4, is_fault=True)
        gate.set()
        events.close(5)

    types = receiver.types()
    assert len(types) == 7 and "gpu.fault" in types
    pictures = next(one.body for one in receiver.taken if one.body["type"] == "validation.image")
    assert len(pictures["images"]) == 5 and pictures["left_out"] == 4
    assert "was not told of 5 events" in said[-1]


@pytest.mark.parametrize(
    ("keys", "interval", "steps"),
    [
        ({}, None, [1, 7]),
        ({}, 1, [1, 2, 3, 4, 5, 6, 7]),
        ({}, 3, [3, 6, 7]),
        ({"webhook_type": "discord"}, None, []),
        ({"webhook_type": "discord"}, 3, [3, 6, 7]),
        ({"log_level": "warning"}, 1, []),
    ],
)
def test_statuses_come_at_their_interval_and_at_the_end(keys, interval, steps):
    with receiving() as receiver:
        events = telling(receiver.url, [], interval, **keys)
        events.expect(7)
        for step in range(1, 8):
            events.figures(step, {"train_loss": 1.0})
            count = sum(one <= step for one in steps)
            wait_for(lambda count=count: len(receiver.taken) == count)
        events.close(5)

    assert len(receiver.taken) == len(steps)


def test_a_log_level_keeps_what_matters_less_away():
    with receiving() as receiver:
        events = telling(receiver.url, [], log_level="error")
        events.stage("validation")
        events.failed(ValueError("a"), 1, is_fault=False)
        events.failed(ValueError("b"), 1, is_fault=True)
        events.close(5)

    assert receiver.types() == ["error", "gpu.fault"]


@pytest.mark.parametrize("skips", [False, True])
def test_a_certificate_of_ones_own_is_taken_when_it_is_asked_for(tmp_path, skips, recwarn):
    pytest.importorskip("cryptography")
    said: list[str] = []
    with receiving(self_signed(tmp_path)) as receiver:
        events = telling(receiver.url, said, ssl_no_verify=skips)
        events.stage("validation")
        events.close(5)

    assert receiver.url.startswith("https") and len(receiver.taken) == skips
    assert skips == (not said) and (skips or "set ssl_no_verify" in said[0])
    assert not [one for one in recwarn if "Unverified" in str(one.message)]


@pytest.mark.parametrize("said", ["soon", "", "-3", "nan", "inf", "1e999"])
def test_a_pause_that_makes_no_sense_is_ours_to_choose(said):
    assert refusal_of(429, {"Retry-After": said}).pause_seconds is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["RGB", "RGBA", "L", "P", "1", "LA"]), st.integers(1, 40_000))
def test_every_picture_becomes_a_jpeg_that_is_small_enough_or_as_small_as_it_gets(width, height, mode, most):
    written = as_jpeg(noise((width, height), mode), most)
    size = Image.open(io.BytesIO(written)).size

    assert len(written) <= most or min(size) < 128


@given(st.integers(0, 99), st.text(max_size=200))
def test_a_file_name_is_plain_whatever_the_picture_is_called(number, name):
    made = file_name(number, name)

    assert made.isascii() and made.endswith(".jpg") and len(made) <= 67 and not set(made) & set('/\\"\r\n;')


def test_no_text_is_longer_than_discord_takes():
    taken = []
    events = Events([type("Keep", (), {"take": lambda self, event: taken.append(event), "close": lambda self, deadline: None})()])
    events.failed(ValueError("x" * 5000), 1, is_fault=False)

    (message,) = discord_messages(taken[0], "prefix", "run")

    assert len(message.body["content"]) == 2000


def wait_for(is_there, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
