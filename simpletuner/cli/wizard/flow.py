"""The walk through the steps, forwards and back: asks, keeps what was answered, and has the memory planned beside it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from simpletuner.cli.choices import family_of
from simpletuner.cli.wizard.asking import Asker, Move, say
from simpletuner.cli.wizard.drafts import Draft, keep
from simpletuner.cli.wizard.existing import Existing
from simpletuner.cli.wizard.files import CONFIG, NAMED_BY, lycoris, slug, texts
from simpletuner.cli.wizard.forecast import Forecast, Outcome
from simpletuner.cli.wizard.json_text import change
from simpletuner.cli.wizard.machine import GIGABYTE, Machine, Probe, machine_with, named_card
from simpletuner.cli.wizard.model import facts_of, refusal
from simpletuner.cli.wizard.pictures import Pictures, look_at_folder, problem_with
from simpletuner.cli.wizard.proposals import Proposal, Situation, propose
from simpletuner.cli.wizard.questions import Choice, Question, ask_text, help_of, option_of, question, shown
from simpletuner.cli.wizard.steps import Step, steps
from simpletuner.console import Console
from simpletuner.errors import ConfigError
from simpletuner.options.memory import size_in_bytes

GO_ON, FIT = "go on", "fit"
CARDS = ("8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB")
BEFORE_MACHINE = ("pictures", "name", "caption_strategy", "instance_prompt")
"""Steps for which nobody need wait for the look at this machine."""
GUESSED_PLACES = ("images", "pictures", "train", "data")


@dataclass
class Walk:
    """Where the wizard is, and what it knows."""

    asker: Asker
    console: Console
    draft_folder: Path
    probe: Probe | None
    """A look at this machine that is under way; None where the card was given."""
    given: Mapping[str, Any]
    """Answers of the command line: they are not asked."""
    plans: bool = True
    keeps: bool = True
    """Whether answers so far are kept in a file."""
    existing: Existing | None = None
    fixed_folder: Path | None = None
    """Where the files go, if the command line says it."""
    chosen: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    _machine: Machine | None = None
    _pictures: Pictures = field(default_factory=Pictures)
    _forecast: Forecast | None = None
    _forecast_of: Any = None

    def walk(self) -> None:
        """Go through the steps from the one where it is to the end."""
        all_steps, at, forwards = steps(), 0, True
        names = [step.name for step in all_steps]
        at = names.index(self.step) if self.step in names else 0
        while at < len(all_steps):
            step = all_steps[at]
            outcome = self._do(step, all_steps)
            if outcome is None:  # it is no question here
                at = at + 1 if forwards or at == 0 else at - 1
                forwards = forwards or at == 0
                continue
            forwards = outcome is not Move.BACK
            if not forwards and at == 0:
                self.console.say("This is the first question.", style="dim")
            at = at + 1 if forwards else max(0, at - 1)
            self.keep(names[min(at, len(names) - 1)])

    def keep(self, step: str) -> None:
        """Keep what was answered so far."""
        self.step = step
        if self.chosen and self.keeps:
            keep(self.draft_folder, Draft(self.chosen, step))

    # What is known.

    @property
    def answers(self) -> dict[str, Any]:
        """All that was answered, by whomever."""
        return {**(self.existing.answers if self.existing else {}), **self.chosen, **self.given}

    def situation(self) -> Situation:
        """What is known and proposed now."""
        answers = self.answers
        if "pictures" in answers:
            self._look(answers["pictures"])
        situation = Situation(self._machine_for(answers), self._pictures, answers, facts_of, lambda family: family_of(family).billions)
        situation.found["pictures"] = Proposal(answers.get("pictures") or guess(), "")
        situation.found["name"] = Proposal(slug(Path(situation.value("pictures") or "training").name), "from the folder's name")
        situation.found["card"] = Proposal("none", "PyTorch finds none here")
        return situation if "pictures" not in answers else self._proposed(situation)

    def _proposed(self, situation: Situation) -> Situation:
        propose(situation)
        return situation

    def _machine_for(self, answers: Mapping[str, Any]) -> Machine:
        card = answers.get("card")
        if card and card != "none":
            return machine_with((named_card(size_in_bytes(card)),))
        if self._machine is not None:
            return self._machine
        return Machine() if self.probe else machine_with(())

    def _meet_machine(self) -> None:
        """Wait for the look at this machine, the first time that it matters."""
        if self._machine is None and self.probe is not None:
            probe = self.probe
            self.asker.wait(lambda: "looking at this machine", lambda: probe.is_done, may_skip=False)
            self._machine = probe.result()
            say(self.console, f"this machine: {self._machine}")

    def _look(self, folder: str) -> None:
        """Look at the pictures, unless that was done."""
        if self._pictures.folder == folder or problem_with(folder):
            return
        done: list[int] = [0]
        found: list[Pictures | Exception] = []

        def advance() -> None:
            done[0] += 1

        def work() -> None:
            try:
                found.append(look_at_folder(folder, advance))
            except Exception as error:  # raised where the questions are
                found.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.asker.wait(lambda: f"looking at the pictures: {done[0]}", lambda: not thread.is_alive(), may_skip=False)
        looked = found[0]
        if isinstance(looked, Exception):
            raise looked
        self._pictures = looked
        for line in self._pictures.described():
            say(self.console, line)

    # One step.

    def _do(self, step: Step, all_steps: Sequence[Step]) -> Any:
        """Ask a step's questions; None if there is none."""
        if step.name not in BEFORE_MACHINE:
            self._meet_machine()
        situation = self.situation()
        keys = [key for key in step.keys if self._is_asked(key, situation)]
        if not keys:
            return None
        place = self._place(step, all_steps, situation)
        return self._page(step, keys, place) if step.is_page else self._single(keys[0], situation, place)

    def _place(self, step: Step, all_steps: Sequence[Step], situation: Situation) -> str:
        """Which step this is of those that there are, as far as one knows; nothing while little is known."""
        if "pictures" not in self.answers:
            return ""
        there = [one for one in all_steps if any(self._is_asked(key, situation) for key in one.keys)]
        return f"{there.index(step) + 1}/{len(there)}" if step in there else ""

    def _is_asked(self, key: str, situation: Situation) -> bool:
        if key in self.given:
            return False
        if key == "model_flavour" and "pretrained_model_name_or_path" in self.given:
            return False
        if key == "card":
            return not self.existing and self._machine is not None and not self._machine.cards
        if key == "name":
            return not self.existing and self.fixed_folder is None
        if self.existing and (key == "renders_captions" or (key.startswith("lokr_") and self.existing.lycoris and key not in self.existing.answers)):
            return False  # the prompt library, and a file for another algorithm, stay as they are
        return key in situation.found

    def _single(self, key: str, situation: Situation, place: str) -> Any:
        value = self.asker.ask(self._question(key, situation, place))
        return value if value is Move.BACK else self._take(key, value)

    def _take(self, key: str, value: Any) -> Any:
        """Take an answer; what it makes pointless is forgotten."""
        before = self.answers.get(key)
        self.chosen[key] = value
        if key == "model_family" and value != before:
            self.chosen.pop("model_flavour", None)
            self.chosen.pop("pretrained_model_name_or_path", None)
        if key == "model_flavour" and value:
            self.chosen.pop("pretrained_model_name_or_path", None)
        return value

    def _question(self, key: str, situation: Situation, place: str) -> Question:
        checks = {"pictures": problem_with, "card": card_problem}
        if key == "pretrained_model_name_or_path":
            checks[key] = lambda text: refusal(situation.value("model_family"), text) if text else "name a hub id, a folder or a file"
        asked = question(key, situation, place=place, check=checks.get(key))
        if key != "card":
            return asked
        choices = (Choice("none", "none", "the CPU of this machine"), *(Choice(size, size, "a card of another machine") for size in CARDS))
        return Question(asked.title, asked.default, choices, asked.reason, asked.help, place, asked.read)

    def _page(self, step: Step, keys: list[str], place: str) -> Any:
        """Show several answers, and let each be changed, until all are good."""
        marked: Any = GO_ON
        while True:
            situation = self.situation()
            keys = [key for key in step.keys if self._is_asked(key, situation)]
            choices = [Choice(GO_ON, "Go on with these")]
            for key in keys:
                proposal = situation.found.get(key)
                same = proposal is None or proposal.value == situation.value(key)
                note = proposal.reason if proposal and same else f"yours; proposed: {shown(proposal.value) or '-'}" if proposal else ""
                choices.append(Choice(key, key, note, shown(situation.value(key)) or "-", help_of(option_of(key), situation)))
            if step.is_planned and situation.card_bytes and self.plans:
                self._plan(situation)
                choices.append(Choice(FIT, "Find settings that fit the card"))
            summary = ", ".join(f"{key} {shown(situation.value(key)) or '-'}" for key in keys)
            page = Question(
                step.title,
                marked,
                tuple(choices),
                help=page_help(keys),
                place=place,
                summary=summary,
                footer=partial(self.planned, situation.card_bytes),
            )
            said = self.asker.ask(page)
            if said is Move.BACK:
                return said
            if said == GO_ON:
                return said
            if said == FIT:
                self.fit(situation)
            else:
                value = self.asker.ask(self._question(said, situation, ""))
                if value is not Move.BACK:
                    self._take(said, value)
                    self.keep(step.name)
            marked = GO_ON if said == FIT else said

    # Memory.

    def texts(self, situation: Situation, folder: str) -> dict[str, str]:
        """The files by name, which name each other as in `folder`; those of a config that is there as they would be."""
        if self.existing is None:
            return texts(situation, folder)
        changed = self.edited(situation)
        files = {CONFIG: changed[self.existing.path], NAMED_BY["data_backend_config"]: changed[self.existing.datasets]}
        named = {"data_backend_config": f"{folder}/{NAMED_BY['data_backend_config']}"}
        if len(changed) > len(files):
            files[NAMED_BY["lycoris_config"]] = changed[self.existing.lycoris or self.existing.new_lycoris]
            named["lycoris_config"] = f"{folder}/{NAMED_BY['lycoris_config']}"
        written = self.existing.written
        files[CONFIG] = change(files[CONFIG], {(written.get(key, key),): value for key, value in named.items()})
        return files

    def edited(self, situation: Situation) -> dict[Path, str]:
        """The files of the config that is there, with their new texts."""
        assert self.existing is not None
        made = json.dumps(lycoris(situation), indent=4) + "\n" if situation.kind == "lokr" else ""
        return self.existing.changed({**self.chosen, **self.given}, self.dropped(situation), made)

    def dropped(self, situation: Situation) -> set[str]:
        """Options of the config that is there which its new answers leave without a meaning."""
        before = self.existing.answers if self.existing else {}
        gone = {"lora_rank": situation.kind != "lora", "lora_type": situation.kind == "full", "blocks_to_swap": situation.kind == "full"}
        gone["model_flavour"] = situation.value("model_flavour") == ""
        gone["pretrained_model_name_or_path"] = situation.value("model_flavour") != ""
        gone["instance_prompt"] = situation.value("caption_strategy") != "instanceprompt" and before.get("caption_strategy") == "instanceprompt"
        moved = [
            key
            for key in ("model_type", "lora_type", "model_flavour", "caption_strategy")
            if key in self.chosen and self.chosen[key] != before.get(key)
        ]
        return {key for key, is_gone in gone.items() if is_gone} if moved else set()

    def _plan(self, situation: Situation) -> None:
        """Have the memory planned, if the answers are other than those of the last plan."""
        files = self.texts(situation, "{folder}")
        if files == self._forecast_of:
            return
        self.stop_planning()
        self._forecast, self._forecast_of = Forecast(files, ()), files

    def planned(self, card_bytes: int) -> str:
        """What the plan says so far, in a line."""
        if self._forecast is None:
            return ""
        if not self._forecast.is_done:
            return "memory plan: being made"
        outcome = self._forecast.outcome()
        return f"memory plan: {outcome.described(card_bytes)}" if isinstance(outcome, Outcome) else f"memory plan: {outcome}"

    def final_plan(self, situation: Situation) -> str:
        """The plan of the answers as they are, waited for unless that is skipped; empty without."""
        if not self.plans or not situation.card_bytes:
            return ""
        self._plan(situation)
        forecast = self._forecast
        assert forecast is not None
        if not self.asker.wait(lambda: "planning the memory", lambda: forecast.is_done, may_skip=True):
            return ""
        return self.planned(situation.card_bytes)

    def fit(self, situation: Situation) -> None:
        """Look for settings that fit the card, and take them if there are any."""
        self.stop_planning()
        size = f"{situation.card_bytes / GIGABYTE:.1f}GB"
        search = Forecast(self.texts(situation, "{folder}"), ("--fit", size))
        try:
            if not self.asker.wait(lambda: f"looking for settings that fit {size}", lambda: search.is_done, may_skip=True):
                return
            outcome = search.outcome()
        finally:
            search.stop()
        if not isinstance(outcome, Outcome):
            say(self.console, f"no plan: {outcome}")
            return
        if not outcome.fits:
            say(self.console, "nothing that is known here makes it fit: lower the resolution, or take a smaller model")
            return
        for settings in outcome.changes:
            said = ", ".join(f"{key} {shown(value)}" for key, value in settings["settings"].items())
            say(self.console, f"{said}: {settings['rule']}")
        self.chosen |= {key: value for key, value in outcome.settings.items() if key not in self.given}
        say(self.console, f"{'with these it' if outcome.changes else 'it'} {outcome.described(situation.card_bytes)}")

    def stop_planning(self) -> None:
        if self._forecast is not None:
            self._forecast.stop()
        self._forecast, self._forecast_of = None, None


def guess() -> str:
    """A folder that is likely to hold pictures, as one sees from here."""
    places = [*sorted(Path("datasets").glob("*/")), *(Path(name) for name in GUESSED_PLACES)]
    return next((place.as_posix() for place in places if place.is_dir() and problem_with(str(place)) is None), "")


def card_problem(text: str) -> str | None:
    if text == "none":
        return None
    try:
        size_in_bytes(text)
    except ValueError as error:
        return str(error)
    return None


def page_help(keys: list[str]) -> str:
    """What a page is about."""
    questions = "; ".join(f"{key}: {ask_text(key)}" for key in keys)
    return f"Enter on a line changes it, and ? there explains it. {questions}"


def check_given(given: Mapping[str, Any]) -> None:
    """Refuse answers of the command line that the wizard could only refuse later.

    Raises:
        ConfigError: says which.
    """
    for key, problem in (("pictures", problem_with), ("card", card_problem)):
        if key in given and (refused := problem(str(given[key]))):
            raise ConfigError(f"--{key}: {refused}", hint="Correct it, or leave it out to be asked.")
