"""`simpletuner push`: publish on the hub what a run left."""

from __future__ import annotations

import argparse
from pathlib import Path

help = "publish the result of a run on the hub"
example = "simpletuner push output --to my-name/my-lora"

EPILOG = """\
Uploads the adapter, its averaged twin in ema/, or the whole pipeline, with the page README.md, its pictures and the settings: one commit.
The token is that of `hf auth login`, or HF_TOKEN; the server is huggingface.co, or the one that HF_ENDPOINT names.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="output folder of a run, or a checkpoint in it")
    parser.add_argument("--to", metavar="NAME", help="the repository, name or owner/name; by default the folder's name")
    parser.add_argument("--public", action="store_true", help="let everybody see a new repository")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    from simpletuner.console import Console
    from simpletuner.reporting.hub import publish

    console = Console()
    name = args.to or args.folder.resolve().name
    address = publish(args.folder, name, private=not args.public, message=args.message or f"Upload {args.folder.resolve().name}", say=console.warn)
    console.say(f"Published: {address}")
    return 0
