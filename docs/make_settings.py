"""Writes docs/settings.md from efficientvlm/settings/:  python docs/make_settings.py"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from efficientvlm.settings.base import Aside, Strict
from efficientvlm.settings.common import Data, Stage, Train
from efficientvlm.settings.methods import Quirks
from efficientvlm.settings.stages import STAGES
from efficientvlm.settings.tasks import TaskStage

TITLES = {Stage: "Output and hardware", Data: "Data", Train: "Training", TaskStage: "Training on a task"}
HEAD = """# Every setting

Made from `efficientvlm/settings/` by `python docs/make_settings.py`. Any of them can be given as `--set NAME=VALUE`, or in a recipe by its
name, and many have an option of the same name (`--max-steps` for `max_steps`). Values are YAML. Under each title stand the stages that know
the settings; a stage may stand under several.

Settings with ° change nothing of what is learnt. An unfinished stage is [resumed](checkpoints.md#stopped-resumed-crashed) with other values
of them, which its manifest records, and a finished one is up to date. Any other change makes another model.
"""


def page() -> str:
    """The whole page as Markdown: a table for every class of settings, shared ones first."""
    classes = list(dict.fromkeys(base for stage in STAGES.values() for base in stage.__mro__ if issubclass(base, Strict)))
    classes = [model for model in classes if own_fields(model)]
    parts = [HEAD]
    for model in sorted(classes, key=lambda model: list(TITLES).index(model) if model in TITLES else len(TITLES)):
        users = ", ".join(name for name, stage in STAGES.items() if issubclass(stage, model))
        parts.append(f"## {TITLES[model]}\n\n{users}\n" if model in TITLES else f"## {users}\n")
        parts += [table(rows(own_fields(model)))]
    users = ", ".join(name for name, stage in STAGES.items() if "quirks" in stage.model_fields)
    parts.append(f"## Quirks\n\n{users}; see [pruning.md](pruning.md#quirks)\n\n{table(rows(Quirks.model_fields, 'quirks.'))}")
    return "\n".join(parts).rstrip("\n") + "\n"


def own_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields that no parent class has in the same form."""
    inherited = {name: info for base in model.__mro__[1:] if issubclass(base, Strict) for name, info in base.model_fields.items()}
    return {name: info for name, info in model.model_fields.items() if name not in inherited or repr(info) != repr(inherited[name])}


def rows(fields: dict[str, FieldInfo], prefix: str = "") -> list[str]:
    """A table row a setting; groups of settings under dotted names, except quirks, which have their own table."""
    lines = []
    for name, info in fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            lines += rows(group.model_fields, f"{name}.") if group is not Quirks else []
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        shown = "*needed*" if info.is_required() else "–" if default is None else f"`{json.dumps(default)}`"
        mark = " °" if any(isinstance(part, Aside) for part in info.metadata) else ""
        lines.append(f"| `{prefix}{name}`{mark} | {values(group)} | {shown} | {(info.description or '').replace('|', '/')} |")
    return lines


def table(lines: list[str]) -> str:
    return "\n".join(["| setting | values | default | meaning |", "| --- | --- | --- | --- |", *lines, ""])


def values(kind: Any) -> str:
    """A type in plain words."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return values(inside[0])
    if origin is typing.Literal:
        return ", ".join(str(value) for value in inside)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(values(part) for part in inside if part is not type(None))
    if origin is list:
        return f"list of {values(inside[0])}"
    if origin is dict:
        return f"name: {values(inside[1])}"
    return {int: "whole number", float: "number", str: "text", bool: "true, false", Any: "any"}[kind]


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
