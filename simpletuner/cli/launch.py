"""Train in several processes: the same command once for each, signals passed on, the first failure's exit code passed back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from simpletuner.cli.failures import FAILURES_VARIABLE, collect, say
from simpletuner.errors import ConfigError

GRACE_SECONDS = 30.0
"""How long the others may take to end when one has failed."""
POLL_SECONDS = 0.1


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether this process is already one of several, started here, by accelerate or by torchrun."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def is_main_process(environ: Mapping[str, str]) -> bool:
    return environ.get("RANK", "0") == "0"


def launch(command: Sequence[str], num_processes: int) -> int:
    """Run a command `num_processes` times, each with its rank in the environment, as accelerate and PyTorch expect it.

    Returns:
        0 if all ended well; otherwise the exit code of the first that did not.

    Raises:
        ConfigError: there are accelerators, but fewer.
    """
    with tempfile.TemporaryDirectory(prefix="simpletuner-") as failures:
        shared = {**_shared_environment(num_processes), FAILURES_VARIABLE: failures}
        code = _run([_start(command, rank, shared) for rank in range(num_processes)])
        for error in collect(Path(failures), code):
            say(error)
        return code


def _run(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for processes, passing signals on to them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shared_environment(num_processes: int) -> dict[str, str]:
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if 0 < devices < num_processes:
        raise ConfigError(f"num_processes is {num_processes}, and this machine has accelerators for {devices}", hint="Lower num_processes.")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # accelerate would otherwise take processes without a GPU for single ones.
    return found if devices else {**found, "ACCELERATE_USE_CPU": "true"}


def _start(command: Sequence[str], rank: int, shared: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # A session of its own: a terminal's Ctrl-C then reaches a process once, through us, and not twice.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, ask the others to end, and make them if they do not."""
    failed: int | None = None
    deadline = 0.0
    while True:
        codes = [process.poll() for process in processes]
        wrong = [code for code in codes if code]
        if failed is None and wrong:
            failed, deadline = wrong[0], time.monotonic() + GRACE_SECONDS
            for process in processes:
                process.terminate()
        if None not in codes:
            return 0 if failed is None else failed if failed > 0 else 128 - failed
        if failed is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)
