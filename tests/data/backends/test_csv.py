from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from simpletuner.console import Bar, Console
from simpletuner.data import download
from simpletuner.data.backends.csv import CsvBackend, CsvOptions
from simpletuner.data.discover import discover, take_up
from simpletuner.data.download import Fetching
from simpletuner.errors import ConfigError, DatasetError

BODY = bytes(range(256)) * 400
QUICK = Fetching(limit_bytes=200_000, tries=3, wait_seconds=0.01, silence_seconds=1.0, deadline_seconds=5.0)


class Handler(BaseHTTPRequestHandler):
    """A server with the manners that its paths name; it counts what it is asked for."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[tuple[str, str]]

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        span = self.headers.get("Range", "")
        self.asked.append((path, span))
        number = sum(1 for other, _ in self.asked if other == path)
        body = self.files.get(path, BODY)
        if path.startswith("/gone"):
            self.reply(404, b"not here")
        elif path.startswith("/busy") and number < 3:
            self.reply(503, b"later", {"Retry-After": "0"})
        elif path.startswith("/to/"):
            self.reply(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif path.startswith("/silent"):
            time.sleep(3)
        elif path.startswith("/slow"):
            self.reply(200, body, pieces=8, pause=0.1)
        elif path.startswith("/breaks"):
            self.reply_in_part(body, span, until=number * 30_000)
        elif path.startswith("/nomark"):
            self.reply(200, body, until=10_000 if number == 1 else len(body))
        elif path.startswith("/changes"):
            self.reply_in_part(body if number == 1 else body[::-1], span, until=10_000 if number == 1 else len(body), mark=f'"{number}"')
        elif path.startswith("/wrongpart"):
            self.reply_in_part(body, span, until=10_000 if number == 1 else len(body), shift=5 if number == 2 else 0)
        elif path.startswith("/endless"):
            self.reply(200, b"x" * 1000, pieces=1000, has_length=False)
        else:
            self.reply(200, body, {"ETag": '"1"'})

    def reply(
        self, code: int, body: bytes, headers: dict[str, str] | None = None, *, pieces: int = 1, pause: float = 0, until: int = -1, has_length=True
    ) -> None:
        self.send_response(code)
        for key, value in {**({"Content-Length": str(len(body))} if has_length else {}), **(headers or {})}.items():
            self.send_header(key, value)
        self.close_connection = until >= 0 or not has_length
        self.end_headers()
        try:
            if not has_length:
                for _ in range(pieces):
                    self.wfile.write(body)
                return
            body = body[:until] if until >= 0 else body
            step = -(-len(body) // pieces) or 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                time.sleep(pause)
        except ConnectionError:
            self.close_connection = True

    def reply_in_part(self, body: bytes, span: str, until: int, mark: str = '"1"', shift: int = 0) -> None:
        """Answer 206 if the asker's version is this one, and break off at byte `until` of the file."""
        is_part = span and self.headers.get("If-Range") == mark
        start = int(span.removeprefix("bytes=").rstrip("-")) if is_part else 0
        headers = {"ETag": mark, **({"Content-Range": f"bytes {start + shift}-{len(body) - 1}/{len(body)}"} if is_part else {})}
        self.reply(206 if is_part else 200, body[start:], headers, until=max(0, until - start))


