"""The page: self-contained, bounded, escaped; and, where there is a browser, without errors in it."""

from __future__ import annotations

import html.parser
import json
import math
import re

from PIL import Image

from simpletuner.reporting.report import page as paging
from simpletuner.reporting.report.page import MOST_BYTES, Pictures, as_html, content_of, write_page
from tests.builders.report import CHROMIUM, NASTY, NEEDS_BROWSER, STEMS, content_in, write_output


def test_everything_is_inside_and_nothing_is_markup(tmp_path):
    state = write_output(tmp_path)

    write_page(tmp_path, state, Pictures(tmp_path))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Reader().feed(text)
    names = [tag for tag, _ in tags]
    assert names.count("script") == 2 and "img" not in names and "b" not in names
    assert not [attributes for _, attributes in tags if "src" in attributes or attributes.get("href", "data:")[:5] != "data:"]
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    content = content_in(text)
    assert content["samples"]["labels"] == {"base": -1, "step_00020": 20, "step_00040": 40, "step_00060": 60}
    rows = {row["stem"]: row for row in content["samples"]["rows"]}
    assert rows.keys() == STEMS.keys() and all(len(row["pictures"]) == 4 for row in rows.values())
    assert rows["sea_7_48x32"]["said"]["prompt"] == NASTY
    assert content["best"] == {"step": 40, "value": 1.0, "metric": "loss", "is_saved": True, "saved": 40, "last": 60}
    assert content["changes"] == [{"key": "learning_rate", "before": "0.0003", "now": "0.0001"}]
    assert [row["key"] for row in content["settings"]] == ["learning_rate", "validation_prompt", "seed"]


def test_what_to_do_next_names_the_best_checkpoint_and_what_is_wrong(tmp_path):
    state = write_output(tmp_path)

    advice = content_of(tmp_path, state, Pictures(tmp_path))["advice"]

    assert "simpletuner generate --adapter output/checkpoint-40" in [one["command"] for one in advice]
    said = " ".join(one["text"] for one in advice)
    assert "max_grad_norm" in said and "overfits" not in said  # one evaluation after the best tells nothing yet
    more = {"step": 80, "loss/val/held": 1.9, "clip/mean": math.inf}
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n" + '{"step": 1')
    content = content_of(tmp_path, state, Pictures(tmp_path))
    assert "overfits" in " ".join(one["text"] for one in content["advice"]) and "clip/mean" not in content["evaluations"][-1]


def test_a_page_of_many_pictures_is_bounded_and_keeps_the_first_the_best_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(paging, "MOST_BYTES", 60_000)
    state = write_output(tmp_path, stems={"a_1_96x96": "a", "b_1_96x96": "b"}, steps=tuple(range(10, 130, 10)), px=96)

    content = content_of(tmp_path, state, Pictures(tmp_path))

    labels = list(content["samples"]["labels"])
    assert {"base", "step_00010", "step_00040", "step_00120"} <= set(labels) and content["samples"]["left_out"]
    assert len(json.dumps(content["samples"])) < 60_000 * 4 / 3 + 5_000 or len(labels) <= 4
    assert len(content["samples"]["left_out"]) + len(labels) == 13 and MOST_BYTES * 4 / 3 <= 8_000_000


def test_a_picture_that_is_damaged_is_left_out(tmp_path):
    state = write_output(tmp_path)
    (tmp_path / "validation_images/step_00060_dog_7_32x32.png").write_bytes(b"no picture")

    rows = content_of(tmp_path, state, Pictures(tmp_path))["samples"]["rows"]

    assert {row["stem"]: len(row["pictures"]) for row in rows}["dog_7_32x32"] == 3


@NEEDS_BROWSER
def test_a_browser_shows_it_in_light_and_dark_and_on_a_phone_and_its_slider_moves(tmp_path):
    from playwright.sync_api import sync_playwright

    state = write_output(tmp_path)
    write_page(tmp_path, state, Pictures(tmp_path))
    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"])
        grounds = []
        for scheme, width in (("light", 1280), ("dark", 360)):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto((tmp_path / "report.html").as_uri())

            assert tab.title().startswith("海辺 <b>bold</b>") and tab.title().endswith("100 %")
            assert tab.locator(".chart svg").count() >= 8
            tab.wait_for_function("[...document.images].every(one => one.complete)")
            assert tab.evaluate("[...document.images].length") == 8 and tab.evaluate("[...document.images].every(one => one.naturalWidth == 32)")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert tab.locator("output").inner_text() == "step 60"
            shown = tab.locator(".sample img").nth(1).get_attribute("src")
            tab.locator("#step").focus()
            tab.keyboard.press("ArrowLeft")
            assert tab.locator("output").inner_text() == "step 40 ★ best"
            assert tab.locator(".sample img").nth(1).get_attribute("src") != shown
            tab.locator(".peek input").first.focus()
            tab.keyboard.press("Home")
            assert tab.locator(".peek img").nth(1).evaluate("one => one.style.clipPath").endswith(" 0%)")
            tab.get_by_role("button", name="side by side").click()
            assert tab.locator(".beside").count() == 4
            tab.locator("summary").last.click()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.close()
        browser.close()
    assert said == [] and len(set(grounds)) == 2
    assert [address for address in asked if not address.startswith(("data:", "file:"))] == []


@NEEDS_BROWSER
def test_a_browser_shows_a_comparison(tmp_path):
    from playwright.sync_api import sync_playwright

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    source = paging.as_uri(paging.small(tmp_path / "a.png"))
    columns = [{"name": "base", "is_best": False}, {"name": "checkpoint-3", "is_best": True}]
    prompts = [{"text": NASTY, "seed": "7", "size": "8x8", "pictures": {"base": source, "checkpoint-3 1": source}}]
    head = {"title": NASTY, "about": NASTY, "best": "best", "notes": [NASTY], "strengths": ["0.5", "1"]}
    (tmp_path / "compare.html").write_text(as_html("compare", {**head, "columns": columns, "prompts": prompts}), encoding="utf-8")
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 360, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto((tmp_path / "compare.html").as_uri())

        assert tab.locator("td img").count() == 2 and tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.locator("td img").nth(1).click()
        assert "</script><script>" in tab.locator("dialog").inner_text()
        browser.close()
    assert said == []
