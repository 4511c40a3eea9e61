"""`simpletuner watch`: the report of a run, live in a browser of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from simpletuner.errors import ConfigError, SimpleTunerError

help = "show the report of a run in the browser, live"
example = "simpletuner watch output/my-lora"

EPILOG = """\
The page is the report.html that every run keeps in its output_dir, renewed every few seconds, and pictures while they are made
(validation_preview). It is served to this machine alone. To see it from elsewhere: ssh -L 8350:127.0.0.1:8350 that-machine

Without a folder it is the output_dir of ./config.json or config/config.json. Ctrl-C ends it; the run goes on.
"""
RUNS = ("report/report.json", "*/report/report.json", "*/*/report/report.json")
SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="OUTPUT_DIR", type=Path, help="output folder of a run that is going on, or over")
    parser.add_argument("--port", metavar="NUMBER", type=int, help="where to listen (default: 8350, or any that is free)")
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    from simpletuner.console import Console
    from simpletuner.reporting.report.serve import open_server

    if args.port is not None and not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} is no port", hint="Ports go up to 65535; those below 1024 are the system's.")
    folder = args.folder or output_dir()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", hint="Give the output_dir of a run, begun or ended.")
    server = open_server(folder, args.port)
    Console().say(f"{folder} is shown at {server.url} (Ctrl-C ends this, and nothing else)")
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


def output_dir() -> Path:
    """The output folder that the config here names, or else the one run that is here.

    Raises:
        ConfigError: nothing says which run is meant.
    """
    from simpletuner.cli.commands.train import read_options
    from simpletuner.cli.locate import find_config

    here = sorted({path.parent.parent for pattern in RUNS for path in Path().glob(pattern)})
    try:
        folder = read_options(find_config(None, None, None, os.environ), []).config.training.output_dir
    except SimpleTunerError:
        folder = None
    if folder is not None and (folder.is_dir() or not here):
        return folder
    if len(here) == 1:
        return here[0]
    if not here:
        raise ConfigError("nothing says which run is meant, and there is none here", hint="Say simpletuner watch OUTPUT_DIR.")
    more = f" and {len(here) - SHOWN} more" if len(here) > SHOWN else ""
    raise ConfigError("nothing says which run is meant", hint=f"There are {', '.join(map(str, here[:SHOWN]))}{more}.")
