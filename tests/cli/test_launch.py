"""Several processes of one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.cli.launch import is_launched, is_main_process, launch

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])


def test_each_process_has_its_rank_and_knows_the_others(tmp_path):
    code = "import os; open(os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))"

    assert launch([sys.executable, "-c", code], 2) == 0

    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 2 127.0.0.1", "1 2 127.0.0.1"]


def test_the_first_failure_ends_the_others_and_is_the_exit_code():
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    began = time.monotonic()

    assert launch([sys.executable, "-c", code], 2) == 3
    assert time.monotonic() - began < 20


REPORT = "import sys; from simpletuner.cli.failures import report; from simpletuner.errors import DatasetError;"


def test_what_all_processes_find_is_said_once(capfd):
    code = REPORT + "sys.exit(report(DatasetError('all find this', 'mend it'), debug=False))"

    assert launch([sys.executable, "-c", code], 3) == 3

    said = capfd.readouterr().err
    assert said.count("all find this") == said.count("mend it") == 1


def test_what_one_process_alone_finds_is_said(capfd):
    code = REPORT + "import os, time; sys.exit(report(DatasetError('one finds this'), debug=False) if os.environ['RANK'] == '1' else time.sleep(60))"

    assert launch([sys.executable, "-c", code], 2) == 3

    assert "one finds this" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_to_each_once(number, code, tmp_path):
    child = f"""
import os, signal, sys, time
count = []
signal.signal({int(number)}, lambda *_: count.append(1))
open("ready" + os.environ["RANK"], "w").close()
while not count: time.sleep(0.02)
time.sleep(0.5)
sys.exit({code} if len(count) == 1 else 1)
"""
    parent = f"import sys; from simpletuner.cli.launch import launch; sys.exit(launch([sys.executable, '-c', {child!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": PATHS})
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process.send_signal(number)

    assert process.wait(30) == code


def test_a_launched_process_launches_no_more():
    assert is_launched({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_launched({})


def test_the_first_rank_speaks():
    assert is_main_process({})
    assert is_main_process({"RANK": "0"})
    assert not is_main_process({"RANK": "1"})


@pytest.mark.slow
def test_accelerate_sees_the_processes(tmp_path):
    code = "from accelerate import Accelerator; a = Accelerator(); open(f'seen{a.process_index}', 'w').write(str(a.num_processes))"

    assert launch([sys.executable, "-W", "ignore", "-c", code], 2) == 0

    assert [(tmp_path / f"seen{rank}").read_text() for rank in "01"] == ["2", "2"]
