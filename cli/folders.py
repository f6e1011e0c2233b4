"""Commands that read checkpoint folders and load no model: inspect, verify, report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli import output
from efficientvlm.errors import BadInput

if TYPE_CHECKING:
    from efficientvlm.checkpoints.lineage import Node

Folder = Annotated[str, typer.Argument(help="Checkpoint folder, or bundled:NAME.", metavar="DIR")]


def inspect(
    folder: Annotated[str | None, typer.Argument(help="Checkpoint folder, or bundled:NAME.", metavar="DIR")] = None,
    units: Annotated[bool, typer.Option("--units", help="Also the heads and neurons each layer kept.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of manifests instead.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a checkpoint was made from: parameters, MACs, sparsity and metrics of every stage."""
    from efficientvlm.checkpoints import lineage, manifest

    if schema:
        output.emit(manifest.schema())
        return
    if folder is None:
        raise typer.BadParameter("it is needed and was not given", param_hint="DIR")
    root = lineage.lineage(folder)
    if json:
        output.emit(_as_json(root))
    else:
        output.lineage_tree(root, units=units)


def _as_json(root: Node) -> dict[str, Any]:
    """A flat object however long the chain is: the checkpoint, and each of its ancestors once. Parents are named by their paths."""
    from efficientvlm.checkpoints.files import shown

    def of(node: Node) -> dict[str, Any]:
        return {
            "path": shown(node.path),
            "problem": node.problem,
            "manifest": node.manifest.model_dump(mode="json") if node.manifest else None,
            "parents": [{"role": link.role, "path": shown(link.node.path), "problem": link.problem} for link in node.parents],
        }

    return {**of(root), "ancestors": [of(node) for node in root.walk() if node is not root]}


def verify(folder: Folder, json: o.Json = False) -> None:
    """Hash every file of a checkpoint and of everything it was made from; exit code 3 if any has changed or was added to be loaded."""
    from efficientvlm.checkpoints import lineage
    from efficientvlm.errors import printable

    found = lineage.examine(folder)
    count, problems = found.checkpoints, [printable(problem) for problem in found.problems]
    if json:
        values = {"path": folder, "ok": not problems, "checkpoints": count, "problems": problems, "notes": found.notes}
        output.emit(values)
        raise typer.Exit(3 if problems else 0)
    for note in found.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if problems:
        fix = "restore what has changed, or run the stages again with --force"
        raise BadInput(f"{folder} is not as it was made", "\n  " + "\n  ".join(problems), fix)
    output.show(f"all files of {count} checkpoint{'s' * (count > 1)} are as they were written")
    output.show(folder)


def report(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder, bundled:NAME, or a recipe's output folder.", metavar="DIR")],
    out: Annotated[str | None, typer.Option("--out", help="HTML file; report-NAME.html by default.", metavar="FILE")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file as well.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
    json: o.Json = False,
) -> None:
    """Write one HTML page: figures, curves, kept heads and neurons, lineage, licences, and what is wrong."""
    from efficientvlm.errors import BadInput, printable
    from efficientvlm.report import pages as page

    result = page.run(folder, out, hashes=verify, force=force)
    if json:
        output.emit(result)
    else:
        for problem in result["problems"]:
            print(f"problem: {printable(problem)}")
        output.show(result["path"])
    if verify and result["unverified"]:
        fix = f"{result['path']} was written all the same; restore what has changed"
        raise BadInput(f"{folder} is not as it was made", "\n  " + "\n  ".join(result["unverified"]), fix)
