"""plan: what a recipe would make and cost, before anything is trained. Also what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli import output
from efficientvlm.cli.shapes import Asked, refuse, shapes
from efficientvlm.control import Control
from efficientvlm.errors import printable

if TYPE_CHECKING:
    from efficientvlm.planning.parts import Forecast
    from efficientvlm.planning.plan import Plan
    from efficientvlm.recipe import Step

STUDENTS = "Students of a model"


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe (see evlm recipes ls), or a YAML file.", metavar="[RECIPE]", show_default=False)
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder that holds the folders of all stages.", metavar="DIR")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="stage.key=value for one stage, key=value for the defaults. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    measure: Annotated[
        int, typer.Option("--measure", help="Time so many training steps of every stage; 0 says nothing of time.", min=0)
    ] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the files of all checkpoints that are read, and the data.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="List students of this checkpoint.", metavar="DIR", rich_help_panel=STUDENTS)
    ] = None,
    parameters: Annotated[
        float | None, typer.Option("--parameters", help="Share of parameters.", min=0, max=1, rich_help_panel=STUDENTS)
    ] = None,
    macs: Annotated[float | None, typer.Option("--macs", help="Share of multiply-adds.", min=0, max=1, rich_help_panel=STUDENTS)] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="How far both may be off; 0.005 by default.", min=0, max=1, rich_help_panel=STUDENTS),
    ] = None,
    pass_name: Annotated[
        str | None,
        typer.Option(
            "--pass",
            help="Whose multiply-adds: reranked, dual, fused, caption, answer or all; the first that the model makes by default.",
            metavar="NAME",
            rich_help_panel=STUDENTS,
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Side of the images; the model's by default.", min=1, rich_help_panel=STUDENTS)
    ] = None,
    text_length: Annotated[
        int | None, typer.Option("--text-length", help="Tokens of a text; 30 by default.", min=1, rich_help_panel=STUDENTS)
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            help="What --parameters is a share of: network (default), encoders (of images and texts), or a NUMBER; "
            "with the last two only the student's encoders are counted.",
            metavar="NAME|NUMBER",
            rich_help_panel=STUDENTS,
        ),
    ] = None,
    equal_widths: Annotated[
        bool, typer.Option("--equal-widths", help="Only students whose images are as wide as their texts.", rich_help_panel=STUDENTS)
    ] = False,
    top: Annotated[int | None, typer.Option("--top", help="List so many; 20 by default.", min=1, rich_help_panel=STUDENTS)] = None,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show sizes, memory, steps and disk of every stage of a recipe, and all that is wrong with it; nothing is trained or written.

    With --model, list the students of other width that have given shares of its parameters and multiply-adds.
    """
    asked = Asked(parameters, macs, tolerance, pass_name, image_size, text_length, of, equal_widths, top)
    if (recipe is None) == (model is None):
        raise typer.BadParameter("give a recipe to plan, or --model to list its students", param_hint="RECIPE")
    if model is not None:
        ours = {"--out": out, "--set": assignments, "--measure": measure, "--verify": verify}
        if given := [flag for flag, value in ours.items() if value]:
            raise typer.BadParameter(f"{given[0]} is about a recipe", param_hint=given[0])
        shapes(model, asked, json=json)
        return
    assert recipe is not None
    refuse(asked)
    from efficientvlm import recipe as recipes

    loaded = recipes.load_recipe(recipe)
    steps = recipes.validate(loaded, assignments or [], out=out)
    control = Control(force=force, resume=resume, quiet=quiet or json, json=json)
    forecast = _planned(steps, control, measure=measure, verify=verify)
    if json:
        output.emit(_recipe_object(loaded.name, steps, forecast))
        raise typer.Exit(forecast.problems.exit_code)
    _tables(forecast, f"recipe {loaded.name}", output.console())
    forecast.problems.raise_all(f"recipe {loaded.name}")


def dry_run(name: str, steps: Sequence[Step], control: Control, *, recipe: bool) -> None:
    """Print settings and plan as one JSON object, and for people the tables of the plan to standard error.

    Raises:
        BadInput, TargetMissed: whatever is wrong, all of it; with `--json` it is in the object, and the exit code tells.
    """
    from rich.console import Console

    forecast = _planned(steps, control)
    if not control.json:
        forecast.problems.raise_all(name)
    if recipe:
        output.emit(_recipe_object(name.removeprefix("recipe "), steps, forecast))
    else:
        (step,), (stage,) = steps, forecast.stages
        rest = {key: value for key, value in forecast.totals().items() if key != "memory"}
        output.emit({"stage": step.stage, "config": step.config.model_dump(mode="json"), "plan": {**stage.as_dict(), **rest}})
    if not control.quiet:
        terminal = Console(stderr=True).is_terminal
        _tables(forecast, name, Console(stderr=True, highlight=False, width=None if terminal else 200))
    if control.json:
        raise typer.Exit(forecast.problems.exit_code)


