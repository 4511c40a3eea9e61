"""`simpletuner options`."""

from __future__ import annotations

import json
from pathlib import Path

from simpletuner.cli.main import main
from simpletuner.options.train_config import declared

PAGE = Path(__file__).parents[3] / "docs" / "options.md"


def test_all_options_are_listed(capsys):
    assert main(["options"]) == 0

    shown = capsys.readouterr().out
    assert all(f"--{key}:" in shown for key in declared())


def test_a_search_finds_names_helps_older_spellings_and_values(capsys):
    for word, key in (("rank", "--lora_rank"), ("guidance", "--caption_dropout_probability"), ("save-total", "--checkpoints_total_limit")):
        assert main(["options", word]) == 0
        assert key in capsys.readouterr().out
    assert main(["options", "lion", "bitsandbytes"]) == 0
    assert "bnb-lion" in capsys.readouterr().out


def test_a_search_for_nothing_known_offers_the_nearest(capsys):
    assert main(["options", "lerning_rate"]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_the_schema_is_json_with_every_option_and_family(capsys):
    assert main(["options", "--schema"]) == 0

    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == declared().keys()
    assert "auraflow" in schema["properties"]["model_family"]["examples"]


def test_the_committed_reference_is_what_the_declarations_say(capsys):
    assert main(["options", "--markdown"]) == 0

    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "run: simpletuner options --markdown > docs/options.md"
