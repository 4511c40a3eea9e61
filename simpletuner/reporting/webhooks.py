"""Events sent to Discord or to any server: behind the run, again after a failure, and never for longer than the run can wait."""

from __future__ import annotations

import base64
import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from simpletuner.options.webhooks import LEVELS, Webhook
from simpletuner.reporting.events import PICTURES, STATUS, Event
from simpletuner.reporting.pictures import as_jpeg

HELD = 100
"""Events that wait for a slow receiver, at most; and as many pictures. Errors always find room."""
FEW = 5
"""So many that wait at the end are told in their order; of more, the last comes first."""
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
"""Before the second attempt; twice as long before each further one."""
LONGEST_PAUSE_SECONDS = 60.0
"""However long a receiver asks for."""
TIMEOUT_SECONDS = (5.0, 10.0)
"""To connect, and to hear anything."""
STATUS_SECONDS = 5.0
"""Between two statuses to a server, where no interval in steps is asked for: a message takes some ms of the interpreter that steps want, too."""
LONGEST_TEXT = 2000
PICTURES_A_MESSAGE = 10
MESSAGE_BYTES = 7_800_000
"""Discord takes 2,000 letters, 10 files, and 8 MB together."""
OFF_FOR_GOOD = frozenset({401, 403, 404, 405, 410})
WORTH_ANOTHER_TRY = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class Message:
    """One request."""

    body: Mapping[str, Any]
    """Goes as JSON."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """JPEG pictures by file name."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message was not taken."""

    why: str
    can_pass: bool = True
    """Whether the same message may be taken later."""
    is_final: bool = False
    """Whether no message will be."""
    pause_seconds: float | None = None
    """What the receiver asks for."""


class Hook:
    """One webhook with a queue before it and a thread of its own, which begins with the first event."""

    def __init__(self, options: Webhook, run: str, status_interval: int | None, warn: Callable[[str], None]) -> None:
        """
        Args:
            run: the run's name.
            status_interval: steps between two statuses; None is some seconds for a server, and none at all for Discord.
            warn: told of each kind of failure once, without addresses and tokens.
        """
        self._options, self._run, self._interval, self._warn = options, run, status_interval, warn
        self._waiting: deque[Event] = deque()
        self._has_more = threading.Condition()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        self._status_at = float("-inf")
        self._is_off, self._is_down, self._left_out = False, False, 0
        self._in_hand = 0
        """Events that are being delivered: one or none."""
        self._said: set[str] = set()
        self._is_over = False

    def take(self, event: Event) -> None:
        """Put an event behind the others, if it is wanted. A new status takes the place of one that still waits."""
        with self._has_more:
            if self._is_off or not self._wants(event):
                return
            if event.kind == STATUS:
                for old in [one for one in self._waiting if one.kind == STATUS]:
                    self._waiting.remove(old)
            event = self._with_room_for_pictures(event)
            if len(self._waiting) >= HELD and LEVELS.index(event.level) < LEVELS.index("error"):
                self._left_out += 1
            else:
                self._waiting.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"webhook-{self._options.name}", daemon=True)
                self._thread.start()
            self._has_more.notify()

    def _wants(self, event: Event) -> bool:
        if LEVELS.index(event.level) < LEVELS.index(self._options.level):
            return False
        if event.kind != STATUS:
            return True
        if self._interval is None and self._options.kind != "raw":
            return False
        step, now = event.fields["step"], time.monotonic()
        is_due = now - self._status_at >= STATUS_SECONDS if self._interval is None else step % self._interval == 0
        self._status_at = now if is_due else self._status_at
        return is_due or step == event.fields.get("total_steps")

    def _with_room_for_pictures(self, event: Event) -> Event:
        room = HELD - sum(len(one.pictures) for one in self._waiting)
        if len(event.pictures) <= room:
            return event
        kept = dict(list(event.pictures.items())[: max(0, room)])
        return replace(event, pictures=kept, fields={**event.fields, "left_out": len(event.pictures) - len(kept)})

    def close(self, deadline: float) -> None:
        """Deliver what waits, until the deadline at the latest."""
        with self._has_more:
            self._deadline = deadline
            if len(self._waiting) > FEW:
                self._waiting.rotate(1)  # how it ended matters most, and there may be no time for all
            self._closing.set()
            self._has_more.notify()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            with self._has_more:
                missing = self._left_out + len(self._waiting) + self._in_hand
            if missing and not self._is_off:
                self._say(f"webhook {self._options.name} was not told of {missing} events: it is too slow, or does not answer")
        self._is_over = True

    def _work(self) -> None:
        while (event := self._next()) is not None:
            is_delivered = False
            try:
                is_delivered = self._deliver(event)
            except Exception as error:  # the run matters more; the text of an error may hold the address
                self._say(f"webhook {self._options.name} cannot be told of a {event.kind}: {type(error).__name__}. The run goes on")
            with self._has_more:
                self._in_hand, self._left_out = 0, self._left_out + (not is_delivered)

    def _say(self, text: str) -> None:
        if text not in self._said and not self._is_over:  # the console may be gone by then
            self._said.add(text)
            self._warn(text)

    def _next(self) -> Event | None:
        with self._has_more:
            while not self._waiting and not self._closing.is_set():
                self._has_more.wait()
            if not self._waiting or self._is_off or time.monotonic() >= self._deadline:
                return None
            self._in_hand = 1
            return self._waiting.popleft()

    def _deliver(self, event: Event) -> bool:
        """Send an event, and tell whether all of it was taken."""
        make = discord_messages if self._options.kind == "discord" else raw_messages
        for message in make(event, self._options.prefix, self._run):
            refusal = self._send(message)
            if refusal is None:
                self._is_down = False
                continue
            self._is_down = self._is_down or refusal.can_pass
            self._is_off = refusal.is_final
            what = "it is told nothing more" if refusal.is_final else "it misses what it does not take"
            self._say(f"webhook {self._options.name} {refusal.why}: {what}. The run goes on")
            return False
        return True

    def _send(self, message: Message) -> Refusal | None:
        """Send until it is taken. A receiver that failed to the last attempt gets one for each message, until it takes one."""
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(ATTEMPTS):
            refusal = post(self._options, message)
            is_last = attempt == ATTEMPTS - 1 or self._is_down
            if refusal is None or is_last or not refusal.can_pass or not self._pause(refusal.pause_seconds or pause):
                return refusal
            pause *= 2
        return refusal

    def _pause(self, seconds: float) -> bool:
        """Wait, and say whether there is time for another attempt."""
        until = time.monotonic() + min(seconds, LONGEST_PAUSE_SECONDS)
        if self._closing.wait(until - time.monotonic()):
            if until > self._deadline:
                return False
            time.sleep(max(0.0, until - time.monotonic()))
        return True


