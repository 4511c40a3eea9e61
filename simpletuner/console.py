"""The one console: headings, tables, warnings, bars. Live on a terminal, plain lines in a pipe, silent off the main process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

MEGABYTE = 1_000_000
PLAIN_SECONDS = 10.0
"""In a pipe, a bar prints a line this often at most."""


class Bar:
    """A piece of work of known length that is under way."""

    def __init__(self, console: Console, title: str, total: int, unit: str, first: int) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done = self._first = first
        self._began = self._printed = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if console.is_live:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console.rich,
            )
            self._task = self._progress.add_task(title, total=total, completed=first, text="")
            self._progress.start()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Count `count` more as done; `text` replaces the rate, e.g. a loss."""
        self._done += count
        if text is None:
            text = f"{(self._done - self._first) / max(time.monotonic() - self._began, 1e-9):.1f} {self._unit}/s"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, text=escape(text))
        elif time.monotonic() - self._printed >= PLAIN_SECONDS or self._done >= self._total:
            self._printed = time.monotonic()
            self._console.say(f"{self._title}: {self._done}/{self._total} {self._unit}, {text}{self._remaining()}")

    def _remaining(self) -> str:
        left = self._total - self._done
        fresh = self._done - self._first
        if left <= 0 or fresh <= 0:
            return ""
        return f", {duration((time.monotonic() - self._began) / fresh * left)} left"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Console:
    """Where a run speaks. One is made by the command and handed down."""

    def __init__(self, *, is_main: bool = True, stream: TextIO | None = None, width: int | None = None) -> None:
        """
        Args:
            is_main: False on every process but the first, which then says nothing.
            stream: where to print; standard output if not given.
            width: columns; asked of the terminal if not given, 120 in a pipe.
        """
        stream = stream or sys.stdout
        self.is_main = is_main
        is_terminal = stream.isatty()
        self.rich = RichConsole(
            file=stream, quiet=not is_main, width=width or (None if is_terminal else 120), highlight=False, emoji=False, soft_wrap=not is_terminal
        )
        self._warned: set[str] = set()
        self.on_warning: Callable[[str], None] | None = None
        """Is given each warning that is printed."""

    @property
    def is_live(self) -> bool:
        """Whether a line can be redrawn."""
        return self.is_main and self.rich.is_terminal

    def say(self, text: str = "", style: str | None = None) -> None:
        """Print plain text; brackets are not markup."""
        self.rich.print(escape(text), style=style, soft_wrap=True)

    def heading(self, text: str) -> None:
        self.rich.print(f"\n[bold]{escape(text)}[/bold]")

    def warn(self, text: str) -> None:
        """Print a warning, once however often it is given."""
        if text not in self._warned:
            self._warned.add(text)
            self.rich.print(f"[yellow]warning:[/yellow] {escape(text)}")
            if self.on_warning is not None:
                self.on_warning(text)

    def error(self, message: str, hint: str | None = None) -> None:
        self.rich.print(f"[bold red]error:[/bold red] {escape(message)}")
        if hint:
            self.rich.print(f"  [cyan]hint:[/cyan] {escape(hint)}")

    def stopped(self, message: str, hint: str | None = None) -> None:
        """Say that a run ended because it was asked to, which is no error."""
        self.rich.print(f"[bold yellow]{escape(message)}[/bold yellow]")
        if hint:
            self.rich.print(f"  {escape(hint)}")

    def facts(self, rows: Mapping[str, str]) -> None:
        """Print names and values in two columns."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(escape(name), escape(value))
        self.rich.print(table)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows under headings: the first column to the left, figures to the right."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
        for number, name in enumerate(columns):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold" if number == 0 else "ellipsis")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.rich.print(table)

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "images", first: int = 0) -> Iterator[Bar]:
        """Show a bar while the body runs; `first` of `total` were done before."""
        bar = Bar(self, title, total, unit, first)
        try:
            yield bar
        finally:
            bar.close()


def in_megabytes(bar: Bar) -> Callable[[int], None]:
    """Give what counts bytes as done on a bar whose unit is MB."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done // MEGABYTE > before // MEGABYTE:
            bar.advance(done // MEGABYTE - before // MEGABYTE)

    return advance


def duration(seconds: float) -> str:
    """Say a span of time in the two largest units that matter: 8 s, 2 min 05 s, 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def amount(count: float, unit: str = "") -> str:
    """Say a large number in three digits: 950, 5.49 M, 6.8 B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{abs(count) / factor:.3g}") >= 1:  # 999,700 is 1 M, not 1e+03 k
            return f"{count / factor:.3g} {letter}{unit}"
    return f"{count:g} {unit}".rstrip()
