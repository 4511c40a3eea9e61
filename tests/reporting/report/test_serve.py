"""`simpletuner watch`: a page, its figures and its pictures, to this machine alone, and nothing else of the folder."""

from __future__ import annotations

import http.client
import json
import os
import threading
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from PIL import Image

from simpletuner.errors import ConfigError
from simpletuner.reporting.report.serve import Server, open_server
from simpletuner.reporting.report.state import load, save
from simpletuner.training.validation import write_picture
from tests.builders.report import CHROMIUM, NEEDS_BROWSER, STEMS, write_output


@contextmanager
def serving(folder):
    server = open_server(folder, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: Server, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.putrequest("GET", path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_page_its_figures_and_its_pictures_are_served(tmp_path):
    save(tmp_path, write_output(tmp_path))
    with serving(tmp_path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        page = ask(server, "/")[1].decode()
        content = json.loads(ask(server, "/content.json")[1])
        addresses = [address for row in content["samples"]["rows"] for address in row["pictures"].values()]
        answers = [ask(server, f"/{address}") for address in addresses]

        state = write_more(tmp_path)
        assert json.loads(ask(server, "/content.json")[1])["step"] == state.step == 61

    assert "connect-src 'self'" in page and content["step"] == 60 and "data:image" not in json.dumps(content)
    assert len(answers) == 16 and all(status == 200 and data[8:12] == b"WEBP" for status, data in answers)


def write_more(folder):
    state = load(folder)
    state.figures(61, {"train_loss": 1.0})
    save(folder, state)
    return state


def test_pictures_that_are_being_made_are_shown_while_they_are_new(tmp_path):
    save(tmp_path, write_output(tmp_path))
    (tmp_path / "previews").mkdir()
    for name in ("sea", "old"):
        write_picture(tmp_path / f"previews/{name}.jpg", Image.new("RGB", (8, 8)), {"prompt": f"{name} <b>", "sampling_step": "4"})
    os.utime(tmp_path / "previews/old.jpg", (1, 1))
    with serving(tmp_path) as server:
        (shown,) = json.loads(ask(server, "/content.json")[1])["previews"]

        assert (shown["prompt"], shown["sampling_step"]) == ("sea <b>", "4")
        assert ask(server, f"/{shown['address']}")[1][:2] == b"\xff\xd8"


@NEEDS_BROWSER
def test_a_page_that_is_renewed_keeps_the_sliders_place(tmp_path):
    from playwright.sync_api import sync_playwright

    save(tmp_path, write_output(tmp_path))
    said: list[str] = []
    with serving(tmp_path) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(server.url)
        tab.locator("#step").focus()
        tab.keyboard.press("Home")
        for stem in STEMS:
            write_picture(tmp_path / f"validation_images/step_00080_{stem}.png", Image.new("RGB", (32, 32)), {"prompt": "new"})
        write_more(tmp_path)

        tab.evaluate("listen()")

        assert tab.locator("#step").get_attribute("max") == "3" and tab.locator("output").inner_text() == "step 20"
        assert tab.locator("#step").evaluate("one => one === document.activeElement") and "step 61 of 60" in tab.locator("header").inner_text()
        tab.wait_for_function("[...document.images].every(one => one.complete && one.naturalWidth == 32)")
        browser.close()
    assert said == []


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/picture/../secret.txt",
        "/picture/..%2fsecret.txt",
        "/picture/secret.txt",
        "/preview/secret.txt",
        "/picture/",
        "/x",
    ],
)
def test_nothing_else_is_served(tmp_path, path):
    save(tmp_path, write_output(tmp_path))
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "validation_images/secret.txt").write_text("secret")
    with serving(tmp_path) as server:
        assert ask(server, path)[0] == 404
        assert ask(server, f"/picture/{quote(str(tmp_path / 'secret.txt'), safe='')}")[0] == 404


def test_a_name_that_leads_here_from_elsewhere_is_refused(tmp_path):
    save(tmp_path, write_output(tmp_path))
    with serving(tmp_path) as server:
        port = server.server_address[1]
        assert [ask(server, "/", host)[0] for host in (f"evil.example:{port}", f"localhost:{port}", "")] == [403, 200, 403]


def test_a_folder_without_a_run_and_a_port_that_is_taken_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no run in"):
        open_server(tmp_path, None)
    save(tmp_path, write_output(tmp_path))
    with serving(tmp_path) as server, pytest.raises(ConfigError, match="cannot be used"):
        open_server(tmp_path, server.server_address[1])
