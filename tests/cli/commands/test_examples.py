"""`simpletuner examples`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.cli import locate
from simpletuner.cli.main import main


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    folder = tmp_path / "package" / "tiny"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# tiny\n\nA small one.\nMore of it.\n")
    (folder / "config.json").write_text(json.dumps({"model_family": "auraflow", "data_backend_config": "{example}/datasets.json"}))
    datasets = [{"id": "pictures", "type": "local", "instance_data_dir": "{example}/pictures", "caption_strategy": "filename"}]
    (folder / "datasets.json").write_text(json.dumps(datasets))
    (folder / "pictures").mkdir()
    (folder / "pictures" / "one.png").write_bytes(b"\x89PNG {example}")
    monkeypatch.setattr(locate, "EXAMPLES", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_they_are_listed_with_the_first_line_of_their_readme(capsys):
    assert main(["examples"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ["tiny", "A small one.\n"]


def test_a_copy_names_itself_and_can_be_trained_at_once(capsys):
    assert main(["examples", "copy", "tiny"]) == 0

    assert json.loads(Path("config/tiny/config.json").read_text())["data_backend_config"] == "config/tiny/datasets.json"
    assert Path("config/tiny/pictures/one.png").read_bytes() == b"\x89PNG {example}"
    assert main(["train", "--env", "tiny", "--dry-run"]) == 0
    assert "config/tiny/pictures" in capsys.readouterr().out


def test_an_example_is_read_from_the_package_without_copying(capsys):
    assert main(["train", "--example", "tiny", "--dry-run"]) == 0

    shown = capsys.readouterr().out
    assert "package/tiny/pictures" in shown
    assert "example tiny" in shown
    assert list(Path().iterdir()) == []


def test_a_copy_does_not_overwrite(capsys):
    Path("here").mkdir()
    Path("here/mine.txt").write_text("mine")

    assert main(["examples", "copy", "tiny", "--dest", "here"]) == 2
    assert "here" in capsys.readouterr().err
    assert [path.name for path in Path("here").iterdir()] == ["mine.txt"]


def test_an_unknown_name_lists_what_there_is(capsys):
    assert main(["examples", "copy", "tinny"]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err
    assert main(["examples", "copy"]) == 2
    assert "Known examples: tiny" in capsys.readouterr().err
