"""What the commands print: results on stdout, as text for people or as one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from efficientvlm.lineage import Node
    from efficientvlm.manifest import Manifest


def console() -> Console:
    """Standard output with colour on a terminal only. Rich itself honours NO_COLOR."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, force_terminal=terminal, width=None if terminal else 200)


def emit(value: Any) -> None:
    """`value` as one JSON object."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def checkpoint_result(path: Path, *, as_json: bool, quiet: bool) -> None:
    """Summary of a checkpoint a stage has written; its last line is the path."""
    from efficientvlm import manifest as manifests
    from efficientvlm.card import number, results, size_rows

    manifest = manifests.read(path)
    if as_json:
        emit({"path": str(path), **manifest.model_dump(mode="json")})
        return
    if not quiet:
        sizes_shown = [row for row in size_rows(manifest.accounting) if not row[0].startswith("parameters, ")]
        for key, value in [*sizes_shown, *((key, number(value)) for key, value in results(manifest.metrics))]:
            print(f"{key}: {value}")
    print(path)


def mapping_result(result: dict[str, Any], out: str | None, *, as_json: bool, keys: Sequence[str] = ()) -> None:
    """A result that is no checkpoint: a line a value, a table for a list of records; last the file it was written to, if any.

    People see only `keys` of it, where they are there.
    """
    from efficientvlm.card import flatten, number

    if as_json:
        emit(result)
        return
    chosen = {key: result[key] for key in keys if key in result} or result
    for key, value in flatten(chosen):
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            records_table(value)
        elif isinstance(value, list):
            print(f"{key}: {', '.join(number(item) for item in value)}")
        else:
            print(f"{key}: {number(value)}")
    if out:
        print(out)


def run_result(result: dict[str, Any], out: str, *, as_json: bool) -> None:
    """What a recipe came to: the text of its report if it ends in one, else a line a stage; last the folder."""
    if as_json:
        emit(result)
        return
    last = result.get("result")
    if isinstance(last, dict) and isinstance(last.get("text"), str):
        print(last["text"].rstrip())
    else:
        records_table(result["stages"])
    print(out)


def records_table(records: list[dict[str, Any]]) -> None:
    """Records as a table: a column a key, in order of first appearance; nested mappings become dotted keys."""
    from rich.table import Table
    from rich.text import Text

    from efficientvlm.card import flatten, number

    flat = [dict(flatten(record)) for record in records]
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for record in flat for name in record))
    for name in names:
        numeric = all(isinstance(record.get(name, 0), int | float) for record in flat)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for record in flat:
        table.add_row(*(Text(number(record[name]) if name in record else "") for name in names))
    console().print(table)


def lineage_tree(root: Node, *, units: bool) -> None:
    """A checkpoint above what it was made from, with the figures of each."""
    from rich.tree import Tree

    def branch(node: Node, tree: Tree | None) -> Tree:
        label = _label(node)
        below = Tree(label) if tree is None else tree.add(label)
        if node.manifest and units and tree is None:
            for line in _unit_lines(node.manifest):
                label.append(f"\n{line}", style="dim")
        for parent in node.parents:
            branch(parent, below)
        return below

    console().print(branch(root, None))


def _label(node: Node) -> Any:
    from rich.text import Text

    from efficientvlm.card import number, results, sizes
    from efficientvlm.files import shown

    label = Text()
    if node.role:
        label.append(f"{node.role}: ", style="dim")
    label.append(shown(node.path), style="bold")
    manifest = node.manifest
    if manifest:
        label.append(f"  {manifest.stage}" + (f" ({manifest.origin})" if manifest.origin else ""), style="cyan")
        for line in filter(None, (sizes(manifest), "  ".join(f"{key} {number(value)}" for key, value in results(manifest.metrics)))):
            label.append(f"\n{line}")
        for line, style in _influence(manifest):
            label.append(f"\n{line}", style=style)
    if node.problem:
        label.append(f"\n{node.problem}", style="red")
    return label


def _influence(manifest: Manifest) -> list[tuple[str, str]]:
    """What is known of the influence of its inputs: lines with their style."""
    from efficientvlm import influence

    measured = influence.read(influence.Influence, manifest.extra.get("influence"))
    reach = influence.read(influence.Reach, manifest.accounting.get("reach"))
    lines = [(f"influence of {measured.summary()}", "")] if measured and measured.inputs else []
    if not measured and manifest.stage in influence.MEASURING:
        lines.append(("influence of its inputs: not measured", ""))
    lines += [(line, "red") for line in influence.problems(measured, reach)]
    return lines + [(line, "") for line in influence.notes(measured, reach)]


def _unit_lines(manifest: Manifest) -> list[str]:
    units: dict[str, dict[str, int]] = manifest.accounting.get("units") or {}
    layers: dict[str, list[str]] = {}
    for group, count in units.items():
        tower, layer, kind = group.split(".", 2)
        plural = {"head": "heads", "cross_head": "cross heads", "neuron": "neurons"}.get(kind, kind)
        layers.setdefault(f"{tower} {layer}", []).append(f"{count['kept']}/{count['of']} {plural}")
    return [f"{layer}: {', '.join(parts)}" for layer, parts in layers.items()]
