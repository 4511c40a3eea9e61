from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.training.checkpoint import MANIFEST, CheckpointFolder


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path, said: list[str]) -> CheckpointFolder:
    return CheckpointFolder(tmp_path, limit=2, warn=said.append)


def write_weights(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.bin").write_bytes(b"m" * 10)


def test_a_saved_checkpoint_is_found_and_verifies(folder):
    folder.save(10, write_weights)

    latest = folder.latest()

    assert latest is not None and latest.step == 10 and latest.problem() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights.bin").write_bytes(b"w" * 999 + b"x"),
        lambda path: (path / "weights.bin").write_bytes(b"w"),
        lambda path: (path / "deeper" / "more.bin").unlink(),
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / MANIFEST).write_text("{"),
    ],
    ids=["a changed byte", "cut short", "a file gone", "no manifest", "half a manifest"],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(folder, said, damage):
    folder.save(10, write_weights)
    damage(folder.save(20, write_weights).folder)

    latest = folder.latest()

    assert latest.step == 10
    assert len(said) == 1 and "checkpoint-20 is damaged" in said[0]


def test_the_oldest_beyond_the_limit_is_deleted_after_the_new_one_is_there(folder):
    for step in (10, 20, 30):
        folder.save(step, write_weights)

    assert [checkpoint.step for checkpoint in folder.all()] == [20, 30]


def test_a_failing_save_leaves_the_earlier_checkpoints_alone(folder, tmp_path):
    folder.save(10, write_weights)

    def fail(staged: Path) -> None:
        (staged / "weights.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        folder.save(20, fail)

    assert [checkpoint.step for checkpoint in folder.all()] == [10]
    assert folder.latest().step == 10


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_earlier_one(folder):
    folder.save(10, write_weights)
    (folder.save(30, write_weights).folder / "weights.bin").unlink()

    folder.save(20, write_weights)

    assert {checkpoint.step for checkpoint in folder.all() if checkpoint.problem() is None} == {10, 20}


def test_going_on_from_an_earlier_step_moves_later_checkpoints_aside(folder, tmp_path):
    folder.save(10, write_weights)
    folder.save(20, write_weights)

    aside = folder.supersede(10)

    assert [checkpoint.step for checkpoint in folder.all()] == [10]
    assert (aside / "checkpoint-20" / "weights.bin").is_file()
    assert folder.supersede(10) is None


def test_a_process_killed_while_saving_never_leaves_a_folder_that_looks_whole(tmp_path):
    code = f"""
import os
from pathlib import Path
from simpletuner.training.checkpoint import CheckpointFolder
def write(folder):
    for number in range(20):
        (folder / f"{{number}}.bin").write_bytes(os.urandom(200_000))
folder = CheckpointFolder(Path({str(tmp_path)!r}), limit=2, warn=print)
print("ready", flush=True)
step = 0
while True:
    step += 1
    folder.save(step, write)
"""
    for delay_seconds in (0.01, 0.05, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        process.stdout.readline()
        time.sleep(delay_seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

        whole = CheckpointFolder(tmp_path, limit=2, warn=pytest.fail).all()

        assert all(checkpoint.problem() is None for checkpoint in whole)
        assert len(whole) <= 3
