"""Options of what is told about a run, and where."""

from __future__ import annotations

from pathlib import Path

from simpletuner.options.option import Section, option


class Reporting(Section):
    """Where the figures and pictures of a run go, besides the terminal and the output folder."""

    report_to: str = option("none", ask="Where should figures and pictures be logged?", choices_from="tracker")
    """Trackers, with commas between several: `none`, `all`, or their names."""

    tracker_project_name: str = option("simpletuner", advanced=True)
    """Project under which trackers that group runs file this one."""

    tracker_run_name: str = option("simpletuner-testing", advanced=True)
    """Name of the run in trackers."""

    logging_dir: Path = option(Path("logs"), advanced=True)
    """Folder for trackers' files, inside `output_dir`."""

    plan_memory: bool = option(True, advanced=True)
    """Say at the start what memory each phase is planned to take, warn where that is more than there is, and say after two steps how far it was
    off. It takes a second, or three for the largest models."""