@pytest.fixture
def server() -> Iterator[Callable[[str], str]]:
    """A real server on this machine; called with a path it gives the address, and it holds `files` and `asked`."""
    handler = type("OwnHandler", (Handler,), {"files": {}, "asked": []})
    kind = type("OwnServer", (ThreadingHTTPServer,), {"request_queue_size": 64})
    running = kind(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()

    def address(path: str) -> str:
        return f"http://127.0.0.1:{running.server_port}{path}"

    address.files, address.asked = handler.files, handler.asked  # type: ignore[attr-defined]
    yield address
    running.shutdown()
    running.server_close()


@pytest.fixture
def listed(workplace: Path) -> Callable[..., CsvBackend]:
    """A list of addresses or paths, with captions."""

    def make(*rows: tuple[str, ...], columns: tuple[str, ...] = ("url", "caption"), **keys: str) -> CsvBackend:
        (workplace / "set").mkdir(exist_ok=True)
        with open("set/list.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        keys = {"csv_file": "set/list.csv", "csv_caption_column": "caption", "csv_cache_dir": "downloads", **keys}
        backend = CsvBackend(CsvOptions(id="set", type="csv", **keys))
        backend._how = QUICK
        return backend

    return make


def no_bar(total: int) -> nullcontext[Bar]:
    return nullcontext(Bar(Console(is_main=False), "fetch", total, "files", 0))


def name_of(url: str, last: str) -> str:
    return f"{hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}/{last}"


def test_addresses_are_fetched_once_and_read_from_the_cache(listed, server):
    urls = [server(f"/pictures/cat {number}.jpg") for number in range(20)]
    backend = listed(*[(url, f"cat {number}") for number, url in enumerate(urls)])

    assert backend.missing() is None
    assert [entry.fault for entry in backend.list()] == ["not fetched"] * 20
    assert backend.prepare(no_bar) == ()
    entries = {entry.name: entry for entry in backend.list()}
    again = listed(*[(url, f"cat {number}") for number, url in enumerate(urls)])
    again.prepare(no_bar)

    name = name_of(urls[3], "cat 3.jpg")
    assert (entries[name].size_bytes, entries[name].captions, entries[name].fault) == (len(BODY), ("cat 3",), None)
    assert again.read(name) == BODY and again.read_head(name, 5) == BODY[:5] and again.exists(name)
    assert list(again.list()) == list(entries.values())
    assert len(server.asked) == 20


def test_a_slow_server_is_waited_for(listed, server):
    backend = listed((server("/slow.png"), "x"))

    assert backend.prepare(no_bar) == ()
    assert backend.read(next(backend.list()).name) == BODY


def test_a_file_that_breaks_off_is_resumed_where_it_stopped(listed, server):
    backend = listed((server("/breaks.png"), "x"))

    assert backend.prepare(no_bar) != ()  # three tries brought 90,000 of 102,400 bytes
    assert [entry.fault for entry in backend.list()] == ["not fetched"]
    assert backend.prepare(no_bar) == ()

    assert server.asked == [("/breaks.png", span) for span in ("", "bytes=30000-", "bytes=60000-", "bytes=90000-")]
    assert backend.read(next(backend.list()).name) == BODY
    assert not list(Path("downloads").rglob("*.part")) and not list(Path("downloads").rglob("*.tag"))


def test_a_file_without_a_mark_is_begun_anew(listed, server):
    backend = listed((server("/nomark.png"), "x"))

    assert backend.prepare(no_bar) == ()
    assert server.asked == [("/nomark.png", ""), ("/nomark.png", "")]
    assert backend.read(next(backend.list()).name) == BODY


def test_two_versions_of_a_file_are_never_mixed(listed, server):
    backend = listed((server("/changes.png"), "x"))

    assert backend.prepare(no_bar) == ()
    assert [span for _, span in server.asked] == ["", "bytes=10000-"]
    assert backend.read(next(backend.list()).name) == BODY[::-1]


def test_a_part_that_was_not_asked_for_is_thrown_away(listed, server):
    backend = listed((server("/wrongpart.png"), "x"))

    assert backend.prepare(no_bar) == ()
    assert [span for _, span in server.asked] == ["", "bytes=10000-", ""]
    assert backend.read(next(backend.list()).name) == BODY


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(listed, server):
    backend = listed((server("/busy.png"), "x"), (server("/gone.png?signature=hunter2"), "y"))

    (note,) = backend.prepare(no_bar)

    assert note == f"1 not fetched, the server answers 404 Not Found: {server('/gone.png')}"
    assert Counter(path for path, _ in server.asked) == {"/busy.png": 3, "/gone.png": 1}
    assert sorted(str(entry.fault) for entry in backend.list()) == ["None", "not fetched"]


def test_files_over_the_bound_are_given_up(listed, server):
    server.files["/big.png"] = b"x" * 200_000
    backend = listed((server("/big.png"), "x"), (server("/endless.png"), "y"))

    (note,) = backend.prepare(no_bar)

    assert note.startswith("2 not fetched, 200,000 bytes or more: ")
    assert sum(path.stat().st_size for path in Path("downloads").rglob("*.part")) == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/x.png", "the host refuses the connection"),
        ("http://no-such-host.invalid/x.png", "the host is not known"),
        ("http://[bad/x.png", "the address or the answer is not well formed"),
    ],
)
def test_a_host_that_is_not_there_is_not_asked_for_long(listed, url, reason):
    began = time.monotonic()
    backend = listed((url, "x"))
    backend._how = Fetching(wait_seconds=2)

    assert backend.prepare(no_bar)[0].startswith(f"1 not fetched, {reason}")
    assert time.monotonic() - began < 8


