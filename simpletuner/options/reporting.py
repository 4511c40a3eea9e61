"""Options of what is told about a run, and where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from simpletuner.options.option import Problem, Section, option
from simpletuner.options.webhooks import Webhook, read_webhooks

CUSTOM = "custom-tracker"
"""The name in `report_to` of the tracker that `custom_tracker` holds."""
ELSEWHERE = dict.fromkeys(
    ("swanlab", "comet_ml", "mlflow", "aim", "clearml", "simpletuner"),
    f"there are jsonl, tensorboard and wandb, and {CUSTOM}, a file of your own (docs/tracking.md)",
)
"""Trackers that are not here, to what is."""


class Reporting(Section):
    """Where the figures and pictures of a run go, besides the terminal and the output folder."""

    report_to: str = option("none", ask="Where should figures and pictures be logged?", choices_from="tracker", instead=ELSEWHERE)
    """Trackers, with commas between several: `none`, `all` that are installed, or their names."""

    custom_tracker: Path | None = option(None, advanced=True)
    """Python file with a Tracker of your own, for `report_to` custom-tracker; a name alone is looked for in `custom-trackers/`, too."""

    tracker_image_layout: Literal["gallery", "table"] = option("gallery", advanced=True)
    """How wandb shows pictures of validation: each under its name with a slider over steps, or as rows of a table with their prompts."""

    tracker_project_name: str = option("simpletuner", advanced=True)
    """Project under which trackers that group runs file this one."""

    tracker_run_name: str = option("simpletuner-testing", advanced=True)
    """Name of the run in trackers."""

    logging_dir: Path = option(Path("logs"), advanced=True)
    """Folder for trackers' files, inside `output_dir`."""

    webhook_config: dict[str, Any] | list[dict[str, Any]] | Path | None = option(None, is_secret=True, advanced=True)
    """Who is told of the run over the network: Discord, or any server of yours; see docs/webhooks.md. `{env:NAME}` keeps a secret out of the file."""

    webhook_reporting_interval: int | None = option(None, ge=1, advanced=True)
    """Steps between two messages of loss and rate to webhooks. If not given, a server hears of them every 5 seconds, Discord not at all."""

    run_report: bool = option(True, advanced=True)
    """Keep report.html in `output_dir`: curves, pictures by step, time, memory, datasets, settings and what to do next, in one file that opens
    in any browser. It is renewed behind the run; `simpletuner watch` shows it live."""

    plan_memory: bool = option(True, advanced=True)
    """Say at the start what memory each phase is planned to take, warn where that is more than there is, and say after two steps how far it was
    off. It takes a second, or three for the largest models."""

    def webhooks(self) -> tuple[Webhook, ...]:
        """Who is told of the run."""
        return read_webhooks(self.webhook_config)[0]

    def problems(self) -> Iterator[Problem]:
        for text in read_webhooks(self.webhook_config)[1]:
            yield Problem(("webhook_config",), text)
        names = [name.strip() for name in self.report_to.split(",")]
        if CUSTOM in names and self.custom_tracker is None:
            yield Problem(("report_to",), f"report_to {CUSTOM} needs custom_tracker, the Python file that holds it")
