"""The one way to declare what a user may set: a field of a Section, its rule, and the sentence under it, which is its help."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticUndefined

if TYPE_CHECKING:
    from typing_extensions import Self

REQUIRED: Any = ...
"""The default of an option that must be set."""
UNRULED = "unruled"
"""The context in which a section is validated value by value, by one who asks for its problems himself."""
Kind = Literal["bool", "int", "float", "text", "path", "list", "numbers", "object", "objects"]
LIMITS = {"gt": "above {:g}", "ge": "of {:g} or more", "lt": "below {:g}", "le": "at most {:g}"}


def option(
    default: Any,
    *,
    ask: str | None = None,
    was: Iterable[str] = (),
    was_opposite: Iterable[str] = (),
    choices_from: str | None = None,
    spellings: Mapping[str, str] | None = None,
    instead: Mapping[str, str] | None = None,
    advanced: bool = False,
    may_be_empty: bool = False,
    is_secret: bool = False,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare an option; the attribute's name is its key.

    Args:
        default: its value when nobody sets it; REQUIRED if somebody must.
        ask: the wizard's question; None if the wizard does not ask.
        was: older spellings of the key.
        was_opposite: older keys that meant the opposite of this truth value.
        choices_from: names the open set that holds its values, e.g. "optimizer".
        spellings: other spellings of its values, to the right ones.
        instead: values that other trainers have and that are not here, to what to do about it.
        advanced: whether beginners need not see it.
        may_be_empty: whether an empty text, and null where it is allowed, are values; otherwise they count as not set.
        is_secret: whether its value is shown nowhere and stays out of files that a run writes.
        gt, ge, lt, le: limits of a number: greater than, at least, less than, at most.
    """
    declared: Any = {
        "ask": ask,
        "was": list(was),
        "was_opposite": list(was_opposite),
        "choices_from": choices_from,
        "spellings": dict(spellings or {}),
        "instead": dict(instead or {}),
        "advanced": advanced,
        "may_be_empty": may_be_empty,
        "is_secret": is_secret,
        "limits": {name: limit for name, limit in {"gt": gt, "ge": ge, "lt": lt, "le": le}.items() if limit is not None},
    }
    return Field(default, gt=gt, ge=ge, lt=lt, le=le, json_schema_extra={"declared": declared})


@dataclass(frozen=True, slots=True)
class Problem:
    """Options that do not go together."""

    keys: tuple[str, ...]
    text: str
    """What is wrong and which rule says so, naming the options as the user types them."""


@dataclass(frozen=True, slots=True)
class Option:
    """A declaration, read back from its field."""

    key: str
    section: str
    help: str
    kind: Kind
    default: Any
    may_be_none: bool
    choices: tuple[str, ...]
    """The closed set of its values, or nothing."""
    limits: Mapping[str, float]
    ask: str | None
    was: tuple[str, ...]
    was_opposite: tuple[str, ...]
    choices_from: str | None
    spellings: Mapping[str, str]
    instead: Mapping[str, str]
    advanced: bool
    may_be_empty: bool
    is_secret: bool

    @property
    def is_required(self) -> bool:
        return self.default is PydanticUndefined

    @property
    def rule(self) -> str:
        """What its value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {
            "bool": "true or false",
            "int": "a whole number",
            "float": "a number",
            "text": "a text",
            "path": "a path",
            "list": "a list of texts",
            "numbers": "a list of numbers",
            "object": "an object, or key=value,key=value",
            "objects": "an object, a list of objects, or the path of a JSON file",
        }
        return " ".join([words[self.kind], " and ".join(LIMITS[name].format(limit) for name, limit in self.limits.items())]).strip()

    @property
    def default_text(self) -> str:
        """The default as one would write it; empty for none."""
        if self.is_required or self.default is None:
            return ""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


class Ruled(BaseModel):
    """Values that are checked one by one, and then against each other."""

    def problems(self) -> Iterator[Problem]:
        """Name the options that do not go together."""
        yield from ()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        found = [problem.text for problem in self.problems()] if info.context != UNRULED else []
        if found:
            raise ValueError("; ".join(found))
        return self


class Section(Ruled):
    """Options that one component takes, frozen once they are checked."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        return tidy(value, options_of(cls)[str(info.field_name)])


@cache
def options_of(section: type[Section]) -> dict[str, Option]:
    """Read a section's declarations, in the order in which they stand."""
    return {key: _option(key, section) for key in section.model_fields}


def checked(section: type[Section], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read values of some options of a section by themselves: those that are in order, as they are read, and the keys of the others."""
    try:
        read = section.model_validate(dict(values), context=UNRULED)
    except ValidationError as error:
        wrong = {str(details["loc"][0]) for details in error.errors()}
        return checked(section, {key: value for key, value in values.items() if key not in wrong})[0], [key for key in values if key in wrong]
    return {key: getattr(read, key) for key in values}, []


def tidy(value: Any, option: Option) -> Any:
    """Bring a value as people write it into the form that the type's own check understands, or raise ValueError."""
    if isinstance(value, bool) and option.kind != "bool":
        raise ValueError("a truth value")
    if not isinstance(value, str):
        return value
    text = value.strip()
    if option.may_be_none and text == "":
        return None
    if option.choices or option.choices_from:
        text = text.lower()
        return option.spellings.get(text, text)
    if option.kind == "int":
        return _whole(text)
    if option.kind == "path":
        return Path(text).expanduser()
    if option.kind in ("list", "numbers"):
        return json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    if option.kind == "object":
        return json.loads(text) if text.startswith("{") else text
    if option.kind == "objects":
        return json.loads(text) if text.startswith(("{", "[")) else text
    return value if option.kind == "text" else text


def _whole(text: str) -> int | str:
    """Read "20", "20.0" and "2e1" as 20; leave anything else to be refused."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and abs(number) < 2**53 else text


def _option(key: str, section: type[Section]) -> Option:
    field = section.model_fields[key]
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{section.__name__}.{key} is not declared with option()"
    assert field.description, f"{section.__name__}.{key} has no sentence under it"
    declared: dict[str, Any] = extra["declared"]  # type: ignore[assignment]
    kind, choices, may_be_none = _kind(field.annotation)
    return Option(
        key=key,
        section=section.__name__.lower(),
        help=" ".join(field.description.split()),
        kind=kind,
        default=field.default,
        may_be_none=may_be_none,
        choices=choices,
        limits=declared["limits"],
        ask=declared["ask"],
        was=tuple(declared["was"]),
        was_opposite=tuple(declared["was_opposite"]),
        choices_from=declared["choices_from"],
        spellings=declared["spellings"],
        instead=declared["instead"],
        advanced=declared["advanced"],
        may_be_empty=declared["may_be_empty"],
        is_secret=declared["is_secret"],
    )


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """What a field's type means to a user: its kind, its closed set of values, and whether it may be none."""
    if typing.get_origin(annotation) is Literal:
        return "text", typing.get_args(annotation), False
    parts = typing.get_args(annotation) if typing.get_origin(annotation) not in (list, dict) else (annotation,)
    for part in parts:
        if typing.get_origin(part) is Literal:
            return "text", typing.get_args(part), type(None) in parts
    kinds: dict[Any, Kind] = {
        bool: "bool",
        int: "int",
        float: "float",
        str: "text",
        Path: "path",
        list[float]: "numbers",
        list[int]: "numbers",
        list: "list",
        dict: "object",
    }
    found = [kinds[part if part in kinds else typing.get_origin(part) or part] for part in parts or (annotation,) if part is not type(None)]
    if {"object", "list"} <= set(found):
        return "objects", (), type(None) in parts
    return found[0], (), type(None) in parts
