"""Section on figures: all models side by side, the targets, and every measurement."""

from __future__ import annotations

from typing import Any

from efficientvlm.checkpoints.card import flatten, number
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report import summary as report
from efficientvlm.report.charts import bar, percent
from efficientvlm.report.markup import Child, Html, table, tag
from efficientvlm.report.metrics import main_metric
from efficientvlm.report.story import Story

EVALUATED = {"test": "test", "val": "validation data, evaluated", "train": "training data, evaluated"}
NOT_MEASURED = tag("span", "not measured", class_="none")


def tiles(story: Story) -> Html | None:
    """The last model beside the first, large; whether the targets are met."""
    if not story.summary or not story.summary["targets"] or not any(_compresses(manifest) for _, manifest in story.readable):
        return None
    drawn = []
    for target in story.summary["targets"]:
        value, limit = target["value"], target["limit"]
        times = target["name"].startswith("speed")
        show = (lambda ratio: f"{ratio:.2f}×") if times else percent
        big = tag("b", NOT_MEASURED if value is None else show(value))
        met = {None: None, True: tag("span", " met", class_="good"), False: tag("span", " missed", class_="bad")}[target["met"]]
        dot = met and tag("b", " ·", style="display:inline;font-size:inherit")
        limits = None if limit is None else tag("div", f"target: {target['sense']} {show(limit)}", dot, met)
        drawn.append(
            tag(
                "div",
                tag("span", f"{target['name']}, {target['of']}", class_="soft small"),
                big,
                limits and tag("span", limits, class_="small"),
                class_="tile",
            )
        )
    return tag("div", drawn, class_="tiles")


def _compresses(manifest: Manifest) -> bool:
    return manifest.stage in ("shrink", "prune") or manifest.teacher is not None


def section(story: Story) -> Html:
    """The headline table, its details, and the measurements it rests on."""
    title = tag("h2", "Figures")
    if not story.summary:
        why = tag("p", "No manifest of these checkpoints holds the counts that a comparison needs.")
        return tag("section", title, why, measurements(story), id="figures")
    detail = tag("details", tag("summary", "By tower, and what each kept"), details(story.summary))
    words = report.notes(story.summary)
    if not story.summary["test"] or not story.summary["speed"]:
        words.append("results of evlm eval and evlm bench are shown when they lie in the folder that is reported, beside its checkpoints")
    notes = [tag("p", note, class_="soft small") for note in words]
    return tag("section", title, headline(story), notes, detail, measurements(story), id="figures")


def headline(story: Story) -> Html:
    """A row a model; what nobody measured is said to be so."""
    assert story.summary
    models, reference = story.summary["models"], story.summary["reference"]
    batches = sorted({size for model in models.values() for size in model["latency"]}, key=int)
    found = {chapter.label: main_metric(manifest.metrics.get("val")) for chapter, manifest in story.readable}
    head: list[Child] = ["", "parameters", "multiply-adds", "sparsity"]
    head += [[f"latency, batch {size}"] for size in batches] or ["latency"]
    evaluated = EVALUATED.get((story.summary["test"] or {}).get("split", "test"), "evaluated")
    head += [f"{report.metric_title(story.summary)}, {measured}" for measured in (evaluated, "validation")]
    units = {name: report.scale([model[name]["total"] for model in models.values()]) for name in ("parameters", "macs")}
    shown = report.metric_shown((story.summary["test"] or {}).get("metric"))
    rows = []
    for label, model in models.items():
        first = label == reference
        cells: list[Child] = [[label, tag("small", model["stage"] + (", reference" if first else ""))]]
        for key, name in (("parameters", "parameters"), ("macs", "multiply-adds")):
            part, (unit, counted) = model[key], units[key]
            ratio = percent(part["of_reference"])
            description = f"{part['total']:,} {name}, {ratio} of {reference}"
            cells.append(
                [
                    tag("span", f"{counted(part['total'])} {unit}".removesuffix(" 1"), title=description),
                    tag("small", ratio),
                    bar(part["of_reference"], description),
                ]
            )
        cells.append(percent(model["sparsity"]) if model["sparsity"] else "–")
        cells += [_latency(model, size) for size in batches] or [NOT_MEASURED]
        beside = model["accuracy_of_reference"]
        ratio_of = tag("small", f"{percent(beside)} of reference") if beside is not None and not first else None
        cells.append(NOT_MEASURED if model["accuracy"] is None else [shown(model["accuracy"]), ratio_of])
        name, value = found.get(label) or ("", None)
        cells.append(NOT_MEASURED if value is None else report.metric_shown(name)(value))
        rows.append(cells)
    return table(head, rows, range(1, len(head)), class_="headline")


def _latency(model: dict[str, Any], size: str) -> Child:
    record = model["latency"].get(size)
    if not record:
        return NOT_MEASURED
    spread = f"{record['p10_ms']:.2f} to {record['p90_ms']:.2f} ms in 8 of 10 rounds" if {"p10_ms", "p90_ms"} <= set(record) else None
    mark = "*" if model["timed_untrained"] else ""
    speedup = tag("small", f"{record['speedup']:.2f}× as fast") if record.get("speedup") else None
    return [tag("span", f"{mark}{record['median_ms']:.2f} ms", title=spread), speedup]


def details(summary: dict[str, Any]) -> Html:
    """The table that the recipe's report prints, as HTML."""
    listing = report.summary_table(summary)
    columns = [[str(cell) for cell in column.cells] for column in listing.columns]
    lines = []
    for position, (name, *values) in enumerate(zip(*columns, strict=True)):
        deep = "deep" if name.startswith(" ") else None
        cells = [tag("th", name.strip(), class_=deep, scope="row"), *(tag("td", value, class_="number") for value in values)]
        lines.append(tag("tr", cells, class_="end" if listing.rows[position].end_section else None))
    head = [
        tag("th", str(column.header), class_="number" if number else None, scope="col") for number, column in enumerate(listing.columns)
    ]
    content = tag("table", tag("thead", tag("tr", head)), tag("tbody", lines), class_="detail")
    return tag("div", content, class_="wide", tabindex="0", role="group")


def measurements(story: Story) -> Html | None:
    """Every result file in full, folded."""
    rows: list[list[Child]] = []
    for measurement in story.measurements:
        result = measurement.result
        if result["stage"] == "eval":
            data = result["data"]
            on = f"{data.get('name')} {data.get('split')}"
            values = [(name, value) for name, value in flatten(result["metrics"]) if isinstance(value, int | float)]
            rows.append(
                [measurement.name, "eval", str(result.get("model")), on, ", ".join(f"{name} {number(value)}" for name, value in values)]
            )
        else:
            models = ", ".join(str(model["model"]) for model in result["models"])
            machine = result.get("machine") or {}
            rows.append(
                [
                    measurement.name,
                    "bench",
                    models,
                    f"{machine.get('name')}, {machine.get('threads')} thread{'s' * (machine.get('threads') != 1)}",
                    str(result.get("timed", "")),
                ]
            )
    if not rows:
        return None
    content = table(["file", "stage", "models", "on", "found"], rows)
    return tag("details", tag("summary", f"{len(rows)} measurement{'s' * (len(rows) > 1)} in full"), content)
