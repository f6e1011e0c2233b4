"""Recipes: whole chains of stages in one YAML file, checked completely before the first stage starts.

A value `@name` stands for what the earlier stage `name` writes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from efficientvlm.checkpoints.files import MIB, read_limited
from efficientvlm.errors import BadInput, shorten
from efficientvlm.settings import idle
from efficientvlm.settings.base import Strict, merge, parse, problems_with
from efficientvlm.settings.compose import of, tasks_of
from efficientvlm.settings.plain_yaml import parse_yaml
from efficientvlm.settings.stages import STAGES

FILES = {"eval", "bench"}  # stages whose result is a JSON file, not a folder
LARGEST = MIB
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
TITLE = re.compile(r"[^\W_][\w .-]*")


class Recipe(Strict):
    """A recipe as written: references and defaults are not resolved yet."""

    name: str = Field(min_length=1, max_length=100)
    description: str = ""
    out: str | None = Field(None, description="folder of all stages; runs/NAME by default")
    defaults: dict[str, Any] = Field(default_factory=dict, description="settings of every stage that has them")
    stages: list[dict[str, Any]] = Field(min_length=1, max_length=1000, description="name, stage and the settings of that stage")

    @field_validator("name")
    @classmethod
    def _no_path(cls, name: str) -> str:
        if not TITLE.fullmatch(name):
            raise ValueError("a name is of letters, digits, spaces and . - _ and begins with a letter or digit; it becomes a folder's name")
        return name

    @field_validator("out")
    @classmethod
    def _below_the_working_folder(cls, out: str | None) -> str | None:
        if out is not None and _leaves(out):
            raise ValueError(f"{shorten(out)} is not inside the working folder; give --out to write there")
        return out


class Step(NamedTuple):
    """A stage ready to run."""

    name: str
    stage: str
    config: Strict
    notes: Sequence[str] = ()  # settings that have no effect


def _place(path: str) -> Path:
    """Where `path` is, as far as its text says: links are not followed."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _leaves(path: str) -> bool:
    """Whether `path` is not below the working folder. Where else is written, only who starts a recipe may say, not who wrote it."""
    here = Path.cwd()
    return _place(path) == here or here not in _place(path).parents


