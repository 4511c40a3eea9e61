"""From what was set, and where, to a checked TrainConfig: defaults < family < file < environment < flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from simpletuner.errors import ConfigError, choose, nearest
from simpletuner.options.effects import without_effect
from simpletuner.options.models import Models
from simpletuner.options.option import UNRULED, Option, Section
from simpletuner.options.retired import notice
from simpletuner.options.sources import TRUTHS, Setting
from simpletuner.options.train_config import SECTIONS, TrainConfig, declared, spellings

FamilyDefaults = Callable[[str, str | None, str | None], Mapping[str, Any]]
"""A family's name, the flavour and the model's location, where they are given, to what it prefers; raises ConfigError if there is no such family
or flavour."""
DEFAULT = "default"
FLAG = "flag "
VARIABLE = re.compile(r"\{(env:)?(\w+)\}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Options, where each came from, and what is to be said of them before a run."""

    config: TrainConfig
    origins: Mapping[str, str]
    """Key to "default", "family auraflow", "config/config.json", "environment LEARNING_RATE", "flag --learning_rate"."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    """What is known so far while options are read."""

    given: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Keys whose value cannot be used, and which are therefore not judged together with others."""

    def refuse(self, key: str, what: str) -> None:
        self.bad.add(key)
        self.problems.append(what)

    def label(self, key: str) -> str:
        """The key with what was set and where."""
        setting = self.given.get(key)
        return f"{key} {shown(setting)} ({setting.origin})" if setting else key


def shown(setting: Setting) -> str:
    """The value of an option as it may be printed."""
    return "(not shown)" if declared()[setting.key].is_secret else repr(setting.value)


