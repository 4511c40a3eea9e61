"""`simpletuner optimizers`: what `optimizer` may be, as text or as a page of markdown."""

from __future__ import annotations

import argparse

help = "list the optimizers, what each needs and remembers"
example = "simpletuner optimizers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="write the reference page")


def run(args: argparse.Namespace) -> int:
    from simpletuner.cli.optimizer_page import listing, page

    print(page() if args.markdown else listing() + "\n", end="")
    return 0
