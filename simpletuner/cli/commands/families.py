"""`simpletuner families`: the models that can be trained, as text or as a page of markdown."""

from __future__ import annotations

import argparse

help = "list the model families and their flavours"
example = "simpletuner families"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="write the reference page")


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.family_page import all_families, listing, page

    families = all_families()
    print(page(families) if args.markdown else listing(families) + "\n", end="")
    return 0