def post(options: Webhook, message: Message) -> Refusal | None:
    """Send one message; None if it was taken. Redirections are not followed: they would carry the token elsewhere."""
    import requests
    import urllib3

    if not options.verifies:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # it was asked for
    headers = {"X-API-Key": options.token} if options.token else {}
    content: dict[str, Any] = {"json": message.body}
    if message.files:
        files = [(f"files[{number}]", (name, data, "image/jpeg")) for number, (name, data) in enumerate(message.files.items())]
        content = {"data": {"payload_json": json.dumps(message.body)}, "files": files}
    try:
        asked: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS, "verify": options.verifies, "allow_redirects": False}
        with requests.post(options.url, **content, **asked, stream=True) as answer:  # stream: the head of an answer is enough
            return refusal_of(answer.status_code, answer.headers)
    except requests.exceptions.SSLError:
        trusts = "; set ssl_no_verify if its certificate is your own" if options.kind == "raw" and options.verifies else ""
        return Refusal(f"has no certificate that this machine trusts{trusts}", can_pass=False)
    except requests.exceptions.Timeout:
        return Refusal(f"did not answer within {TIMEOUT_SECONDS[1]:g} s")
    except requests.exceptions.ConnectionError:
        return Refusal("cannot be reached, or broke off")
    except requests.exceptions.RequestException as error:  # their texts quote the address
        return Refusal(f"cannot be sent to ({type(error).__name__})", can_pass=False)


def refusal_of(status: int, headers: Mapping[str, str]) -> Refusal | None:
    """What the head of an answer says."""
    if 200 <= status < 300:
        return None
    try:
        pause = float(headers.get("Retry-After", ""))
    except ValueError:
        pause = 0.0
    can_pass = status >= 500 or status in WORTH_ANOTHER_TRY
    return Refusal(f"answered {status}", can_pass, status in OFF_FOR_GOOD, pause if 0 < pause < float("inf") else None)


def raw_messages(event: Event, prefix: str, run: str) -> Iterator[Message]:
    """One JSON object with everything, pictures in base64, which has 4 letters for 3 bytes."""
    most = MESSAGE_BYTES * 3 // 4 // max(1, len(event.pictures))
    images = [
        {"name": name, "media_type": "image/jpeg", "data": base64.b64encode(as_jpeg(image, most)).decode()} for name, image in event.pictures.items()
    ]
    at = datetime.fromtimestamp(event.time, timezone.utc).isoformat(timespec="milliseconds")
    head = {"type": event.kind, "level": event.level, "timestamp": at, "run": run, "message": f"{prefix} {event.message}".strip()}
    yield Message({**head, **finite(event.fields), **({"images": images} if images else {})})


def finite(value: Any) -> Any:
    """A value of JSON with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def discord_messages(event: Event, prefix: str, run: str) -> Iterator[Message]:
    """A line of text and the pictures, in as many messages as Discord wants; nobody is called by an @ in a prompt."""
    text = f"{prefix} {event.message}".strip()
    if event.kind == PICTURES:
        text = "\n".join([text, *(f"{name}: {caption}" for name, caption in event.fields.get("captions", {}).items())])
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT - 1]}…"
    body: dict[str, Any] = {"content": text, "allowed_mentions": {"parse": []}}
    pictures = list(event.pictures.items())
    for first in range(0, max(1, len(pictures)), PICTURES_A_MESSAGE):
        some = pictures[first : first + PICTURES_A_MESSAGE]
        files = {file_name(number, name): as_jpeg(image, MESSAGE_BYTES // len(some)) for number, (name, image) in enumerate(some, start=first)}
        yield Message(body if not first else {**body, "content": f"{prefix} {event.message}, continued".strip()[:LONGEST_TEXT]}, files)


def file_name(number: int, name: str) -> str:
    """A name that any receiver takes, unlike that of others."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60]
    return f"{number:02d}_{plain}.jpg" if plain else f"{number:02d}.jpg"