def test_a_silent_server_is_left(listed, server):
    backend = listed((server("/silent.png"), "x"))
    backend._how = Fetching(tries=1, silence_seconds=0.3)

    assert backend.prepare(no_bar)[0].startswith("1 not fetched, no answer for 0.3 s")


def test_redirects_are_followed_to_http_alone(listed, server):
    backend = listed(
        (server(f"/to/{server('/good.png')}"), "good"),
        (server("/to/file:///etc/passwd"), "bad"),
        (server("/to/ftp://127.0.0.1/x"), "bad"),
    )

    notes = backend.prepare(no_bar)

    assert sum(int(note.split()[0]) for note in notes) == 2
    assert [entry.captions for entry in backend.list() if entry.fault is None] == [("good",)]


def test_no_redirect_leads_from_the_open_network_into_a_private_one(listed, server, monkeypatch):
    private = download.is_private
    monkeypatch.setattr(download, "is_private", lambda url: private(url) and "/to/" not in url)  # as if the first server were a public one
    backend = listed((server(f"/to/{server('/good.png')}"), "x"))

    assert backend.prepare(no_bar)[0].startswith("1 not fetched, it redirects to a private address")
    assert [path for path, _ in server.asked if path == "/good.png"] == []


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://127.0.0.1/x", True),
        ("http://169.254.169.254/latest", True),
        ("http://[::1]:80/x", True),
        ("http://10.1.2.3/x", True),
        ("http://8.8.8.8/x", False),
        ("http://[2606:4700::1111]/x", False),
    ],
)
def test_private_addresses_are_known(url, wanted):
    assert download.is_private(url) is wanted


def test_paths_are_read_from_the_folder_of_the_list_and_not_from_elsewhere(listed, workplace):
    (workplace / "set" / "in").mkdir(parents=True)
    (workplace / "secret.png").write_bytes(b"secret")
    (workplace / "set/in/a.png").write_bytes(b"a")
    (workplace / "set/link.png").symlink_to("../secret.png")
    (workplace / "set/note.txt").write_bytes(b"note")
    good, bad = ["in/a.png"], ["../secret.png", "/etc/passwd", "in/../../secret.png", "link.png", "file:///etc/passwd", "s3://bucket/x.png"]
    backend = listed(*[(path, "x") for path in (*good, *bad, "in", "gone.png", "note.txt", "")])

    entries = {entry.name: entry.fault for entry in backend.list()}

    assert Counter(entries.values()) == {None: 1, "outside": 6, "unreadable": 1, "not there": 1, "unsupported": 1}
    assert entries["in/a.png"] is None and backend.read("in/a.png") == b"a"
    assert not [name for name in entries if name.startswith("/") or ".." in name.split("/")]
    for name in (*bad, *(name for name, fault in entries.items() if fault == "outside")):
        with pytest.raises(DatasetError):
            backend.read(name)
    assert backend.missing() is None


def test_rows_of_one_image_are_alternatives(listed, workplace):
    (workplace / "set").mkdir()
    (workplace / "set/a.png").write_bytes(b"a")
    backend = listed(("a.png", "a cat"), ("./a.png", " the cat "), ("a.png", ""), ("a.png", "a cat"))

    (entry,) = backend.list()

    assert (entry.name, entry.captions) == ("a.png", ("a cat", "the cat"))


@pytest.mark.parametrize(
    ("columns", "rows", "keys", "problem"),
    [
        (("uri", "caption"), [], {}, "set/list.csv has no column 'url'; did you mean 'uri'?"),
        (("url", "text"), [], {}, "set/list.csv has no column 'caption'"),
        (("url", "caption"), [("https://host/x.png", "x")], {"csv_cache_dir": None}, "lists addresses, so csv_cache_dir is needed"),
        (("url", "caption"), [], {"csv_file": "gone.csv"}, "csv_file gone.csv is not a file"),
    ],
)
def test_the_place_says_what_is_wrong_with_it(listed, columns, rows, keys, problem):
    fault = listed(*rows, columns=columns, **keys).missing()

    assert fault is not None and problem in fault


