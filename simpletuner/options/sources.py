"""Where options are set: files of JSON, TOML and shell variables, the environment, and words on a command line."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError
from simpletuner.options.retired import notice
from simpletuner.options.train_config import declared, spellings
from simpletuner.relaxed_json import load_relaxed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLES = {
    "ACCELERATE_CONFIG_PATH": "accelerate_config",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "DATALOADER_CONFIG": "data_backend_config",
    "HUB_MODEL_NAME": "hub_model_id",
    "LR_SCHEDULE": "lr_scheduler",
    "MAX_NUM_STEPS": "max_train_steps",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "NUM_EPOCHS": "num_train_epochs",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "TRAINER_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_SEED": "seed",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "USE_XFORMERS": "use_xformers",
    "VALIDATION_STEPS": "validation_step_interval",
}
"""Variables that are not simply an option in capitals."""
BESIDE = frozenset({"data_backend_config", "lycoris_config", "user_prompt_library", "webhook_config", "custom_tracker"})
"""Files that a config names, and that may lie beside it."""
EXTRA_WORDS = "TRAINER_EXTRA_ARGS"
PREFIX = "SIMPLETUNER_"
NEAR = 0.85
"""From this likeness to an option on, a variable in an .env file is one that is misspelled."""
TRUTHS = {**dict.fromkeys(("true", "yes", "on", "1", "y", "t"), True), **dict.fromkeys(("false", "no", "off", "0", "n", "f"), False)}
"""Words for truth values."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One option as somebody set it."""

    key: str
    """As it was written, without leading dashes."""
    value: Any
    origin: str
    """Where: "config/config.json", "environment LEARNING_RATE", "flag --learning_rate"."""


def read_file(path: Path, environ: Mapping[str, str], name: str | None = None) -> tuple[list[Setting], dict[str, str]]:
    """Read a file of options by its suffix: .json, .toml or .env. Settings are said to come from `name`, or else from the path.

    Returns:
        The settings in order; and of an .env file the variables that are no options, which are meant for libraries.

    Raises:
        ConfigError: the file is missing or malformed; says where.
    """
    if path.suffix == ".env":
        return read_variables(path, environ)
    content = _read_toml(path) if path.suffix == ".toml" else load_relaxed(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no object of options", hint='It begins with { and lists "option": value.')
    found = [(key.lstrip("-").replace("-", "_"), value) for key, value in content.items()]
    return [Setting(key, _beside(path, value) if key in BESIDE else value, name or str(path)) for key, value in found], {}


def _beside(path: Path, value: Any) -> Any:
    """A file that is not there as seen from the working directory may lie beside the config that names it."""
    if not isinstance(value, str) or Path(value).exists() or not (path.parent / value).is_file():
        return value
    return str(path.parent / value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", hint='Write options as key = value, and texts in "double quotes".') from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Correct the path, or make the file; it is UTF-8 text.") from error


def read_variables(path: Path, environ: Mapping[str, str]) -> tuple[list[Setting], dict[str, str]]:
    """Read lines such as `export LEARNING_RATE=4e-5`; a value may refer to $VARIABLES above it or in `environ`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Correct the path, or make the file; it is UTF-8 text.") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.replace("\\\n", " ").split("\n"), start=1):
        match = re.fullmatch(r"\s*(?:export\s+)?(\w+)=(.*)", line)
        if not match:
            if line.strip() and not line.lstrip().startswith("#"):
                raise ConfigError(f"{path}, line {number}: {line.strip()!r} is no variable", hint="Write export NAME=value.")
            continue
        name, value = match.groups()
        try:
            words = shlex.split(value, comments=True)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}", hint="Put the value in one pair of quotes.") from error
        plain = " ".join(words)
        found[name] = plain if value.lstrip().startswith("'") else _expand(plain, {**environ, **found})
    keys = {name: key for name in found if (key := _meant(variable_of(name)))}
    settings = [Setting(key, found[name], f"{path} {name}") for name, key in keys.items()]
    try:
        words = shlex.split(found.get(EXTRA_WORDS, ""))
    except ValueError as error:
        raise ConfigError(f"{path}: {EXTRA_WORDS}: {error}", hint="Close every quote in it.") from error
    more, rest = read_words(words, f"{path} {EXTRA_WORDS}")
    if rest:
        raise ConfigError(f"{path}: {EXTRA_WORDS} holds {rest[0]!r}, which is no option", hint="Write --option=value.")
    return [*settings, *more], {name: value for name, value in found.items() if name not in keys and name != EXTRA_WORDS}


def _meant(key: str) -> str | None:
    """Give the key if it is an option, was one, or is so near to one that it is a mistake; others are for libraries."""
    is_ours = key in _all_keys() or notice(key, "") is not None or difflib.get_close_matches(key, _all_keys(), n=1, cutoff=NEAR)
    return key if is_ours else None


def _expand(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: values.get(match[1] or match[2], ""), text)


def read_environment(environ: Mapping[str, str]) -> list[Setting]:
    """Take options from environment variables: SIMPLETUNER_LEARNING_RATE, or LEARNING_RATE.

    Without the prefix a name of one word does not count: SEED or VARIANT may well be somebody else's.
    """
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX) or "_" in name}
    known = _all_keys()
    return [Setting(variable_of(name), value, f"environment {name}") for name, value in ours.items() if variable_of(name) in known]


def variable_of(name: str) -> str:
    """The key that a variable stands for, whether or not there is such an option."""
    name = name.removeprefix(PREFIX)
    return VARIABLES.get(name, name.lower() if name.isupper() else "")


def _all_keys() -> set[str]:
    return declared().keys() | spellings().keys() | set(VARIABLES.values())


def read_words(words: Sequence[str], origin: str = "flag --{}", *, needs_dashes: bool = False) -> tuple[list[Setting], list[str]]:
    """Take options out of words: `--key value`, `--key=value`, a bare `--truth`, `--no-truth`, and `key=value`.

    Args:
        needs_dashes: whether `key=value` is none, where other words may be anything.

    Returns:
        The settings, and the words that are none; a name with dashes that nobody knows is a setting too, to be refused with the rest.
    """
    settings, rest = [], []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, sign, value = word.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if not (word.startswith("--") and key) and (needs_dashes or not (sign and re.fullmatch(r"[A-Za-z]\w*", name))):
            rest.append(word)
            continue
        option = declared().get(spellings().get(key, key))
        positive = declared().get(spellings().get(key.removeprefix("no_"), key.removeprefix("no_")))
        if option is None and positive is not None and positive.kind == "bool" and not sign:
            key, value = key.removeprefix("no_"), "false"
        elif not sign and option is not None and option.kind == "bool":
            value = waiting.pop(0) if waiting and waiting[0].lower() in TRUTHS else "true"
        elif not sign:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        settings.append(Setting(key, value, origin.format(key)))
    return settings, rest
