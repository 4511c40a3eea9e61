"""`simpletuner configure`: driven with keys, with plain lines, and with nobody to answer."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from simpletuner.cli.commands import configure
from simpletuner.cli.main import main
from simpletuner.cli.wizard.drafts import NAME as DRAFT
from simpletuner.cli.wizard.terminal import Terminal
from tests.builders.run import ROOT, add_pictures, tiny_model

SMALL = ["--model_family", "auraflow", "--pretrained_model_name_or_path", "model", "--tokenizer_max_length", "24", "--max_train_steps", "2"]
UP, DOWN, LEFT, RIGHT, ENTER, SHIFT_TAB, CLEAR, STOP = "\x1b[A", "\x1b[B", "\x1b[D", "\x1b[C", "\r", "\x1b[Z", "\x15", "\x03"


@pytest.fixture
def place(tmp_path):
    """A folder with a model that is small, and pictures named cats."""
    shutil.copytree(tiny_model(), tmp_path / "model")
    add_pictures(tmp_path / "cats", 6)
    for path in sorted((tmp_path / "cats").glob("*.png")):
        path.with_suffix(".txt").write_text(f"a tabby cat, number {path.stem[-1]}")
    return tmp_path


@pytest.fixture
def press(monkeypatch):
    """Run the command at a terminal at which keys are pressed."""
    monkeypatch.setattr(configure, "choose_asker", lambda takes_all, console: Terminal(console))
    monkeypatch.setattr(Terminal, "quiet_seconds", 30.0)

    def run(keys, *arguments):
        with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
            typed.send_text(keys + STOP * 9)  # which end what the keys did not
            return main(["configure", "--card", "none", *arguments])

    return run


def read(path):
    return json.loads(path.read_text())


def test_all_proposals_make_a_config_that_trains(place, capsys):
    assert main(["configure", "--defaults", "--pictures", "cats", "--card", "none", *SMALL, "--validation_num_inference_steps", "2"]) == 0
    assert "simpletuner train --config config/cats/config.json" in capsys.readouterr().out

    config = read(place / "config/cats/config.json")
    assert (config["resolution"], config["mixed_precision"], config["validation_prompt"]) == (40, "no", "a tabby cat, number 0")
    assert set(read(place / config["user_prompt_library"]).values()) < {f"a tabby cat, number {number}" for number in range(6)}
    pictures, text = read(place / config["data_backend_config"])
    assert (pictures["instance_data_dir"], pictures["caption_strategy"], text["dataset_type"]) == ("cats", "textfile", "text_embeds")
    assert not (place / "config" / DRAFT).exists()
    assert main(["train", "--config", "config/cats/config.json"]) == 0
    assert (place / "output/cats/pytorch_lora_weights.safetensors").is_file()


def test_this_machine_is_looked_at_where_no_card_is_named(place, capsys):
    assert main(["configure", "--defaults", "--no-plan", "--pictures", "cats", *SMALL]) == 0

    assert "this machine: " in capsys.readouterr().out and (place / "config/cats/config.json").is_file()


def test_a_folder_of_which_no_picture_can_be_used_makes_no_config(place, capsys):
    for path in (place / "cats").glob("*.png"):
        path.write_bytes(b"broken")

    assert main(["configure", "--defaults", "--pictures", "cats", "--card", "none", *SMALL]) == 3

    said = capsys.readouterr()
    assert "! no picture in cats can be used (6 " in said.out and "nothing was written" in said.err and not (place / "config").exists()


@pytest.mark.slow
def test_for_a_card_the_memory_is_planned_and_what_does_not_fit_is_made_to(place, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    assert main(["configure", "--yes", "--pictures", "cats", "--card", "24GB", *SMALL]) == 0
    assert "memory plan: fits" in capsys.readouterr().out

    assert main(["configure", "--yes", "--pictures", "cats", "--card", "550MB", *SMALL, "--mixed_precision", "no"]) == 0
    said = capsys.readouterr().out
    assert "nothing that is known here makes it fit" in said and "memory plan: DOES NOT FIT" in said


def test_a_lokr_gets_its_file(place):
    assert main(["configure", "--defaults", "--pictures", "cats", "--card", "none", *SMALL, "--lora_type", "lycoris", "--output", "here"]) == 0

    assert read(place / "here/config.json")["lycoris_config"] == "here/lycoris_config.json"
    assert read(place / "here/lycoris_config.json")["apply_preset"]["module_algo_map"]["FeedForward"] == {"factor": 8}
    assert main(["train", "--dry-run", "--config", "here"]) == 0


def test_keys_answer_go_back_explain_and_change_a_page(place, press, capsys):
    keys = f"cats{ENTER}?{SHIFT_TAB}{ENTER}{CLEAR}tabby{ENTER}"  # help at the name, back to the folder, and forth
    keys += f"{ENTER}{ENTER}{LEFT}{ENTER}{DOWN}?{ENTER}"  # captions, lora, back, lora, lycoris after its help
    keys += f"{DOWN}{ENTER}{CLEAR}4{ENTER}{UP}{ENTER}"  # factor 4 on the page
    keys += ENTER * 4

    assert press(keys, *SMALL) == 0

    assert read(place / "config/tabby/lycoris_config.json")["factor"] == 4
    assert read(place / "config/tabby/config.json")["lora_type"] == "lycoris"
    assert "✓ What shall this training be called?  tabby" in capsys.readouterr().out


def test_typing_replaces_what_is_proposed_and_an_arrow_edits_it(place, press):
    rest = ENTER * 8

    assert press(f"cats{ENTER}??tabby{ENTER}{rest}", *SMALL) == 0
    assert press(f"cats{ENTER}{RIGHT}2{ENTER}{rest}", *SMALL) == 0

    assert sorted(path.name for path in (place / "config").iterdir()) == ["cats2", "tabby"]


def test_ctrl_c_keeps_the_answers_and_the_next_start_takes_them_up(place, press, capsys):
    assert press(f"cats{ENTER}{CLEAR}striped{ENTER}{ENTER}{STOP}", *SMALL) == 130
    assert "the answers are kept in config" in " ".join(capsys.readouterr().out.split())
    assert read(place / "config" / DRAFT)["answers"] == {"pictures": "cats", "name": "striped", "caption_strategy": "textfile"}

    assert press(f"{ENTER}{ENTER * 8}", *SMALL) == 0

    assert (place / "config/striped/config.json").is_file() and not (place / "config" / DRAFT).exists()


def test_a_wrong_answer_is_refused_where_it_is_typed(place, press):
    keys = f"nowhere{ENTER}{CLEAR}cats{ENTER}{ENTER}{ENTER}{ENTER}{ENTER}{ENTER}"
    keys += f"{DOWN}{ENTER}{CLEAR}minus{ENTER}{CLEAR} 32 {ENTER}{UP}{ENTER}{ENTER * 3}"

    assert press(keys, *SMALL) == 0

    assert read(place / "config/cats/config.json")["resolution"] == 32


EXISTING = """\
{
    // My own words stay.
    "--model_family": "auraflow", "pretrained_model_name_or_path": "model",
    "tokenizer_max_length": 24,
    "use_gradient_checkpointing": false, // an old name
    "mixed_precision": "no",
    "resolution": 40,
    "max_train_steps": 50,
    "learning_rate": 3e-4, /* tried */
    "data_backend_config": "mine/data.json",
}
"""


@pytest.fixture
def mine(place):
    (place / "mine").mkdir()
    (place / "mine/config.json").write_text(EXISTING)
    (place / "mine/data.json").write_text(
        '[\n  {"id": "a", "type": "local", "instance_data_dir": "cats", "caption_strategy": "textfile", "repeats": 3}\n]\n'
    )
    return place / "mine"


def test_editing_without_a_change_changes_nothing(mine, press):
    assert press(ENTER * 20, "--edit", "mine") == 0

    assert (mine / "config.json").read_text() == EXISTING
    assert [path.name for path in sorted(mine.iterdir())] == ["config.json", "data.json"]


def test_editing_shows_the_difference_and_keeps_comments_and_unknown_keys(mine, press, capsys):
    to_learning = ENTER * 9
    keys = f"{to_learning}{DOWN}{DOWN}{ENTER}{CLEAR}2e-4{ENTER}{UP}{UP}{ENTER}{ENTER}{ENTER}"

    assert press(keys, "--edit", "mine/config.json") == 0

    said = capsys.readouterr().out
    assert '-    "learning_rate": 3e-4, /* tried */' in said and '+    "learning_rate": 0.0002, /* tried */' in said
    assert (mine / "config.json").read_text() == EXISTING.replace("3e-4", "0.0002")


def test_editing_to_a_lokr_adds_its_file(mine):
    assert main(["configure", "--edit", "mine", "--yes", "--lora_type", "lycoris", "--card", "none"]) == 0

    assert '"lycoris_config": "mine/lycoris_config.json"' in (mine / "config.json").read_text()
    assert main(["train", "--dry-run", "--config", "mine"]) == 0


def test_files_that_are_there_are_not_changed_unasked(mine, capsys):
    assert main(["configure", "--defaults", "--pictures", "cats", "--card", "none", *SMALL, "--output", "mine"]) == 2

    assert "mine/config.json would be changed" in capsys.readouterr().err
    assert (mine / "config.json").read_text() == EXISTING


def test_what_a_run_would_refuse_is_not_written_unasked(place, capsys):
    wrong = ["--model_type", "full", "--base_model_precision", "int8-quanto", "--optimizer", "adamm"]

    assert main(["configure", "--defaults", "--pictures", "cats", "--card", "none", *SMALL, *wrong]) == 2

    said = capsys.readouterr().err
    assert "nothing was written" in said and "quantised weights cannot be trained" in said and "adamm" in said
    assert not (place / "config").exists()


def test_without_a_terminal_questions_are_plain_lines(place, monkeypatch, capsys):
    lines = ["", "cats", "?", "<", "", "mine", "9", "2", *[""] * 7]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))

    assert main(["configure", "--card", "none", *SMALL]) == 0

    said = capsys.readouterr().out
    assert "The files go into a folder of this name" in said and "Known answers" in said and "textfile  a .txt file" in said
    assert (place / "config/mine/config.json").is_file()


def test_an_input_that_ends_says_what_to_do_and_keeps_the_answers(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("cats\n"))

    assert main(["configure", "--card", "none", *SMALL]) == 2

    assert "--defaults" in capsys.readouterr().err
    assert read(place / "config" / DRAFT)["answers"] == {"pictures": "cats"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pictures", "nowhere"], "folder nowhere does not exist"),
        (["--card", "big"], "'big' is no size"),
        (["--card", "12"], "--card: "),
        (["--resolution", "large"], "'large' is not a number"),
        (["--learning_rat", "1"], "--learning_rate"),
        (["--edit", "nowhere"], "no config found"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_at_once(place, arguments, said, capsys):
    assert main(["configure", "--defaults", "--card", "none", *arguments]) == 2

    assert said in capsys.readouterr().err


def test_a_real_terminal_of_80_by_24_shows_a_question_within_it_and_stops_at_ctrl_c(place):
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm-256color", COLUMNS="80", LINES="24", PYTHONIOENCODING="utf-8")
        os.execv(sys.executable, [sys.executable, "-m", "simpletuner", "configure", "--card", "none"])
    try:
        seen = wait_for(terminal, "your pictures?")
        os.write(terminal, b"cats\r")
        seen += wait_for(terminal, "be called?")
        os.write(terminal, b"?")
        seen += wait_for(terminal, "The files go into a folder")
        os.write(terminal, STOP.encode())
        seen += wait_for(terminal, "nothing was written")
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(terminal)

    assert os.waitstatus_to_exitcode(status) == 130
    assert "6 pictures, from 40x40" in seen
    assert read(place / "config" / DRAFT)["answers"] == {"pictures": "cats"}


def wait_for(terminal, words, seconds=60.0):
    """Read what is drawn until some words are; answers the question where the cursor is."""
    seen, end = "", time.monotonic() + seconds
    while words not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen):
        ready, _, _ = select.select([terminal], [], [], 0.2)
        assert time.monotonic() < end, seen
        if ready:
            new = os.read(terminal, 65536).decode("utf-8", "replace")
            if "\x1b[6n" in new:
                os.write(terminal, b"\x1b[5;1R")
            seen += new
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