def test_a_folder_that_cannot_be_written_is_an_error(listed, server, workplace):
    (workplace / "file").write_bytes(b"")

    with pytest.raises(DatasetError, match="csv_cache_dir file/x cannot be written"):
        listed((server("/a.png"), "x"), csv_cache_dir="file/x").prepare(no_bar)


def test_a_list_is_a_dataset_like_a_folder(listed, server, plan_of, save, said):
    server.files["/a.png"], server.files["/b.jpg"] = save("a.png").read_bytes(), save("b.jpg", 60, 40).read_bytes()
    listed((server("/a.png"), "a cat"), (server("/b.jpg"), ""), (server("/gone.png"), "gone"))
    entry = {"id": "set", "type": "csv", "csv_file": "set/list.csv", "csv_caption_column": "caption", "csv_cache_dir": "downloads"}
    dataset = plan_of({**entry, "caption_strategy": "csv", "metadata_backend": "csv"}).datasets[0]

    found = discover(dataset, Path("cache/index"), 1, Console(stream=said))
    take_up(dataset, Path("cache/index"), 1)
    again = discover(dataset, Path("cache/index"), 1, Console(stream=said))
    listed((server("/a.png"), "the cat"), (server("/b.jpg"), "a dog"))
    changed = discover(dataset, Path("cache/index"), 1, Console(stream=said))

    assert [(sample.name[33:], sample.captions) for sample in found.samples] == [("a.png", ("a cat",))]
    assert {rule: [name[33:] for name in names] for rule, names in found.skipped.items()} == {"not fetched": ["gone.png"], "no caption": ["b.jpg"]}
    assert any("1 not fetched, the server answers 404" in note for note in found.notes)
    assert str(again.caption_changes) == "nothing changed"
    assert str(changed.caption_changes) == "1 new, 1 changed"
    assert "fetch set: 3/3 files" in said.getvalue()


def test_another_process_lists_what_the_first_one_fetched(listed, server, plan_of, save):
    server.files["/a.png"] = save("a.png").read_bytes()
    listed((server("/a.png"), "x"), (server("/busy.png"), "x"))
    dataset = plan_of({"id": "set", "type": "csv", "csv_file": "set/list.csv", "csv_cache_dir": "downloads"}).datasets[0]

    with pytest.raises(DatasetError, match="not fetched"):
        discover(dataset, Path("cache/index"), 1, Console(is_main=False))
    assert server.asked == []


def test_a_strategy_needs_a_place_that_knows_captions(plan_of, listed):
    listed()
    entry = {"id": "set", "type": "csv", "csv_file": "set/list.csv"}

    with pytest.raises(ConfigError, match="caption_strategy is 'csv', but 'csv' knows no captions without a column"):
        plan_of({**entry, "caption_strategy": "csv"})
    assert any("captions come from filename, as config.json has it" in note for note in plan_of({**entry, "csv_caption_column": "caption"}).notes)


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
def test_a_download_that_was_killed_goes_on_where_it_was(listed, server, workplace):
    """The process is killed without warning in the middle of slow files; the next one finishes them, and nothing is mixed."""
    urls = [server(f"/slow{number}.png") for number in range(4)]
    backend = listed(*[(url, "x") for url in urls])
    code = (
        "from contextlib import nullcontext\nfrom simpletuner.console import Bar, Console\n"
        "from simpletuner.data.backends.csv import CsvBackend, CsvOptions\n"
        "options = CsvOptions(id='set', csv_file='set/list.csv', csv_cache_dir='downloads')\n"
        "CsvBackend(options).prepare(lambda total: nullcontext(Bar(Console(is_main=False), '', total, '', 0)))\n"
    )

    for seconds in (0.2, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code])
        for _ in range(200):
            if list(Path("downloads").rglob("*.part")):
                break
            time.sleep(0.05)
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert backend.prepare(no_bar) == ()

    entries = list(backend.list())
    assert [backend.read(entry.name) for entry in entries] == [BODY] * 4
