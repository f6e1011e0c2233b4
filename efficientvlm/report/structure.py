"""Section on structure: which heads and how many neurons each layer kept, and the sparsity asked and reached."""

from __future__ import annotations

from typing import Any

from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report.charts import bar, bullet, percent
from efficientvlm.report.markup import Html, table, tag
from efficientvlm.report.story import Chapter, Story, origins

KINDS = {
    "head": "heads",
    "cross_head": "cross-attention heads",
    "second_cross_head": "cross-attention heads for the second image",
    "neuron": "neurons",
}
CELL, A_ROW = 14, 16
COUNTED = {"macs": ("multiply-adds", 1), "latency": ("ms", 10**6)}
"""What budgets that do not count weights count, and how many of it make one that is told."""
Counts = dict[str, tuple[list[int] | None, int, int]]
"""Group → original indices kept (None: not known), how many are kept, how many there were."""


def section(story: Story) -> Html | None:
    """A picture for every different structure; those that lost nothing are folded."""
    groups: list[tuple[list[Chapter], Counts]] = []
    for chapter, manifest in story.readable:
        counts = counts_of(chapter, manifest)
        same = next((members for members, other in groups if other == counts), None)
        if not counts:
            continue
        if same is None:
            groups.append(([chapter], counts))
        else:
            same.append(chapter)
    if not groups:
        return None
    parts = [_group(story, chapters, counts) for chapters, counts in groups]
    how = "A row is a layer. A filled square is a head that was kept, a dashed one a head that was removed; the bar is the neurons kept."
    return tag("section", tag("h2", "Structure"), tag("p", how, class_="soft small"), parts, id="structure")


def counts_of(chapter: Chapter, manifest: Manifest) -> Counts:
    """From the configuration; from the manifest's counts where that could not be read."""
    if chapter.structure is not None:
        return {group: (indices, len(indices), of) for group, (indices, of) in chapter.structure.items()}
    units = manifest.accounting.get("units") or {}
    return {group: (None, count["kept"], count["of"]) for group, count in units.items()}


def _group(story: Story, chapters: list[Chapter], counts: Counts) -> Html:
    names = " = ".join(chapter.label for chapter in chapters)
    picture = Html(layers(counts, origins(story, chapters[0])) + sparsities(chapters))
    totals = [
        f"{sum(kept for group, (_, kept, _) in counts.items() if group.endswith('.' + kind)):,} of "
        f"{sum(of for group, (_, _, of) in counts.items() if group.endswith('.' + kind)):,} {name}"
        for kind, name in KINDS.items()
        if any(group.endswith("." + kind) for group in counts)
    ]
    if all(kept == of for _, kept, of in counts.values()):
        return tag("details", tag("summary", f"{names}: nothing removed, {', '.join(totals)}"), picture)
    return Html(tag("h3", names) + tag("p", f"Kept: {', '.join(totals)}.") + picture)


