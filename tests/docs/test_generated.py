"""The pages that are written from the source are as the source would write them now, and as long as they may be."""

from __future__ import annotations

import error_index
import pytest
import quickstarts

from simpletuner.cli.choices import family_of, known_names

FAMILIES = known_names()["family"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quickstart_is_up_to_date_and_short(family):
    kept = (quickstarts.PAGES / f"{family}.md").read_text(encoding="utf-8")

    assert kept == quickstarts.page(family, family_of(family)), "python tests/docs/quickstarts.py writes them anew"
    assert kept.count("\n") < 80


def test_there_is_a_quickstart_for_every_family_and_no_other():
    assert sorted(path.stem for path in quickstarts.PAGES.glob("*.md")) == sorted(FAMILIES)
    assert set(quickstarts.TITLES) == set(quickstarts.PITFALLS) == set(FAMILIES)


def test_the_error_index_is_up_to_date():
    assert error_index.PAGE.read_text(encoding="utf-8") == error_index.page(error_index.entries()), "python tests/docs/error_index.py writes it anew"


def test_the_error_index_has_every_exit_code_and_says_what_to_do():
    lines = [line for line in error_index.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]

    assert len(lines) > 250
    assert all(f"\n## {title}\n\n### " in error_index.PAGE.read_text(encoding="utf-8") for title in error_index.TITLES.values())
    assert sum("<br>" in line for line in lines) > 200


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ('ConfigError(f"{path} is {what!r}", hint="Do it.")', "<path> is '<what>'", "Do it."),
        ("ConfigError(f\"no {', '.join(sorted(names))}\" + more)", "no <names><more>", ""),
        (
            "ConfigError(f\"{len(wrong)} are{' not' if x else ''} here\", choose(a, b, \"c\"))",
            "<number of wrong> are[ not] here",
            "<the nearest, and all there are>",
        ),
        ('HINT = "Go on."\nDatasetError(f"a {self.source_name()}", HINT)', "a <source name>", "Go on."),
        ('Problem(("a", "b"), f"{a} and b")', "<a> and b", ""),
    ],
)
def test_a_message_is_read_with_its_placeholders(source, message, hint):
    assert [found[1:] for found in error_index.raised(error_index.ast.parse(source))] == [(message, hint)]
