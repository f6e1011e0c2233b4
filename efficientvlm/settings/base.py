"""What all settings share: they are closed and plain, and every problem of a file or command is told at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo, field_validator

from efficientvlm.errors import BadInput, shorten, without_secrets


@dataclass(frozen=True)
class Aside:
    """Marks a setting that does not change what is learnt, only how it is watched, kept, measured or computed.

    A run is resumed with another value, which its manifest records; a finished checkpoint made with another value is up to date.
    `same_bits`: weights come out the same to the bit; else up to rounding.
    """

    same_bits: bool = True


Device = Annotated[str, Aside(same_bits=False)]
Precision = Literal["fp32", "bf16"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(le=1_000_000_000)]
Size = Annotated[int, Field(le=1_000_000)]  # what is made once for each of them would fill the memory beyond
Pixels = Annotated[int, Field(le=16_384)]
DataName = Annotated[str, PlainSerializer(without_secrets)]
"""Where data lies. What opens an address is used, and never written down with the other settings."""
Threads = Annotated[int, Field(le=4_096)]
DEEPEST = 20  # levels of lists and mappings in a value


def check_plain(value: Any, path: tuple[object, ...] = ()) -> None:
    """Refuse what no setting can be or hold, at any depth: text that cannot be written as UTF-8, numbers without bound, other objects.

    Raises:
        ValueError: saying what it is.
    """
    wrong = ""
    if isinstance(value, str):
        if not _writable(value):
            wrong = f"'{shorten(value)}' is no text that can be written as UTF-8"
    elif isinstance(value, float):
        if not math.isfinite(value):
            wrong = "it is no finite number"
    elif isinstance(value, int):
        if abs(value) >= 2**64:
            wrong = "no number of that size has a meaning here"
    elif isinstance(value, dict | list | tuple):
        if len(path) == DEEPEST:
            wrong = f"it is nested more than {DEEPEST} levels deep"
        for name, part in () if wrong else value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(name, (*path, "key"))
            check_plain(part, (*path, name))
    elif value is not None and not isinstance(value, BaseModel):
        wrong = f"a {type(value).__name__} is neither text, number, list nor mapping; put quotes around it"
    if wrong:
        raise ValueError(": ".join(filter(None, (".".join(map(str, path)), wrong))))


def _writable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True


class Strict(BaseModel):
    """Base of all settings: closed; numbers are finite, text can be written as UTF-8, whatever holds it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)

    @classmethod
    def has(cls, path: Sequence[str]) -> bool:
        """Whether there is a setting of this name, inside of groups where the path has several parts."""
        field = cls.model_fields.get(path[0])
        kind = field and field.annotation
        return field is not None and (len(path) == 1 or (isinstance(kind, type) and issubclass(kind, Strict) and kind.has(path[1:])))

    @classmethod
    def lacking(cls, values: Mapping[str, Any]) -> list[str]:
        """The settings that are needed beside `values`."""
        return [name for name, field in cls.model_fields.items() if field.is_required() and name not in values]

    @classmethod
    def owner(cls, path: Sequence[str]) -> str:
        """Whose a setting is that is unknown here; empty where nobody knows it."""
        return ""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = cls.model_fields[str(info.field_name)].annotation
        grouped = isinstance(value, dict) and isinstance(allowed, type) and issubclass(allowed, Strict)
        check_plain(dict.fromkeys(value) if grouped else value)  # a group looks at its own values, and names them
        if isinstance(value, bool) and bool not in (allowed, *get_args(allowed)):
            raise ValueError(f"it is no switch that could be {str(value).lower()}")
        return value

    @field_validator("out", check_fields=False)
    @classmethod
    def _somewhere(cls, out: str | None) -> str | None:
        if out is not None and not out.strip():
            raise ValueError("it is empty, and names no place")
        return out


T = TypeVar("T", bound=Strict)


def parse(model: type[T], values: dict[str, Any], where: str, fix: str = "correct what is listed") -> T:
    """`values` as `model`; every problem at once, unknown keys with their nearest known key, and what to do about them.

    Raises:
        BadInput: naming `where` (a file or command) and each wrong key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_describe(model, item) for item in error.errors()]
        raise BadInput(
            f"{where} has {len(problems)} wrong setting{'s' * (len(problems) > 1)}",
            "\n  " + "\n  ".join(problems),
            fix,
        ) from None


def problems_with(model: type[Strict], name: str, value: Any, among: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with one setting by itself, whatever the others are.

    Args:
        among: settings that are given with it: what is wrong only because one of them would be missing is not.
    """

    def found(values: Mapping[str, Any]) -> list[str]:
        try:
            model.model_validate(values)
        except ValidationError as error:
            return [_describe(model, item) for item in error.errors() if item["loc"][:1] == (name,)]
        return []

    alone = found({name: value})
    return alone if among is None or not alone else [problem for problem in alone if problem in found(among)]


def _describe(model: type[Strict], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] in ("too_short", "too_long"):
        return f"{name}: {_wrong_count(item['ctx'])}"
    if item["type"] != "extra_forbidden":
        message = str(item["msg"]).removeprefix("Value error, ")
        return f"{name}: {message[:1].lower()}{message[1:]}"
    if owner := model.owner(path):
        return f"{name}: it belongs to {owner}"
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, Strict):
            model = annotation
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1, cutoff=0.5)
    return f"{name}: unknown key" + (f", did you mean {near[0]}?" if near else f"; known are {', '.join(model.model_fields)}")


def _wrong_count(found: Mapping[str, Any]) -> str:
    """What to say of a list with too few or too many entries."""
    given = found["actual_length"]
    limit = f"at least {found['min_length']}" if "min_length" in found else f"at most {found['max_length']}"
    return f"it has {given or 'no'} entr{'y' if given == 1 else 'ies'}, and takes {limit}"


def merge(base: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """`base` with `key=value` assignments applied; keys may be dotted, values are YAML.

    Raises:
        BadInput: an assignment without `=` or through a value that is no mapping.
    """
    from efficientvlm.settings.plain_yaml import parse_yaml

    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        if not found or not key:
            raise BadInput(f"--set {assignment}", "it is not key=value", "write for example --set lr=3e-4")
        value = parse_yaml(text, f"--set {assignment}", "put quotes around the value")
        target = merged
        *path, last = key.split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise BadInput(f"--set {assignment}", f"{part} is not a group of settings", "see the settings in the documentation")
        target[last] = value
    return merged


def settings_of(config: Strict, *names: str) -> dict[str, Any]:
    """Some fields of a stage's configuration, by name."""
    return {name: getattr(config, name) for name in names}
