"""Section on training: curves of every stage that trained, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report.charts import Line, curves, percent, stack, swatch
from efficientvlm.report.markup import Html, table, tag
from efficientvlm.report.story import Chapter, Story

PHASES = {"teacher": 1, "student": 2, "optimizer": 3, "data": 4}
REGION = "region_"
EXPECTED, TARGET = "expected_sparsity", "target_sparsity"
OTHER = {"step", "lr_factor", "samples_per_s"}


def section(story: Story) -> Html | None:
    """None if nothing was trained."""
    trained = [(chapter, manifest) for chapter, manifest in story.readable if chapter.lines]
    if not trained:
        return None
    parts: list[Html] = []
    for chapter, manifest in trained:
        done = chapter.lines[-1]["step"]
        steps = f"{done:,.0f} step{'s' * (done != 1)}"
        title, drawn = f"{chapter.label}: {manifest.stage}, {steps}", tag("div", charts(chapter, manifest), class_="charts")
        folded = manifest.origin == "bundled" and chapter is not story.chapters[-1]
        parts.append(tag("details", tag("summary", title), drawn) if folded else Html(tag("h3", title) + drawn))
    how = "Means between two lines of the log, by training step. Rest the pointer on a curve to read it."
    return tag("section", tag("h2", "Training"), tag("p", how, class_="soft small"), parts, timing(trained), id="training")


def charts(chapter: Chapter, manifest: Manifest) -> list[Html]:
    """The loss, its terms, and sparsity beside what was asked; terms of region steps are drawn into the charts of their namesakes."""
    names = list(dict.fromkeys(name for line in chapter.lines for name in line))
    terms = [name for name in names if name not in OTHER and not name.endswith("_ms") and not name.startswith((EXPECTED, TARGET))]
    marks, last = phases(manifest, chapter.lines), chapter.lines[-1]["step"]
    drawn = []
    for term in dict.fromkeys(name.removeprefix(REGION) for name in terms):
        kinds = [("general" if REGION + term in terms else term, term, 1), ("regions", REGION + term, 2)]
        lines = [Line(name, colour, series(chapter, key), colour == 2) for name, key, colour in kinds if key in terms]
        drawn.append(curves(term, lines, last, marks))
    for name in (name for name in names if name.startswith(EXPECTED)):
        budget = name.removeprefix(EXPECTED)
        lines = [Line("expected", 1, series(chapter, name))]
        if TARGET + budget in names:
            lines.append(Line("target", 2, series(chapter, TARGET + budget), dashed=True))
        drawn.append(curves("sparsity" + budget.replace("_", " of "), lines, last, marks, percent))
    return drawn


def series(chapter: Chapter, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in chapter.lines if name in line]


def phases(manifest: Manifest, lines: Sequence[dict[str, float]]) -> list[tuple[float, str]]:
    """Steps at which the sparsity target of a gated run rose and was full, and its structure became final (as in stages/prune.py)."""
    config = manifest.config
    given = [config.get("freeze_at"), config.get("sparsity_warmup"), config.get("sparsity_hold", 0)]
    gated = manifest.stage == "prune" and config.get("method") == "l0"
    parts = [float(part) for part in given if isinstance(part, int | float)]
    if not gated or len(parts) < len(given):
        return []
    freeze_at, warmup, hold = parts
    freeze = max(1, round(freeze_at * lines[-1]["step"]))
    rises = [(round(hold * freeze), "target rises")] if hold else []
    return [*rises, (round((hold + warmup) * freeze), "target full"), (freeze, "structure final")]


def timing(trained: Sequence[tuple[Chapter, Manifest]]) -> Html | None:
    """Milliseconds a step by phase, and samples a second."""
    means = {
        chapter.key: {
            name: fmean([line[f"{name}_ms"] for line in chapter.lines if f"{name}_ms" in line])
            for name in PHASES
            if any(f"{name}_ms" in line for line in chapter.lines)
        }
        for chapter, _ in trained
    }
    if not any(means.values()):
        return None
    longest = max(sum(phase.values()) for phase in means.values()) or 1.0
    rows = []
    for chapter, manifest in trained:
        found = means[chapter.key]
        speeds = [line["samples_per_s"] for line in chapter.lines if "samples_per_s" in line]
        numbers = [f"{found[name]:,.1f}" if name in found else "–" for name in PHASES]
        drawn = stack([(name, found[name], colour) for name, colour in PHASES.items() if name in found], longest, "ms")
        batch = manifest.config.get("batch_size")
        rows.append([chapter.label, drawn, f"{batch}" if batch else "–", *numbers, f"{median(speeds):,.0f}" if speeds else "–"])
    head = [Html(swatch(colour) + name) for name, colour in PHASES.items()]
    how = "Means over the run. The teacher's part is its forward pass; the student's is forward and backward."
    content = table(["", "ms a step", "batch", *head, "images/s"], rows, range(2, 8), class_="timing")
    return Html(tag("h3", "Time of a step, ms") + content + tag("p", how, class_="soft small"))