def _packaged() -> dict[str, Path]:
    from importlib.resources import files

    root = Path(str(files("efficientvlm.recipes")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def names() -> list[str]:
    """Names of the recipes of this package; one in a folder goes by both: `efficientvlm/vqa`."""
    return list(_packaged())


def source(name_or_path: str) -> str:
    """Text of a recipe: a YAML file, or a recipe of this package by name.

    Raises:
        BadInput: there is none, or the file cannot be read as text.
    """
    packaged = _packaged()
    path = packaged.get(name_or_path, Path(name_or_path))
    if name_or_path not in packaged and path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name_or_path, packaged, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "evlm recipes ls lists them; a file of your own ends in .yaml"
        raise BadInput(f"there is no recipe {name_or_path!r}", f"this package has {', '.join(packaged) or 'none'}", hint)
    content = read_limited(path, LARGEST, "a recipe")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"recipe {name_or_path} cannot be read", "it is not UTF-8 text", "save it as UTF-8") from None


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe, its outermost level checked. See :func:`validate` for the stages.

    Raises:
        BadInput: not found, not YAML, not a mapping, or unknown and missing keys.
    """
    text = source(name_or_path)
    values = parse_yaml(text, f"recipe {name_or_path}", "correct the file")
    if not isinstance(values, dict):
        raise BadInput(f"recipe {name_or_path} is not a recipe", "it is not a mapping of keys to values", "see evlm recipes cat quickstart")
    return parse(Recipe, {"name": Path(name_or_path).stem, **values}, f"recipe {name_or_path}")


def folder(recipe: Recipe, out: str | None = None) -> str:
    """The folder that holds the folders of all stages."""
    return out or recipe.out or f"runs/{recipe.name}"


def validate(recipe: Recipe, overrides: Sequence[str] = (), *, out: str | None = None) -> list[Step]:
    """Every stage with its complete configuration, in order.

    Args:
        overrides: `stage.key=value` changes one stage, `key=value` the defaults; dotted keys reach inside groups of settings.
        out: folder of all stages instead of the recipe's own.

    Raises:
        BadInput: listing every problem of every stage at once.
    """
    problems: list[str] = []
    root = folder(recipe, out)
    known = {str(item.get("name")) for item in recipe.stages}
    own: dict[str, list[str]] = {}
    general = []
    for override in overrides:
        head, dot, rest = override.partition(".")
        if dot and head in known and "=" not in head:
            own.setdefault(head, []).append(rest)
        else:
            general.append(override)
    defaults = merge(recipe.defaults, general)
    kinds = [_settings_of(item, defaults, own.get(str(item.get("name")), [])) for item in recipe.stages]
    problems += _unused(recipe, kinds, defaults, general)
    problems += _hidden_defaults(recipe, kinds, defaults)
    steps: list[Step] = []
    outputs: dict[str, str] = {}
    for number, (item, model) in enumerate(zip(recipe.stages, kinds, strict=True), 1):
        settings = dict(item)
        name, kind = settings.pop("name", None), settings.pop("stage", None)
        where = shorten(name or f"stage {number}")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.append(f"{where}: a stage needs a name of letters, digits, - and _")
            continue
        if name in outputs:
            problems.append(f"{where}: there are two stages of this name")
        if model is None:
            near = difflib.get_close_matches(str(kind), STAGES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(STAGES)}"
            wrong = "missing" if kind is None else f"unknown stage '{shorten(kind)}'"
            problems.append(f"{where}: stage: {wrong}, {hint}")
            outputs[name] = f"{root}/{name}"
            continue
        applicable = {key: value for key, value in _meant(str(kind), defaults).items() if key in model.model_fields}
        merged = merge({"out": f"{root}/{name}" + (".json" if kind in FILES else ""), **applicable, **settings}, own.get(name, []))
        written = settings.get("out", recipe.defaults.get("out"))
        asked = any(override.startswith("out=") for override in (*own.get(name, ()), *general))
        if isinstance(written, str) and not asked and _leaves(written):
            problems.append(f"{where}: out: {shorten(written)} is not inside the working folder; --set {name}.out= may name another")
        values = _follow(merged, outputs, where, problems)
        outputs[name] = str(values["out"])
        try:
            config = parse(model, values, where)
            named = set(settings) | {re.split(r"[.=]", override, maxsplit=1)[0] for override in own.get(name, [])}
            problems += [f"{where}: {line}" for line in idle.refused(config, named)]  # a default may be meant for the other stages
            steps.append(Step(name, str(kind), config, idle.said(config, named)))
        except BadInput as error:
            problems += [f"{where}: {line.strip()}" for line in error.why.strip().splitlines()]
    problems += _overlaps(steps)
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise BadInput(
            f"recipe {recipe.name} has {count}", "\n  " + "\n  ".join(problems), "correct them; evlm recipes validate checks again"
        )
    return steps


def _overlaps(steps: Sequence[Step]) -> list[str]:
    """Problems of stages that write into one place, or one into the output of another."""
    places: dict[Path, str] = {}
    problems = []
    for step in steps:
        out = getattr(step.config, "out", None)
        if out is None:
            continue
        other = places.setdefault(_place(out), step.name)
        if other != step.name:
            problems.append(f"{step.name}: out: {other} writes to {shorten(out)} too")
    for place, name in places.items():
        for above in place.parents:
            if above in places:
                problems.append(f"{name}: out: it is inside the output of {places[above]}")
    return problems


def _settings_of(item: dict[str, Any], defaults: dict[str, Any], assignments: list[str]) -> type[Strict] | None:
    """The settings that a stage of a recipe has, by its task; None where there is no such stage."""
    kind = item.get("stage")
    if not isinstance(kind, str) or kind not in STAGES:
        return None
    return of(kind, merge({**_meant(kind, defaults), **item}, assignments))


def _meant(kind: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """`defaults` of a stage: a task is meant for the stages that learn or measure it."""
    elsewhere = [task for stage in STAGES for task in tasks_of(stage) if task not in tasks_of(kind)]
    return {key: value for key, value in defaults.items() if key != "task" or value not in elsewhere}


def _hidden_defaults(recipe: Recipe, kinds: Sequence[type[Strict] | None], defaults: dict[str, Any]) -> list[str]:
    """Problems of defaults that every stage sets itself: no stage's configuration would show them."""
    problems = []
    for key, value in defaults.items():
        takers = _takers(recipe, kinds, key)
        if takers and all(key in item for item, _ in takers):
            problems += [f"defaults: {line}" for line in problems_with(takers[0][1], key, value)]
    return problems


def _takers(recipe: Recipe, kinds: Sequence[type[Strict] | None], key: str) -> list[tuple[dict[str, Any], type[Strict]]]:
    """The stages that have the setting `key`."""
    return [(item, kind) for item, kind in zip(recipe.stages, kinds, strict=True) if kind and key in kind.model_fields]


def _unused(recipe: Recipe, kinds: Sequence[type[Strict] | None], defaults: dict[str, Any], overrides: list[str]) -> list[str]:
    """Problems of defaults that no stage takes, and of overrides that every stage sets itself: either would change nothing."""
    fields = {field for kind in kinds if kind for field in kind.model_fields}
    problems = []
    for key in defaults:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
            problems.append(
                f"defaults: {key}: unknown key" + (f", did you mean {near[0]}?" if near else ": no stage of this recipe has it")
            )
    for override in overrides:
        key = re.split(r"[.=]", override, maxsplit=1)[0]
        takers = [item for item, _ in _takers(recipe, kinds, key)]
        if takers and all(key in item for item in takers):
            problems.append(f"--set {override}: every stage sets {key} itself, write for example --set {takers[0].get('name')}.{override}")
    return problems


def _follow(value: Any, outputs: dict[str, str], where: str, problems: list[str]) -> Any:
    """`value` with every text `@name` replaced by the output of that earlier stage."""
    if isinstance(value, dict):
        return {key: _follow(item, outputs, where, problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_follow(item, outputs, where, problems) for item in value]
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    if value[1:] not in outputs:
        earlier = f"earlier are {', '.join(list(outputs)[-10:])}" if outputs else "it is the first"
        problems.append(f"{where}: {shorten(value)} is no earlier stage; {earlier}")
    return outputs.get(value[1:], value)
