from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.reporting.events import EVENTS, STAGES, Event, Events, without_folders
from simpletuner.training.telling import is_fault

PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"


class Kept:
    def __init__(self) -> None:
        self.taken: list[Event] = []

    def take(self, event: Event) -> None:
        self.taken.append(event)

    def close(self, deadline: float) -> None:
        pass


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    text = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]


def test_the_page_lists_every_event_every_field_and_every_stage():
    page = PAGE.read_text(encoding="utf-8")

    written = [(event, level, field) for event, level, field, _ in cells(page, "Events")]
    assert written == [(kind, level, field) for kind, (level, fields) in EVENTS.items() for field in fields]
    assert [tuple(row) for row in cells(page, "Stages")] == list(STAGES.items())


def test_every_event_has_fields_of_its_kind_alone_and_a_message():
    kept = Kept()
    events = Events([kept])
    events.expect(8)
    for stage in STAGES:
        events.stage(stage)
    events.looks(4)
    events.looks(8)
    events.figures(4, {"train_loss": 0.5, "learning_rate": 1e-4})
    events.figures(4, {"loss/val/held": 0.25})
    events.pictures(4, {}, {"grid": "not among them"})
    events.saved(4, "checkpoint-4")
    events.failed(ValueError(), 1, is_fault=False)
    events.failed(MemoryError(), 4, is_fault=True)

    assert {event.kind for event in kept.taken} == EVENTS.keys()
    assert all(event.fields.keys() <= EVENTS[event.kind][1].keys() and event.message for event in kept.taken)
    assert [event.fields["stage"] for event in kept.taken[11:13]] == ["validation", "final_validation"]
    assert [event.fields["status"] for event in kept.taken[9:11]] == ["running", "completed"]
    with pytest.raises(AssertionError, match="colour"):
        events.emit("notification", "a", colour="red")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("output_dir /home/me/my-run/out cannot", "output_dir out cannot"),
        ("'/data/a b/c.png' and ~/x/y.png", "'a b/c.png' and y.png"),
        (r"C:\Users\me\a.png is", "a.png is"),
        ("relative/path.png, 3/4, https://example.com/a/b", "relative/path.png, 3/4, https://example.com/a/b"),
    ],
)
def test_folders_of_this_machine_are_left_out_of_errors(said, left):
    assert without_folders(said) == left


def test_an_accelerators_fault_is_known_through_the_errors_it_led_to():
    def failure(cause: BaseException) -> BaseException:
        try:
            try:
                raise cause
            except Exception as error:
                raise ValueError("something") from error
        except ValueError as error:
            return error

    class OutOfMemoryError(RuntimeError):
        pass

    assert is_fault(failure(RuntimeError("CUDA error: unspecified launch failure"))) and is_fault(failure(OutOfMemoryError("2 GB")))
    assert not is_fault(failure(RuntimeError("shape")))
