"""The page: self-contained, bounded, escaped; and, where there is a browser, without errors in it."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.doctor.page import CARDS, THUMBNAILS, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "海辺 <b>bold</b> & \"quotes\" 'single' </script><script>document.title = 'taken over'</script> <!-- {{report}} \u2028"
TEXTS = {"id": "set", "instance_data_dir": "images", "caption_strategy": "textfile"}


def content_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def nasty(draw, workplace):
    """Five images of two buckets, one of them cut, with a caption full of markup."""
    for number in range(4):
        draw(f"images/{number}.png", 96, 64, seed=number)
        (workplace / f"images/{number}.txt").write_text(NASTY if number == 1 else f"picture {number}", encoding="utf-8")
    draw("images/<img src=x onerror=alert(1)>.jpg", 64, 200, seed=8)
    (workplace / "images/<img src=x onerror=alert(1)>.txt").write_text("a file name", encoding="utf-8")


def test_everything_is_inside_and_nothing_is_markup(nasty, check, console):
    text = page(check(TEXTS), console)

    tags = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Reader().feed(text)
    names = [tag for tag, _ in tags]
    assert names.count("script") == 2 and "img" not in names and "b" not in names
    assert not [attributes for tag, attributes in tags if "src" in attributes or attributes.get("href", "data:")[:5] != "data:"]
    assert not re.findall(r"https?://", text)
    images = {image["file"]: image for image in content_of(text)["datasets"][0]["images"]}
    assert images["1.png"]["captions"] == [NASTY.split("\u2028")[0].strip()]
    assert set(images) == {"0.png", "1.png", "2.png", "3.png", "<img src=x onerror=alert(1)>.jpg"}
    assert all("thumbnail" in image for image in images.values())


def test_thousands_of_images_make_a_page_of_bounded_size(workplace, check, console):
    (workplace / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (5000, 2, 6, 3), dtype=np.uint8)
    big = np.random.default_rng(1).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    for number in range(5000):
        # Every tenth is large noise, which is what compresses worst.
        image = Image.fromarray(np.roll(big, number, 0)) if number % 10 == 0 else Image.fromarray(noise[number]).resize((24 + number % 7, 16))
        image.save(workplace / f"images/{number:04d} {'words ' * 8}.jpg", quality=95)

    text = page(check({"id": "set", "instance_data_dir": "images"}), console)

    shown = content_of(text)["datasets"][0]["images"]
    assert sum("thumbnail" in image for image in shown) == THUMBNAILS
    assert len(shown) <= CARDS
    assert len(text.encode()) < 15_000_000
    assert {bucket["size"] for bucket in content_of(text)["datasets"][0]["buckets"]} == {image["bucket"] for image in shown}


def test_a_dataset_that_is_unusable_has_its_section_too(draw, check, console):
    draw("images/a.png")

    content = content_of(page(check(TEXTS | {"caption_strategy": "filename"}, {"id": "gone", "instance_data_dir": "nowhere"}), console))

    assert [(one["id"], bool(one["error"])) for one in content["datasets"]] == [("set", False), ("gone", True)]
    assert content["usable"] is False


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs chromium and playwright, which are not installed"
)
def test_a_browser_shows_it_without_errors_and_filters_it(nasty, check, console, workplace):
    from playwright.sync_api import sync_playwright

    path = Path(workplace / "check.html")
    path.write_text(page(check(TEXTS), console), encoding="utf-8")
    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())

        assert tab.title() == "Dataset check"
        assert tab.locator(".card").count() == 5
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        picture, crop = (tab.locator(selector).first.bounding_box() for selector in (".view", ".crop"))
        assert crop["width"] <= picture["width"] + 1 and crop["height"] <= picture["height"] + 1
        tab.locator(".chips button", has_text="extreme aspect").click()
        assert tab.locator(".card:visible").count() == 1
        tab.locator(".chips button", has_text="all images").click()
        tab.locator(".card", has_text="1.png").click()
        assert "</script><script>" in tab.locator("dialog").inner_text()
        browser.close()
    assert said == []
    assert [address for address in asked if not address.startswith(("data:", "file:"))] == []