def layers(counts: Counts, before: dict[str, list[int]]) -> Html:
    """A table of all layers; `before` tells which layer of the first network each one was."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for group, units in counts.items():
        tower, place, kind = group.split(".")
        rows.setdefault((tower, int(place)), {})[kind] = units
    kinds = [kind for kind in KINDS if any(kind in row for row in rows.values())]
    lines = []
    for (tower, layer), row in rows.items():
        was = before.get(tower, [])
        origin = tag("span", f" was {was[layer]}", class_="soft small") if layer < len(was) and was[layer] != layer else None
        pictures = [_units(kind, *row[kind]) if kind in row else None for kind in kinds]
        lines.append([[f"{tower} {layer}", origin], *pictures])
    return table(["layer", *(KINDS[kind] for kind in kinds)], lines, class_="structure")


def _units(kind: str, indices: list[int] | None, kept: int, of: int) -> Html:
    if kind == "neuron" or indices is None:
        drawn = bar(kept / of if of else 0.0, f"{kept:,} of {of:,} {KINDS[kind]} kept")
        count = f"{kept:,} of {of:,}" + (f" ({100 * kept / of:.0f} %)" if of else "")
        return Html(tag("span", drawn, class_="meter") + tag("span", count, class_="count"))
    present, cells = set(indices), []
    for number in range(of):
        place = {"x": CELL * (number % A_ROW) + 1.0, "y": CELL * (number // A_ROW) + 1.0, "width": CELL - 3.0, "height": CELL - 3.0}
        state = "kept" if number in present else "removed"
        style = "kept" if number in present else "gone"
        cells.append(tag("rect", tag("title", f"head {number}: {state}"), rx=2, class_=style, **place))
    across, down = CELL * min(of, A_ROW), CELL * (1 + (of - 1) // A_ROW)
    gone = ", ".join(str(number) for number in range(of) if number not in present)
    description = f"{kept} of {of} kept" + (f"; removed: {gone}" if gone else "")
    svg = tag("svg", cells, viewBox=f"0 0 {across} {down}", width=across, height=down, role="img", aria_label=description)
    return Html(svg + tag("span", f"{kept} of {of}", class_="count"))


def sparsities(chapters: list[Chapter]) -> Html:
    """The sparsity of every tower, and of every budget beside what was asked; by what the budget counts, and by weights."""
    manifests = [chapter.manifest for chapter in chapters if chapter.manifest]
    cut = next((m for m in manifests if (m.accounting.get("sparsity") or {}).get("achieved")), None)
    if not cut:
        return Html()
    sparsity = cut.accounting["sparsity"]
    budgets: dict[str, dict[str, Any]] = next((m.extra["budget"] for m in manifests if isinstance(m.extra.get("budget"), dict)), {})
    cost: dict[str, Any] = next((m.extra["cost"] for m in manifests if isinstance(m.extra.get("cost"), dict)), {})
    found = []
    if (counted := COUNTED.get(cost.get("budget", ""))) is not None:
        towers = {name: _part(part["initial"], part["kept"]) for name, part in cost["by_tower"].items()}
        whole = _part(*(sum(part[key] for part in towers.values()) for key in ("initial", "kept")))
        found += [_promise(cost, counted), _table({**whole, "by_tower": towers}, budgets, counted)]
        budgets = {}
    found.append(_table(sparsity, budgets, ("weights", 1)))
    note = (
        "Part of what can be removed that is gone, of the weights counted from the tensors. The tick is what was asked; "
        "a tower without one shares the budget above it."
    )
    return Html("".join(found) + tag("p", note, class_="soft small"))


def _part(initial: int, kept: int) -> dict[str, Any]:
    return {"initial": initial, "kept": kept, "achieved": 1 - kept / initial if initial else 0.0}


def _promise(cost: dict[str, Any], counted: tuple[str, int]) -> str:
    """What was asked of the whole network, what is left of it, and which part that is; nothing where an older manifest does not say."""
    if cost.get("part") is None or cost.get("whole") is None or cost.get("after") is None:
        return ""
    what, scale = counted
    said = {key: f"{_amount(cost[key], scale)} {what}" for key in ("after", "whole", "to") if cost.get(key) is not None}
    asked = f"{said['to']} were asked for. " if "to" in said else ""
    drift = " when the table was made. Where the speed of the machine drifts, the part is what is promised" if what == "ms" else ""
    promised = "what was asked is" if asked else "that is"
    now = f"The whole network costs {said['after']} now; {promised} {cost['part']:.2f} of the {said['whole']} of the uncut one{drift}."
    return tag("p", asked + now)


def _amount(value: int, scale: int) -> str:
    return f"{value / scale:,.6g}" if scale > 1 else f"{value:,}"


def _table(sparsity: dict[str, Any], budgets: dict[str, dict[str, Any]], counted: tuple[str, int]) -> str:
    """One count of all that can be removed, with the rows of the budgets that are of it; `counted` is its name and how many make one."""
    what, scale = counted
    towers = {name: part for name, part in (sparsity.get("by_tower") or {}).items() if part.get("initial")}
    rows = [_budget_row(*_whole(name, sparsity), part, scale) for name, part in budgets.items() if name not in towers]
    if not rows:
        rows.append(_budget_row(*_whole("all", sparsity), sparsity, scale))
    rows += [_budget_row(name, part, budgets.get(name) or part, scale) for name, part in towers.items()]
    head = ["sparsity", "", "asked", "gates expected", "reached", f"{what} kept", "of"]
    return table(head, rows, range(2, 7))


def _whole(name: str, sparsity: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name and counts of a budget that is no single tower."""
    return ("all towers together", sparsity) if name == "all" else (f"budget {name}", None)


def _budget_row(name: str, counted: dict[str, Any] | None, part: dict[str, Any], scale: int) -> list[Html | str]:
    wish = part.get("target")
    asked = "–" if wish is None else percent(wish)
    sizes = [_amount(counted[key], scale) for key in ("kept", "initial")] if counted else ["", ""]
    description = f"{name}: {percent(part['achieved'])} reached" + (f", {asked} asked" if wish is not None else "")
    gates = "–" if part.get("expected") is None else percent(part["expected"])
    return [name, bullet(part["achieved"], wish, description), asked, gates, percent(part["achieved"]), *sizes]
