"""The settings of a stage that learns or measures a task: those of the stage, of its task and of its method of distillation together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, create_model

from efficientvlm.settings.base import Aside, Strict, parse
from efficientvlm.settings.common import OnTask, Taught
from efficientvlm.settings.methods import METHODS
from efficientvlm.settings.stages import STAGES
from efficientvlm.settings.tasks import TASKS


class Composed(OnTask):
    """Settings of one stage on one task. A setting that is unknown there may be one of another task, and then it is said of which."""

    variant: ClassVar[tuple[str, str | None, str | None]]
    """Stage, task and method of distillation."""

    @classmethod
    def owner(cls, path: Sequence[str]) -> str:
        stage, task, _ = cls.variant
        knowing = [kind.variant for kind in variants(stage) if issubclass(kind, Composed) and kind.has(path)]
        methods = [f"distillation {method}" for _, known, method in knowing if known == task]
        tasks = dict.fromkeys(str(known) for _, known, _ in knowing)
        return " or ".join(methods) or ("task " + " or ".join(tasks) if tasks else "")


class Unjudged(Strict):
    """What stands for the class of a task or method that there is not: the settings of the stage are judged, all others are not."""

    model_config = ConfigDict(extra="ignore")


def of(stage: str, values: Mapping[str, Any]) -> type[Strict]:
    """The class of settings of `stage` for the task and the method of distillation that `values` name, else for the usual ones."""
    base = STAGES[stage]
    if not issubclass(base, OnTask):
        return base
    task, tasks = base.task_of(values), tasks_of(stage)
    if task is None:
        return _composed(base, (), (stage, None, None), tuple(tasks), ())
    if task not in list(tasks):
        return _composed(base, (Unjudged,), (stage, None, None), tuple(tasks), ())
    methods = methods_of(stage, task)
    usual = [name for name in methods if name == base.model_fields["distillation"].default] or methods
    method = values.get("distillation", usual[0]) if methods else None
    if methods and method not in methods:
        return _composed(base, (tasks[task], Unjudged), (stage, task, usual[0]), tuple(tasks), methods)
    parts = (*([METHODS[method][task]] if method else []), tasks[task])
    return _composed(base, parts, (stage, task, method), tuple(tasks), methods)


def stage_settings(stage: str, values: Mapping[str, Any], where: str = "") -> Any:
    """The settings of `stage` with `values`, all others at their defaults.

    Raises:
        BadInput: naming `where`, by default the stage, and every wrong setting.
    """
    return parse(of(stage, values), dict(values), where or f"stage {stage}")


def tasks_of(stage: str) -> dict[str, type[OnTask]]:
    """Task → what only the task knows in `stage`, of the tasks that the stage learns or measures."""
    return {task: stages[stage] for task, stages in TASKS.items() if stage in stages}


def methods_of(stage: str, task: str) -> tuple[str, ...]:
    """The methods of distillation that `stage` may follow on `task`."""
    return tuple(name for name, tasks in METHODS.items() if task in tasks) if issubclass(STAGES[stage], Taught) else ()


def variants(stage: str) -> Iterator[type[Strict]]:
    """The settings of `stage` for each of its tasks and methods."""
    if not tasks_of(stage):
        yield STAGES[stage]
    for task in tasks_of(stage):
        yield from (of(stage, {"task": task, "distillation": method}) for method in methods_of(stage, task) or (None,))


def asides(stage: str) -> dict[str, Aside]:
    """The settings of a stage that do not change what is learnt, by name."""
    fields = [item for kind in (variants(stage) if stage in STAGES else ()) for item in kind.model_fields.items()]
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Aside)}


@lru_cache(maxsize=256)
def _composed(
    base: type[OnTask],
    parts: tuple[type[Strict], ...],
    variant: tuple[str, str | None, str | None],
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
) -> type[Strict]:
    """One class of settings; where two of its parts have a group of the same name, the groups are one as well."""
    _, task, method = variant
    fields: dict[str, Any] = {"task": _one_of(base, "task", tasks, task or base.model_fields["task"].default)}
    if methods:
        fields["distillation"] = _one_of(base, "distillation", methods, method)
        if any(getattr(part, "teacherless", False) for part in parts):
            fields["teacher"] = (str | None, Field(None, description="the teacher; not needed where stores hold what it says"))
    elif task and issubclass(base, Taught):
        fields["teacher"] = (Annotated[str | None, AfterValidator(_untaught)], base.model_fields["teacher"])
    groups: dict[str, list[type[Strict]]] = {}
    for part in (base, *parts):
        for name, field in part.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Strict) and field.annotation not in groups.get(name, []):
                groups.setdefault(name, []).append(field.annotation)
    for name, kinds in groups.items():
        if len(kinds) > 1:
            group = create_model(name.title(), __base__=tuple(kinds))
            fields[name] = (group, Field(default_factory=group))
    compose: Any = create_model
    composed: type[Composed] = compose(f"{base.__name__} of {task}", __base__=(Composed, base, *parts), **fields)
    composed.variant = variant
    return composed


def _one_of(base: type[Strict], name: str, words: tuple[str, ...], usual: Any) -> Any:
    return Literal[words], Field(usual, description=base.model_fields[name].description)


def _untaught(teacher: str | None) -> str | None:
    if teacher:
        raise ValueError("no method of distillation knows this task; leave the teacher out")
    return teacher
