"""What the commands print: results on stdout, as text for people or as one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientvlm.errors import UNSHOWN, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from efficientvlm.checkpoints.lineage import Node
    from efficientvlm.checkpoints.manifest import Manifest

PLURAL = {"head": "heads", "cross_head": "cross heads", "second_cross_head": "cross heads for the second image", "neuron": "neurons"}
"""Kinds of what can be removed."""
DEEPEST = 20  # generations that are drawn one beside the other


def console() -> Console:
    """Standard output with colour on a terminal only. Rich itself honours NO_COLOR."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, force_terminal=terminal, width=None if terminal else 200)


def emit(value: Any) -> None:
    """`value` as one JSON object."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) if utf8 else json.dumps(value, indent=2, allow_nan=False))


def show(text: object) -> None:
    """A line on standard output, without anything that a terminal would obey: it may come from a file of others."""
    print(printable(text))


def plain(text: object, **options: Any) -> Text:
    """`text` for a table or tree of Rich, as :func:`show` would print it."""
    from rich.text import Text

    return Text(printable(text), **options)


def checkpoint_result(path: Path, *, as_json: bool, quiet: bool) -> None:
    """Summary of a checkpoint a stage has written; its last line is the path."""
    from efficientvlm.checkpoints import manifest as manifests
    from efficientvlm.checkpoints.card import number, results, size_rows

    manifest = manifests.read(path)
    if as_json:
        emit({"path": str(path), **manifest.model_dump(mode="json")})
        return
    if not quiet:
        sizes_shown = [row for row in size_rows(manifest.accounting) if not row[0].startswith("parameters, ")]
        for key, value in [*sizes_shown, *((key, number(value)) for key, value in results(manifest.metrics))]:
            show(f"{key}: {value}")
    show(path)


def mapping_result(result: dict[str, Any], out: str | None, *, as_json: bool, keys: Sequence[str] = ()) -> None:
    """A result that is no checkpoint: a line a value, a table for a list of records; last the file it was written to, if any.

    People see only `keys` of it, where they are there.
    """
    from efficientvlm.checkpoints.card import flatten, number

    if as_json:
        emit(result)
        return
    chosen = {key: result[key] for key in keys if key in result} or result
    for key, value in flatten(chosen):
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            records_table(value)
        elif isinstance(value, list):
            show(f"{key}: {', '.join(number(item) for item in value)}")
        else:
            show(f"{key}: {number(value)}")
    if out:
        show(out)


def run_result(result: dict[str, Any], out: str, *, as_json: bool) -> None:
    """What a recipe came to: the text of its report if it ends in one, else a line a stage; last the folder."""
    if as_json:
        emit(result)
        return
    last = result.get("result")
    if isinstance(last, dict) and isinstance(last.get("text"), str):
        show(last["text"].rstrip())
    else:
        records_table(result["stages"])
    show(out)


def records_table(records: list[dict[str, Any]]) -> None:
    """Records as a table: a column a key, in order of first appearance; nested mappings become dotted keys."""
    from rich.table import Table

    from efficientvlm.checkpoints.card import flatten, number

    flat = [dict(flatten(record)) for record in records]
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for record in flat for name in record))
    for name in names:
        numeric = all(isinstance(record.get(name, 0), int | float) for record in flat)
        table.add_column(plain(name), justify="right" if numeric else "left", overflow="fold")
    for record in flat:
        table.add_row(*(plain(number(record[name]) if name in record else "") for name in names))
    console().print(table)


def lineage_tree(root: Node, *, units: bool) -> None:
    """A checkpoint above what it was made from, with the figures of each."""
    from rich.text import Text
    from rich.tree import Tree

    label = _label(root)
    if root.manifest and units:
        for line in _unit_lines(root.manifest):
            label.append(f"\n{line}", style="dim")
    tree, seen = Tree(label), {id(root)}
    waiting = [(link, tree, 1) for link in reversed(root.parents)]
    while waiting:
        link, above, depth = waiting.pop()
        again = id(link.node) in seen
        label = Text(f"{printable(link.role)}: ", style="dim") + (_name(link.node) if again else _label(link.node))
        if again:
            label.append("  as above", style="dim")
        if link.problem:
            label.append(f"\n{printable(link.problem)}", style="red")
        below = above.add(label)
        if not again:
            seen.add(id(link.node))
            below = below if depth < DEEPEST else above  # a long chain goes on straight down
            waiting += [(parent, below, depth + 1) for parent in reversed(link.node.parents)]
    console().print(tree)


def _name(node: Node) -> Any:
    from rich.text import Text

    from efficientvlm.checkpoints.files import shown

    return Text(printable(shown(node.path)), style="bold")


def _label(node: Node) -> Any:
    from rich.text import Text

    from efficientvlm.checkpoints.card import number, results, sizes

    label = Text() + _name(node)
    manifest = node.manifest
    if manifest:
        stage = printable(manifest.stage)
        label.append(f"  {stage}" + (f" ({manifest.origin})" if manifest.origin else ""), style="cyan")
        for line in filter(None, (sizes(manifest), "  ".join(f"{key} {number(value)}" for key, value in results(manifest.metrics)))):
            label.append(f"\n{printable(line)}")
        for line, style in _influence(manifest):
            label.append(f"\n{printable(line)}", style=style)
    if node.problem:
        label.append(f"\n{printable(node.problem)}", style="red")
    return label


def _influence(manifest: Manifest) -> list[tuple[str, str]]:
    """What is known of the influence of its inputs: lines with their style."""
    from efficientvlm.checkpoints import influence

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
        plural = PLURAL.get(kind, kind)
        layers.setdefault(printable(f"{tower} {layer}"), []).append(f"{count['kept']}/{count['of']} {plural}")
    return [f"{layer}: {', '.join(parts)}" for layer, parts in layers.items()]
