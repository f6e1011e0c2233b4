"""Writes docs/settings.md from efficientvlm/settings/:  python docs/make_settings.py"""

from __future__ import annotations

import json
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from efficientvlm.settings.base import Aside, Strict
from efficientvlm.settings.common import Data, Learning, Machine, Measuring, Read, Samples, Stage, Taught, Train
from efficientvlm.settings.compose import of
from efficientvlm.settings.methods import METHODS
from efficientvlm.settings.stages import STAGES
from efficientvlm.settings.tasks import TASKS

SHARED = {
    Stage: "Output",
    Machine: "Hardware",
    Data: "Data",
    Samples: "Samples",
    Read: "Reading",
    Train: "Training",
    Learning: "Stages that train",
    Taught: "Stages that may have a teacher",
    Measuring: "Stages that measure",
}
HEAD = """# Every setting

Made from `efficientvlm/settings/` by `python docs/make_settings.py`. Any of them can be given as `--set NAME=VALUE`, or in a recipe by its
name, and many have an option of the same name (`--max-steps` for `max_steps`). Values are YAML.

The settings of a stage are those that it shares with other stages, its own, those of the task it is for, and those of the method by which a
teacher is followed. Under each title stand the stages that know the settings; a stage may stand under several. A setting of another task is
unknown, and the message says whose it is.

Settings with ° change nothing of what is learnt. An unfinished stage is [resumed](checkpoints.md#stopped-resumed-crashed) with other values
of them, which its manifest records, and a finished one is up to date. Any other change makes another model. Those that begin with `quirks.`
do what [the published release does](pruning.md#quirks).
"""


def page() -> str:
    """The whole page as Markdown: what stages share, then a table for every stage, for every task and for every method of distillation."""
    parts = [HEAD]
    for shared, title in SHARED.items():
        parts += section(title, [name for name, stage in STAGES.items() if issubclass(stage, shared)], shared)
    for name, stage in STAGES.items():
        parts += section(f"Stage {name}", [], stage)
    for task, stages in TASKS.items():
        for kind in dict.fromkeys(kind for kind in stages.values() if kind not in SHARED):
            users = [name for name, other in stages.items() if issubclass(other, kind)]
            parts += section(f"Task {task}: {', '.join(users)}", [], kind)
    for method, tasks in METHODS.items():
        kinds = [base for kind in tasks.values() for base in taught(kind)]
        knowing = {kind: [task for task, other in tasks.items() if issubclass(other, kind)] for kind in kinds}
        for kind, known in sorted(knowing.items(), key=lambda item: -len(item[1])):
            users = dict.fromkeys(name for task in known for name in TASKS[task] if issubclass(STAGES[name], Taught))
            whose = f", task{'s' * (len(known) > 1)} {', '.join(known)}" if len(known) < len(tasks) else ""
            parts += section(f"Distillation {method}{whose}", [*users], kind)
    return "\n".join(parts).rstrip("\n") + "\n"


def section(title: str, users: list[str], kind: type[Strict]) -> list[str]:
    """What a class of settings has that its parents have not, as a table; nothing where there is nothing."""
    lines = rows(kind)
    return [f"## {title}\n\n{', '.join(users)}\n" if users else f"## {title}\n", table(lines)] if lines else []


def rows(kind: type[Strict]) -> list[str]:
    """A table row a setting that stands under no parent's title; groups of settings under dotted names."""
    parents = [base for base in reversed(kind.__mro__[1:]) if base in titled()]
    inherited = {name: repr(info) for base in parents for name, info in flat(base).items()}
    lines = []
    for name, info in flat(kind).items():
        if inherited.get(name) == repr(info) or (name == "task" and kind not in STAGES.values()):
            continue  # the tasks of a stage stand with it
        words = of_stage(kind, name) or info.annotation
        shown = "*needed*" if info.is_required() else "–" if info.default is None else f"`{json.dumps(usual(info))}`"
        mark = " °" if any(isinstance(part, Aside) for part in info.metadata) else ""
        lines.append(f"| `{name}`{mark} | {values(words)} | {shown} | {(info.description or '').replace('|', '/')} |")
    return lines


@cache
def titled() -> frozenset[type]:
    """The classes of settings that have a title of their own."""
    of_tasks = {kind for stages in TASKS.values() for kind in stages.values()}
    return frozenset(
        {*SHARED, *STAGES.values(), *of_tasks, *(base for tasks in METHODS.values() for kind in tasks.values() for base in taught(kind))}
    )


def taught(kind: type[Strict]) -> list[type[Strict]]:
    """A method's settings on a task, after those that it shares with other tasks."""
    return [*(base for base in kind.__mro__[1:] if issubclass(base, Taught) and base is not Taught), kind]


def of_stage(kind: type[Strict], name: str) -> Any:
    """The words that `task` and `distillation` may be in a stage: they follow from the tables of tasks and methods."""
    stage = next((stage for stage, known in STAGES.items() if known is kind), None)
    return of(stage, {}).model_fields[name].annotation if stage and name == "task" else None


def flat(kind: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, info in kind.model_fields.items():
        group = info.annotation
        found |= flat(group, f"{prefix}{name}.") if is_group(group) else {prefix + name: info}
        if typing.get_origin(group) is dict and is_group(each := plain(typing.get_args(group)[1])):
            found |= flat(each, f"{prefix}{name}.NAME.")
    return found


def is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def plain(kind: Any) -> Any:
    """A type without what is annotated of it."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def usual(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True, validated_data={})


def table(lines: list[str]) -> str:
    return "\n".join(["| setting | values | default | meaning |", "| --- | --- | --- | --- |", *lines, ""])


def values(kind: Any) -> str:
    """A type in plain words."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return values(inside[0])
    if origin is typing.Literal:
        return ", ".join(str(value) for value in inside)
    if origin is tuple:
        return f"[{', '.join(map(values, inside))}]"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(values(part) for part in inside if part is not type(None))
    if origin is list:
        return f"list of {values(inside[0])}"
    if origin is dict:
        return f"name: {'settings' if is_group(plain(inside[1])) else values(inside[1])}"
    return {int: "whole number", float: "number", str: "text", bool: "true, false", Any: "any"}[kind]


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