def load_config(
    settings: Sequence[Setting],
    family_defaults: FamilyDefaults,
    *,
    idle_of: Callable[[Models], Mapping[str, str]] | None = None,
    choices: Mapping[str, Collection[str]] | None = None,
    variables: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Check options and put them together.

    Args:
        settings: what was set, the strongest last.
        family_defaults: gives what a family prefers over the general defaults.
        idle_of: gives the options that have no effect in the model that is chosen, and why.
        choices: the open sets that options name in `choices_from`, e.g. {"optimizer": [...]}; others are not checked.
        variables: values for `{name}` in texts, e.g. {"example": folder}.
        environ: values for `{env:NAME}` in texts.

    Raises:
        ConfigError: every problem at once.
    """
    reading = _Reading()
    for setting in settings:
        _take(setting, reading)
    for key, setting in reading.given.items():
        value = _substitute(setting.value, variables or {}, environ or {}, reading, key)
        reading.given[key] = Setting(setting.key, value, setting.origin)
    _check_open_choices(reading, choices or {})
    family, preferred = _family(reading, family_defaults)
    values = {**preferred, **{key: setting.value for key, setting in reading.given.items() if key not in reading.bad}}
    config = _build(values, reading)
    if reading.problems:
        raise _as_error(reading.problems)
    origins = dict.fromkeys(declared(), DEFAULT) | dict.fromkeys(preferred, f"family {family}")
    origins |= {key: setting.origin for key, setting in reading.given.items()}
    config = _settle(config, origins, reading.notes)
    return Loaded(config, origins, (*reading.notes, *without_effect(config, reading.given, idle_of(config.models) if idle_of else None)))


def _take(setting: Setting, reading: _Reading) -> None:
    """Bring a setting under its key, or say why it has none."""
    key = spellings().get(setting.key, setting.key)
    option = declared().get(key)
    if option is None:
        if not setting.key.startswith(("_", "$")):  # a comment, or an editor's $schema
            _refuse_unknown(setting, reading)
        return
    value = setting.value
    if _is_unset(value, option):
        return
    if setting.key in option.was_opposite:
        word = str(value).strip().lower()
        value = not TRUTHS[word] if word in TRUTHS else value
    if setting.key != key:
        reading.notes.append(
            f"{setting.key} ({setting.origin}) is now called {key}" + (f", and means {value!r} there" if value != setting.value else "")
        )
    before = reading.given.get(key)
    over = f" in place of {shown(before)} from {before.origin}" if before and str(before.value) != str(value) else ""
    if setting.origin.startswith("environment ") or (over and not setting.origin.startswith(FLAG)):
        reading.notes.append(f"{key} {shown(Setting(key, value, setting.origin))} is taken from {setting.origin}{over}")
    reading.given[key] = Setting(key, value, setting.origin)


def _is_unset(value: Any, option: Option) -> bool:
    """Null and an empty text say nothing, unless the option says that they do."""
    if value is None:
        return not (option.may_be_empty and option.may_be_none)
    return isinstance(value, str) and not value.strip() and not option.may_be_empty


def _refuse_unknown(setting: Setting, reading: _Reading) -> None:
    said = notice(setting.key, setting.value)
    if said is not None:
        reading.notes += [f"{said} ({setting.origin})"] if said else []
        return
    best = nearest(setting.key, [*declared(), *spellings()])
    meant = f"; did you mean {best}?" if best else ""
    reading.problems.append(f"{setting.key} ({setting.origin}) is no option{meant}")


def _substitute(value: Any, variables: Mapping[str, str], environ: Mapping[str, str], reading: _Reading, key: str) -> Any:
    """Replace `{name}` and `{env:NAME}` in texts, inside lists and objects too; other braces stay as they are."""
    if isinstance(value, list):
        return [_substitute(entry, variables, environ, reading, key) for entry in value]
    if isinstance(value, dict):
        return {name: _substitute(entry, variables, environ, reading, key) for name, entry in value.items()}
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        is_environment, name = match.groups()
        if is_environment and name not in environ:
            reading.refuse(key, f"{reading.label(key)} refers to the environment variable {name}, which is not set")
        return (environ if is_environment else variables).get(name, match[0])

    return VARIABLE.sub(replacement, value)


def _check_open_choices(reading: _Reading, choices: Mapping[str, Collection[str]]) -> None:
    for key, option in declared().items():
        setting = reading.given.get(key)
        known = choices.get(option.choices_from or "")
        if setting is None or known is None or not isinstance(setting.value, str):
            continue
        for name in setting.value.lower().split(","):
            if option.spellings.get(name.strip(), name.strip()) not in known:
                what = str(option.choices_from)
                plural = "families" if what == "family" else f"{what}s"
                instead = option.instead.get(name.strip()) or choose(name.strip(), known, plural)
                reading.refuse(key, f"{key} {name.strip()!r} ({setting.origin}) is no known {what}; {instead}")


def _family(reading: _Reading, family_defaults: FamilyDefaults) -> tuple[str, Mapping[str, Any]]:
    """Find the family and what it prefers."""
    setting = reading.given.get("model_family")
    if setting is None or "model_family" in reading.bad:
        return "", {}
    flavour, location = reading.given.get("model_flavour"), reading.given.get("pretrained_model_name_or_path")
    family = str(setting.value).strip().lower()
    try:
        preferred = family_defaults(family, str(flavour.value).strip().lower() if flavour else None, str(location.value) if location else None)
    except ConfigError as error:
        key = "model_flavour" if flavour else "model_family"
        reading.refuse(key, f"{reading.label(key)}: {error.message}; {error.hint}")
        return family, {}
    unknown = preferred.keys() - declared().keys()
    assert not unknown, f"family {family} has defaults for options that do not exist: {unknown}"
    return family, preferred


def _build(values: Mapping[str, Any], reading: _Reading) -> TrainConfig:
    """Check section by section, then the sections together; what is refused stands at its default meanwhile."""
    sections: dict[str, Section] = {}
    for name, section in SECTIONS.items():
        mine = {key: value for key, value in values.items() if key in section.model_fields}
        sections[name] = _build_section(section, mine, reading)
    config = TrainConfig.model_validate(sections, context=UNRULED)
    for problem in [*(problem for section in sections.values() for problem in section.problems()), *config.problems()]:
        if not reading.bad & set(problem.keys):
            given = [reading.given[key] for key in problem.keys if key in reading.given]
            where = ", ".join(f"{setting.key} = {shown(setting)} from {setting.origin}" for setting in given)
            reading.problems.append(f"{problem.text} ({where})")
    return config


def _build_section(section: type[Section], values: Mapping[str, Any], reading: _Reading) -> Section:
    try:
        return section.model_validate(dict(values), context=UNRULED)
    except ValidationError as error:
        wrong = {str(details["loc"][0]) for details in error.errors()}
    for key in sorted(wrong, key=list(section.model_fields).index):
        if key not in values and key not in reading.bad:
            reading.refuse(key, f"{key} is not set, and has no default")
        elif key not in reading.bad:
            option = declared()[key]
            best = nearest(str(values[key]).lower(), option.choices)
            reading.refuse(key, f"{reading.label(key)} is not {option.rule}" + (f"; did you mean {best!r}?" if best else ""))
    good = {key: value for key, value in values.items() if key not in wrong}
    missing = {key: "" for key in wrong if declared()[key].is_required}
    return section.model_validate({**missing, **good}, context=UNRULED)


def _settle(config: TrainConfig, origins: dict[str, str], notes: list[str]) -> TrainConfig:
    """Make the one change that follows from two options: a warm-up is honoured by the schedule that has none."""
    optim = config.optim
    if optim.lr_scheduler != "constant" or not optim.lr_warmup_steps:
        return config
    notes.append(f"lr_scheduler constant is run as constant_with_warmup, because lr_warmup_steps is {optim.lr_warmup_steps}")
    origins["lr_scheduler"] += ", with lr_warmup_steps"
    return config.model_copy(update={"optim": optim.model_copy(update={"lr_scheduler": "constant_with_warmup"})})


def _as_error(problems: Sequence[str]) -> ConfigError:
    hint = "`simpletuner options WORD` explains the options whose name or help has that word."
    if len(problems) == 1:
        return ConfigError(problems[0], hint=hint)
    return ConfigError("\n  - ".join([f"{len(problems)} problems in the configuration", *problems]), hint=hint)
