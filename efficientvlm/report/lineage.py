"""Section on lineage: a graph of what was made from what, and a card for every stage."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from efficientvlm.checkpoints.card import flatten, number, results, sizes
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report.markup import Child, Html, join, table, tag
from efficientvlm.report.story import Chapter, Story, moment
from efficientvlm.settings.compose import of
from efficientvlm.settings.stages import STAGES

BOX, TALL, GUTTER, GAP, EDGE = 176, 50, 54, 30, 22
NAME, ROOM = 19, 120  # letters of a name in a box, and of a setting in a table
BESIDE = 2  # lanes of a graph that leave room for the cards beside it
HIDDEN = {"out", "seed", "model", "teacher"}  # told elsewhere on the card
Place = tuple[int, int]


def section(story: Story) -> Html:
    """The graph beside the cards."""
    cards = [card(story, chapter) for chapter in story.chapters]
    how = "Solid lines: started from these weights. Dashed lines: was taught by."
    lanes = 1 + max(lane for lane, _ in places(story).values())
    drawn = tag("figure", tag("div", graph(story), class_="wide"), tag("figcaption", how), class_="graph")
    style = "story" if lanes <= BESIDE else "stacked"
    return tag("section", tag("h2", "Lineage"), tag("div", drawn, tag("div", cards), class_=style), id="lineage")


def places(story: Story) -> dict[Path, Place]:
    """Lane and row of every checkpoint: a row below its parents, the main chain in lane 0, every other branch in a lane of its own."""
    rows: dict[Path, int] = {}
    for chapter in story.chapters:
        rows[chapter.key] = max((rows[key] + 1 for _, key in chapter.parents if key in rows), default=0)
    lanes: dict[Path, int] = {}
    ends: list[int] = []  # the first row each lane is used in: chains are taken from the last to the first
    for end in reversed(story.chapters):
        at: Path | None = end.key
        chain: list[Path] = []
        while at is not None and at not in lanes:
            chain.append(at)
            at = next((key for role, key in story.chapter(at).parents if role != "teacher" and key in rows), None)
        if not chain:
            continue
        free = next((lane for lane, first in enumerate(ends) if rows[end.key] < first), len(ends))
        ends[free : free + 1] = [rows[chain[-1]]]
        lanes.update(dict.fromkeys(chain, free))
    return {key: (lanes[key], rows[key]) for key in rows}


def graph(story: Story) -> Html:
    """An SVG as wide as its lanes; every box leads to its card."""
    at = places(story)
    lanes, rows = 1 + max(lane for lane, _ in at.values()), 1 + max(row for _, row in at.values())
    width, height = 2 * EDGE + lanes * BOX + (lanes - 1) * GUTTER, rows * (TALL + GAP) - GAP + 4
    edges = [(key, chapter.key, role) for chapter in story.chapters for role, key in chapter.parents if key in at]
    drawn: list[Html] = [_arrow("head"), _arrow("teaches-head")]
    used: dict[int, int] = {}
    for source, target, role in edges:
        style = "edge teaches" if role == "teacher" else "edge"
        head = "url(#teaches-head)" if role == "teacher" else "url(#head)"
        drawn.append(tag("path", d=_route(at[source], at[target], used), class_=style, marker_end=head))
    final = story.chapters[-1].key
    drawn += [_box(chapter, at[chapter.key], chapter.key == final) for chapter in story.chapters]
    description = "; ".join(f"{story.chapter(target).label} from {role} {story.chapter(source).label}" for source, target, role in edges)
    return tag("svg", drawn, viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label=description or "one checkpoint")


def _corner(place: Place) -> tuple[float, float]:
    lane, row = place
    return EDGE + lane * (BOX + GUTTER), 2 + row * (TALL + GAP)


def _arrow(name: str) -> Html:
    path = tag("path", d="M0 0 L7 3.5 L0 7 z", class_=name)
    return tag("marker", path, id=name, markerWidth=7, markerHeight=7, refX=6.5, refY=3.5, orient="auto", markerUnits="userSpaceOnUse")


def _route(source: Place, target: Place, used: dict[int, int]) -> str:
    """Straight down to the next row, else through the gutter beside the source and the gap above the target, where no box is.

    `used` counts the lines of each gutter, so that they lie side by side.
    """
    (x, y), (to_x, to_y) = _corner(source), _corner(target)
    if source[0] == target[0] and target[1] == source[1] + 1:
        return f"M{x + BOX / 2} {y + TALL} V{to_y}"
    right = target[0] > source[0]
    gutter = source[0] + right
    used[gutter] = used.get(gutter, 0) + 1
    offset = 4.0 * ((used[gutter] - 1) % 4)
    begin, across = (x + BOX, x + BOX + 10 + offset) if right else (x, x - 7 - offset)
    leave = y + TALL / 2 - 6 + offset
    if source[0] == target[0]:
        return f"M{begin} {leave} H{across} V{to_y + TALL / 2 + 6 - offset} H{to_x}"
    arrive = to_x + BOX * (0.25 if right else 0.75) + offset * (-1 if right else 1)
    return f"M{begin} {leave} H{across} V{to_y - 11 - offset} H{arrive} V{to_y}"


def _box(chapter: Chapter, place: Place, final: bool) -> Html:
    x, y = _corner(place)
    style = "box" + " final" * final + " lost" * (chapter.manifest is None)
    stage = chapter.manifest.stage if chapter.manifest else "not found"
    words = [_cut(chapter.label.removeprefix("bundled:"), NAME), stage]
    size = sizes(chapter.manifest).split("  ")[0] if chapter.manifest else ""
    drawn = [
        tag("title", chapter.place),
        tag("rect", x=x, y=y, width=BOX, height=TALL, rx=7, class_=style),
        tag("text", words[0], x=x + 10, y=y + 20, class_="name"),
        tag("text", " · ".join(filter(None, [words[1], size.replace("parameters", "param.")])), x=x + 10, y=y + 38, class_="faint"),
    ]
    return tag("a", drawn, href=f"#{chapter.anchor}")


def _cut(text: str, length: int) -> str:
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def card(story: Story, chapter: Chapter) -> Html:
    """Everything about how a checkpoint came to be."""
    manifest = chapter.manifest
    head = tag("h3", chapter.label, tag("span", f"  {manifest.stage}" if manifest else "", class_="soft"))
    warning = tag("p", chapter.problem, class_="bad small") if chapter.problem else None
    if manifest is None:
        return tag("article", head, tag("code", chapter.place), warning, id=chapter.anchor)
    sources: list[Child] = [[f"{role} ", _link(story.chapter(key))] for role, key in chapter.parents]
    origin = {None: "", "bundled": "comes with the package", "random": "random weights", "imported": "imported weights"}[manifest.origin]
    facts = [
        ("from", _list(sources)),
        ("origin", origin),
        ("made", moment(manifest.created)),
        ("seed", str(manifest.seed)),
        *costs(manifest),
    ]
    shown = join(tag("div", tag("span", f"{name} "), value) for name, value in facts if value)
    found = ", ".join(f"{name} {number(value)}" for name, value in results(manifest.metrics) if isinstance(value, int | float))
    return tag(
        "article",
        head,
        tag("code", chapter.place),
        warning,
        tag("div", shown, class_="facts"),
        tag("p", tag("span", "metrics  ", class_="soft"), found, class_="small") if found else None,
        _settings(manifest),
        _data(manifest),
        id=chapter.anchor,
    )


def _link(chapter: Chapter) -> Html:
    return tag("a", chapter.label, href=f"#{chapter.anchor}")


def _list(children: Iterable[Child]) -> Html:
    parts: list[Child] = []
    for child in children:
        parts += [", " if parts else None, child]
    return join(parts)


def costs(manifest: Manifest) -> list[tuple[str, str]]:
    """What a stage took, in units for people."""
    cost = manifest.cost
    minutes, seconds = divmod(round(cost.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    time = " ".join(f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min"), (seconds, "s")) if value)
    peak = f"{cost.peak_memory_bytes / 2**20:,.0f} MiB" if cost.peak_memory_bytes else ""
    disk = f"{sum(file.bytes for file in manifest.files.values()) / 2**20:,.1f} MiB"
    return [("training", time), ("samples", f"{cost.samples:,}" if cost.samples else ""), ("peak memory", peak), ("on disk", disk)]


def changed_settings(manifest: Manifest) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of every setting that is not at its default; one without a default has None there."""
    model = of(manifest.stage, manifest.config) if manifest.stage in STAGES else None
    defaults = _defaults(model, manifest.config) if model else {}
    values = dict(flatten({key: value for key, value in manifest.config.items() if key not in HIDDEN}))
    known = dict(flatten({key: value for key, value in defaults.items() if key not in HIDDEN}))
    return [(name, value, known.get(name)) for name, value in values.items() if value != known.get(name) and value not in ({}, [])]


def _defaults(model: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data=given)
            found[name] = value.model_dump() if isinstance(value, BaseModel) else value
    return found


def _settings(manifest: Manifest) -> Html | None:
    rows = [(tag("code", name), _shown(value), _shown(default)) for name, value, default in changed_settings(manifest)]
    if not rows:
        return tag("p", "Every setting at its default.", class_="soft small")
    return Html(tag("h4", "Settings that differ from the defaults") + table(["setting", "value", "default"], rows, class_="settings"))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    text = ", ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
    return _cut(text, ROOM)


def _data(manifest: Manifest) -> Html | None:
    if not manifest.data:
        return None
    rows = [(r.name, r.split, f"{r.count:,}", tag("code", r.fingerprint[:12], title=r.fingerprint), r.licence) for r in manifest.data]
    return Html(tag("h4", "Data") + table(["data", "split", "images", "fingerprint", "licence"], rows, (2,), class_="data"))
