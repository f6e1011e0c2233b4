"""Commands about whole chains of stages: run, recipes ls | cat | cp | validate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli import output, plan
from efficientvlm.control import Control
from efficientvlm.errors import BadInput, printable

Recipe = Annotated[str, typer.Argument(help="Name of a recipe (see evlm recipes ls), or a YAML file.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="stage.key=value for one stage, key=value for the defaults. Repeatable.", metavar="KEY=VALUE"),
]
Root = Annotated[str | None, typer.Option("--out", help="Folder that holds the folders of all stages.", metavar="DIR")]

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


def run(
    recipe: Recipe,
    out: Root = None,
    assignments: Overrides = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run every stage of a recipe; finished stages are passed over, an interrupted one is resumed."""
    from efficientvlm import recipe as recipes
    from efficientvlm.planning.checks import preflight

    loaded = recipes.load_recipe(recipe)
    steps = recipes.validate(loaded, assignments or [], out=out)
    control = Control(force=force, resume=resume, quiet=quiet or json, json=json)
    if dry_run:
        plan.dry_run(f"recipe {loaded.name}", steps, control, recipe=True)
        return
    preflight(steps).raise_all(f"recipe {loaded.name}")
    from efficientvlm.stages import run as running

    result = running.run_recipe(steps, control)
    output.run_result(result, recipes.folder(loaded, out), as_json=json)


@app.command("ls")
def ls(json: o.Json = False) -> None:
    """List the recipes of this package."""
    from efficientvlm import recipe as recipes

    found = {name: " ".join(recipes.load_recipe(name).description.split()) for name in sorted(recipes.names(), key=_by_folder)}
    if json:
        output.emit({"recipes": [{"name": name, "description": description} for name, description in found.items()]})
        return
    for name, description in found.items():
        output.show(f"{name:<{max(map(len, found))}}  {description}")


def _by_folder(name: str) -> tuple[str, str]:
    """Those in no folder first."""
    folder, _, last = name.rpartition("/")
    return folder, last


@app.command("cat")
def cat(recipe: Recipe) -> None:
    """Print a recipe."""
    from efficientvlm import recipe as recipes

    print(printable(recipes.source(recipe)), end="")


@app.command("cp")
def cp(
    recipe: Recipe,
    target: Annotated[Path, typer.Argument(help="File or folder.", metavar="PATH")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from efficientvlm import recipe as recipes
    from efficientvlm.checkpoints.files import result_path, unwritable, write_atomic

    text = recipes.source(recipe)
    path = target / f"{Path(recipe).stem}.yaml" if target.is_dir() else target
    if os.path.lexists(result_path(path, "recipe.yaml")) and not force:
        raise BadInput(f"{path} exists already", "it may hold changes of yours", "use another name, or --force")
    if not path.parent.is_dir():
        raise BadInput(f"{path} cannot be written", f"there is no folder {path.parent}", "make the folder first")
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise unwritable(path, error) from None
    output.show(path)


@app.command("validate")
def validate(recipe: Recipe, assignments: Overrides = None, out: Root = None, json: o.Json = False) -> None:
    """Check every setting of a recipe; all problems are reported at once."""
    from efficientvlm import recipe as recipes

    loaded = recipes.load_recipe(recipe)
    steps = recipes.validate(loaded, assignments or [], out=out)
    if json:
        output.emit({"recipe": loaded.name, "ok": True, "stages": [{"name": step.name, "stage": step.stage} for step in steps]})
        return
    for step in steps:
        output.show(f"{step.name}: {step.stage} -> {getattr(step.config, 'out', None)}")
    output.show(f"{loaded.name} is valid")
