"""Finding a command, and what a command line answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner import __version__
from simpletuner.cli.main import load, main, names

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
HELP_SECONDS = 0.3


def simpletuner(*words, code=None):
    """Run a command line in a process of its own."""
    call = ["-c", code] if code else ["-m", "simpletuner"]
    return subprocess.run(
        [sys.executable, *call, *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    )


def test_help_names_every_command_and_takes_a_fraction_of_a_second():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = simpletuner("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in names())
    assert min(seconds) < HELP_SECONDS


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], {"torch", "pydantic", "rich", "diffusers"}),
        (["train", "--help"], {"torch", "rich", "diffusers"}),
        (["options", "--schema"], {"torch", "diffusers", "transformers", "accelerate"}),
        (["train", "--dry-run"], {"torch", "diffusers", "transformers", "accelerate", "peft", "lycoris"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_nothing_heavy_is_imported_before_it_is_needed(words, heavy, write_config):
    write_config()
    code = f"import sys; from simpletuner.cli.main import main; code = main({words!r}); print(code, sorted({heavy!r} & sys.modules.keys()))"

    result = simpletuner(code=code)

    assert result.stdout.splitlines()[-1] == "0 []", result.stdout + result.stderr


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"simpletuner {__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", names())
def test_every_command_has_a_line_of_help_and_an_example_of_itself(name, capsys):
    assert main([name, "--help"]) == 0

    shown = capsys.readouterr().out
    assert load(name).help in shown
    assert load(name).example in shown
    assert load(name).example.startswith(f"simpletuner {name}")


def test_an_unknown_command_offers_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_an_unknown_flag_is_answered_in_two_lines_with_the_nearest(capsys):
    assert main(["train", "--lerning_rate", "1e-4"]) == 2

    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["error: there is no flag --lerning_rate", "  hint: Did you mean --learning_rate?"]
    assert shown.out == ""


def test_a_command_without_options_refuses_other_flags(capsys):
    assert main(["examples", "--dset"]) == 2
    assert "--dest" in capsys.readouterr().err


def test_a_flag_without_its_value_is_refused(capsys):
    assert main(["train", "--config"]) == 2
    assert "--config" in capsys.readouterr().err


def test_a_reader_that_leaves_early_gets_no_complaint():
    process = subprocess.Popen(
        [sys.executable, "-m", "simpletuner", "options"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    )
    process.stdout.close()

    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_exit_codes_reach_the_shell(write_config):
    config = write_config()
    (config.parent.parent / "pictures").rmdir()

    missing_data = simpletuner("train", "--dry-run")
    config.write_text(json.dumps({"model_family": "auraflow", "seed": "x"}))
    wrong_option = simpletuner("train", "--dry-run")
    config.write_text('{\n  "seed": 1\n  "resolution": 2\n}')
    wrong_json = simpletuner("train", "--dry-run")
    config.unlink()
    no_config = simpletuner("train")

    results = (missing_data, wrong_option, wrong_json, no_config)
    assert [result.returncode for result in results] == [3, 2, 2, 2]
    assert all("hint:" in result.stderr and "Traceback" not in result.stderr for result in results)
    assert "line 3, column 3" in wrong_json.stderr
    assert "--example" in no_config.stderr


def test_debug_shows_the_traceback():
    result = simpletuner("train", "--debug")

    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "no config found" in result.stderr