def _planned(steps: Sequence[Step], control: Control, **options: Any) -> Plan:
    from efficientvlm.planning.plan import plan as planned

    return planned(steps, control, **options)


def _recipe_object(name: str, steps: Sequence[Step], forecast: Plan) -> dict[str, Any]:
    stages = [
        {"name": step.name, "stage": step.stage, "config": step.config.model_dump(mode="json"), "plan": stage.as_dict()}
        for step, stage in zip(steps, forecast.stages, strict=True)
    ]
    return {"recipe": name, "stages": stages, "plan": forecast.totals()}


def _tables(forecast: Plan, title: str, console: Any) -> None:
    """Stages with their cost, then parameters and multiply-adds by tower, then what has to be said in words."""
    _print(console, title, [_row(stage) for stage in forecast.stages])
    for key, heading in (("parameters", "parameters"), ("macs", "multiply-adds of one image and one question")):
        if rows := [row for stage in forecast.stages if (row := _towers(stage, key))]:
            _print(console, f"\n{heading}", rows)
    for line in _lines(forecast):
        console.print(printable(line), soft_wrap=True, markup=False)


def _row(stage: Forecast) -> dict[str, str]:
    from efficientvlm.planning.costs import size

    schedule, memory, disk = stage.schedule or {}, stage.memory or {}, stage.disk or {}
    return {
        "stage": stage.name,
        "runs": stage.stage,
        "status": stage.status,
        "structure": (stage.structure or "").partition(":")[0],
        "sparsity": f"{stage.after['sparsity']:.4f}" if stage.after else "",
        "images": f"{schedule['images']:,}" if schedule.get("images") is not None else "",
        "epochs": f"{schedule['epochs']:g}" if schedule.get("epochs") else "",
        "steps": f"{schedule['steps']:,}" if "steps" in schedule else "",
        "saves": str(schedule.get("saves", "")),
        "memory": size(memory["total"]) if memory else "",
        "written": size(disk["output"]) if disk else "",
        "at its fullest": size(disk["peak"]) if disk else "",
        "time": _duration(stage.time["seconds"]) if stage.time else "",
    }


def _towers(stage: Forecast, key: str) -> dict[str, str]:
    from efficientvlm.checkpoints.card import short

    before, after = (side[key] if side else None for side in (stage.before, stage.after))
    if after is None or stage.status == "cannot run":
        return {}
    towers = dict.fromkeys([*(before or after)["by_tower"], *after["by_tower"]])

    def change(old: int | None, new: int) -> str:
        return short(new) if old in (None, new) else f"{short(old or 0)} → {short(new)}"

    cells = {tower: change(before and before["by_tower"].get(tower, 0), after["by_tower"].get(tower, 0)) for tower in towers}
    return {"stage": stage.name, **cells, "in all": change(before and before["total"], after["total"])}


def _lines(forecast: Plan) -> Iterator[str]:
    from efficientvlm.planning.costs import size

    yield ""
    for stage in forecast.stages:
        remarks = [part for part in (stage.structure or "").split(": ", 1)[1:]] + stage.notes
        for remark in remarks:
            yield f"{stage.name}: {remark}"
    measured = any(stage.time for stage in forecast.stages if stage.run)
    most = max((stage.memory["total"] for stage in forecast.stages if stage.memory), default=0)
    if most:
        yield f"memory: {size(most)} at most in all, with activations as {'measured on real steps' if measured else 'estimated'}"
    for disk in forecast.disks:
        peak, left, free = (size(disk[key]) for key in ("peak", "left", "free"))
        yield f"disk: {peak} at the fullest, {left} in the end; {free} are free in {disk['folder']}"
    if forecast.seconds is not None:
        yield f"time: {_duration(forecast.seconds)} of training, from measured steps; validation, eval and bench come on top"
    elif any(stage.run for stage in forecast.stages):
        yield "time: not measured; evlm plan --measure 3 runs three steps of every stage"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print(console: Any, title: str, rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    names.sort(key=lambda name: name == "in all")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        words = name in ("stage", "runs", "status", "structure")
        table.add_column(output.plain(name), justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(output.plain(row.get(name, "")) for name in names))
    console.print(output.plain(title, style="bold"))
    console.print(table)
