"""The page of a model: what it says is what it was told, whatever the texts are."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from simpletuner.reporting.model_card import CARD_FILE, MARK, CardFacts, CardPicture, cell, front_matter, located, render, tidy, write_card

FACTS = CardFacts(
    title="portrait",
    family="auraflow",
    base_on_hub="fal/AuraFlow-v0.3",
    licence={"license": "apache-2.0"},
    is_adapter=True,
    what="a LoRA",
    progress="after 5 steps",
    pipeline_tag="text-to-image",
    tags=["text-to-image", "lora"],
    is_safe_for_work=True,
    triggers=["ohwx"],
    note="",
    pictures=[],
    snippet=f"import torch\n\npipeline.load_lora_weights('{MARK}')\nopen('{MARK}/weights.safetensors')\n",
    folder="output",
    generate=f"simpletuner generate prompt --adapter {MARK}",
    trained={"rank": "16"},
    settings={"seed": "7"},
    datasets=[{"dataset": "pictures", "pictures": "6"}],
    losses=[],
    versions={"Python": "3"},
)
ODD = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="ab|`\\<>&*_~[]()!$#-\n\r\t :\"'{}%é海\u2028\x85\x00", max_size=30),
    st.sampled_from(
        [
            "- a: b",
            "---",
            "```",
            "{{ 7 * 7 }}",
            "{% raw %}",
            "null",
            "yes",
            "1e3",
            "@x",
            "%y",
            "&amp;",
            "<script>alert(1)</script>",
            "\ud800x",
            "👩‍👩‍👧",
        ]
    ),
)


def shown(text: str) -> dict[str, object]:
    return {"picture": CardPicture(text, text, "32x32", None), "after": "card/1.jpg"}  # type: ignore[arg-type]


def split(page: str) -> tuple[dict, str]:
    head, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", page, re.DOTALL).groups()
    return yaml.safe_load(head), text


def cells(markdown: str) -> list[str]:
    """The cells of all tables, as a browser shows them."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return [html.unescape(re.sub(r"</?(?:br|sub)\s*/?>", "\n", found)) for found in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page, re.DOTALL)]


@settings(max_examples=150, deadline=None)
@given(ODD)
def test_a_cell_shows_any_text_as_it_is(text):
    assert cells(f"| head |\n| --- |\n| {cell(text)} | \n")[1:] == [tidy(text)]


@settings(max_examples=60, deadline=None)
@given(prompt=ODD.filter(lambda text: bool(tidy(text))), trigger=ODD.filter(lambda text: bool(tidy(text))), name=ODD)
def test_what_the_hub_reads_and_what_people_read_survive_any_text(prompt, trigger, name):
    facts = replace(FACTS, triggers=[trigger], trained={"layers": name, "after": "it"}, generate=f"simpletuner generate {tidy(prompt)}")

    told, text = split(render(facts, [shown(prompt)]))

    assert told["instance_prompt"] == tidy(trigger)
    assert told["widget"] == [{"text": tidy(prompt), "parameters": {"negative_prompt": tidy(prompt)}, "output": {"url": "card/1.jpg"}}]
    assert told == front_matter(facts, [shown(prompt)])
    found = cells(text)
    assert tidy(trigger) in found and found[found.index("layers") + 1] == tidy(name)
    assert found[-2:] == ["Python", "3"]  # nothing before it swallowed the rest of the page


def test_front_matter_says_what_is_known_and_no_more():
    told, _ = split(render(FACTS))
    unknown, page = split(render(replace(FACTS, base_on_hub=None, licence={}, triggers=[], is_safe_for_work=False)))

    assert (told["base_model"], told["base_model_relation"], told["license"]) == ("fal/AuraFlow-v0.3", "adapter", "apache-2.0")
    assert unknown == {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["text-to-image", "lora", "not-for-all-audiences"]}
    assert "its files did not say which" in page


def test_the_snippet_loads_from_the_folder_or_from_the_hub():
    page = render(FACTS)

    assert "folder = 'output'" in page and "load_lora_weights(folder)" in page and 'open(f"{folder}/weights.safetensors")' in page
    moved = located(located(page, "ada/one"), "ada/two")
    assert moved == page.replace(
        "folder = 'output'  # what was trained\n", "from huggingface_hub import snapshot_download\n\nfolder = snapshot_download('ada/two')\n"
    )


def test_backticks_in_a_prompt_do_not_end_the_code():
    facts = replace(FACTS, snippet="prompt='```\\n# heading'\n", note="```python\nfolder = 1\n```")

    tokens = [token for token in MarkdownIt().parse(split(render(facts))[1]) if token.type == "fence"]

    assert [token.info for token in tokens] == ["python", "python", "sh"]
    assert tokens[1].content.endswith("prompt='```\\n# heading'\n")


def test_pictures_are_small_copies_by_number_and_earlier_ones_go(tmp_path):
    for name, size in (("große 海", (2000, 1000)), ("base", (64, 64))):
        Image.new("RGBA", size, "red").save(tmp_path / f"{name}.png")
    (tmp_path / "cut off.png").write_bytes(b"\x89PNG")
    before = CardPicture("a", "", "x", tmp_path / "große 海.png", tmp_path / "base.png")
    write_card(tmp_path, replace(FACTS, pictures=[before, before]))

    page = write_card(tmp_path, replace(FACTS, pictures=[CardPicture("b", "", "x", tmp_path / "cut off.png"), before])).read_text()

    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == ["1-before.jpg", "1.jpg"]
    with Image.open(tmp_path / "card" / "1.jpg") as image:
        assert image.size == (768, 384)
    assert "![](card/1-before.jpg) | ![](card/1.jpg) |" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CARD_FILE, "base.png", "card", "cut off.png", "große 海.png"])
