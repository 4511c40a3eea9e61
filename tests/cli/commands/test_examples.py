"""`simpletuner examples`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from simpletuner.cli import locate
from simpletuner.cli.main import main
from simpletuner.cli.recipes import rendering
from simpletuner.relaxed_json import load_relaxed

TABLE = locate.EXAMPLES / "cards.json"


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
    rendering.kept.cache_clear()
    yield
    rendering.kept.cache_clear()


@pytest.fixture
def real_table():
    shutil.copy(TABLE, locate.EXAMPLES)


def test_they_are_listed_with_the_first_line_of_their_readme(capsys):
    (locate.EXAMPLES / "cards.json").write_text("{}")

    assert main(["examples"]) == 0

    assert capsys.readouterr().out.splitlines()[1].replace("  ", " ").strip().endswith("see its README see its README A small one.")


def test_those_for_released_models_are_listed_with_their_card_and_download(capsys, real_table):
    assert main(["examples", "list"]) == 0

    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sdxl-lora "))
    assert row.split()[1:7] == ["sdxl", "LoRA", "from", "8", "GB", "7"]


def test_one_for_a_released_model_is_written_for_a_card(capsys, real_table):
    assert main(["examples", "copy", "flux-lora", "mine", "--card", "8GB"]) == 0

    assert sorted(path.name for path in Path("mine").iterdir()) == ["README.md", "config.json", "multidatabackend.json", "user_prompt_library.json"]
    settings = load_relaxed("mine/config.json")
    assert settings["blocks_to_swap"] > 0
    assert settings["data_backend_config"] == "mine/multidatabackend.json"
    assert main(["examples", "copy", "flux-lora", "mine"]) == 2


def test_a_run_says_what_it_needs_before_it_misses_the_pictures(capsys, real_table):
    assert main(["examples", "run", "sdxl-subject", "--max_train_steps", "5"]) == 3

    shown = capsys.readouterr()
    assert "stabilityai/stable-diffusion-xl-base-1.0, about 7 GB" in shown.out
    assert "datasets/my-subject and datasets/dogs are not there" in shown.err
    assert list(Path().iterdir()) == []


def test_a_run_copies_once_and_trains_what_was_copied_then(capsys, real_table):
    Path("datasets/my-subject").mkdir(parents=True)

    assert main(["examples", "run", "sd1x-lora", "--dry-run"]) == 0
    config = Path("config/sd1x-lora/config.json")
    config.write_text(config.read_text().replace('"seed": 42', '"seed": 7'))
    assert main(["examples", "run", "sd1x-lora", "--dry-run", "--max_train_steps", "5"]) == 0

    again = capsys.readouterr().out.split("It needs")[2]
    assert "as it was copied before" in again
    assert "flag --max_train_steps" in again
    assert '"seed": 7' in config.read_text()
    assert main(["examples", "run", "sd1x-lora", "--dry-run", "--card", "8GB"]) == 2


def test_a_run_of_one_with_files_is_what_train_does(capsys):
    assert main(["examples", "run", "tiny", "--dry-run", "--seed", "7"]) == 0

    shown = capsys.readouterr().out
    assert "Options, from example tiny" in shown
    assert "flag --seed" in shown


def test_train_says_how_to_run_one_that_is_not_written_yet(capsys):
    assert main(["train", "--example", "sdxl-lora"]) == 2
    assert "simpletuner examples run sdxl-lora" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["copy", "tiny", "--card", "8GB"], ["list", "tiny", "folder"], ["copy", "tiny", "--steps", "5"], ["run"]])
def test_what_makes_no_sense_is_refused(words, capsys):
    assert main(["examples", *words]) == 2
    assert "hint: " in capsys.readouterr().err


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
    assert ", tiny" in capsys.readouterr().err
