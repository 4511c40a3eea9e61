"""Find the config that a run is asked for: by path, by example, by environment name, or where it usually lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import simpletuner
from simpletuner.cli.recipes.table import RECIPES
from simpletuner.errors import ConfigError, choose

SUFFIXES = ("json", "toml", "env")
ENVIRONMENT_NAMES = ("SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV")
EXAMPLES = Path(simpletuner.__file__).parent / "examples"


@dataclass(frozen=True, slots=True)
class Place:
    """A config and, if it belongs to an embedded example, that example's folder."""

    config: Path
    example: Path | None = None

    @property
    def name(self) -> str:
        """What the config is called where it is spoken of."""
        other = "" if self.config.stem == "config" else f"/{self.config.stem}"
        return f"example {self.example.name}{other}" if self.example else str(self.config)


def find_config(config: str | None, example: str | None, env: str | None, environ: Mapping[str, str]) -> Place:
    """Find a config; what is asked for by flag goes before what is asked for by environment variable, and that before the usual places.

    Args:
        config: path of a file, or of the folder that has it.
        example: name of an embedded example.
        env: name of a folder in config/.
        environ: environment variables.

    Raises:
        ConfigError: there is none; lists the places that were tried.
    """
    if sum(asked is not None for asked in (config, example, env)) > 1:
        raise ConfigError("--config, --example and --env all name the config", hint="Give one of them.")
    if example:
        return _example(example)
    if config or (env is None and environ.get("CONFIG_PATH")):
        path = Path(config or environ["CONFIG_PATH"]).expanduser()
        return _first([path, *_in_folder(path), *(Path(f"{path}.{suffix}") for suffix in SUFFIXES)])
    env = env or _environment_name(environ)
    if env and env.startswith("examples/"):
        return _example(env.removeprefix("examples/"))
    if env and env != "default":
        tried = [*_in_folder(Path("config") / env), *_in_folder(Path(env))]
        return _first(tried, f"env {env}")
    return _first([*_in_folder(Path()), *_in_folder(Path("config"))])


def examples() -> dict[str, Path]:
    """The embedded examples by name."""
    return {config.parent.name: config.parent for config in sorted(EXAMPLES.glob("*/config.json"))}


def _example(name: str) -> Place:
    """An example by name; `name/other` is its file other.json, where there is one."""
    found = examples()
    name, _, other = name.partition("/")
    if other and name in found:
        if not (found[name] / f"{other}.json").is_file():
            raise ConfigError(f"example {name} has no {other}.json", hint=f"Leave out /{other}; its README says what there is.")
        return Place(found[name] / f"{other}.json", found[name])
    if name in RECIPES:
        raise ConfigError(
            f"example {name} is written for your pictures, and is not there yet",
            hint=f"`simpletuner examples run {name}` writes it to config/{name} and trains it; `simpletuner examples copy {name}` only writes it.",
        )
    if name not in found:
        raise ConfigError(f"{name!r} is not an embedded example", hint=choose(name, found, "examples"))
    return Place(found[name] / "config.json", found[name])


def _environment_name(environ: Mapping[str, str]) -> str | None:
    """The first environment name that is set. An absolute path in ENV is a shell's start-up file, and not meant for us."""
    for variable in ENVIRONMENT_NAMES:
        name = environ.get(variable)
        if name and not (variable == "ENV" and Path(name).expanduser().is_absolute()):
            return name
    return None


def _in_folder(folder: Path) -> list[Path]:
    return [folder / f"config.{suffix}" for suffix in SUFFIXES]


def _first(tried: list[Path], what: str = "config") -> Place:
    for path in tried:
        if path.is_file():
            return Place(path)
    names = ", ".join(str(path) for path in tried)
    raise ConfigError(
        f"no {what} found in {Path.cwd()}; tried {names}",
        hint="Write config/config.json (config/config.json.example is a start), or try the embedded example: simpletuner train --example digits",
    )
