"""Publish what `scenes.py` has measured so far: a table with verdicts and a plot. Nothing is measured or typed here.

python benchmarks/publish_scenes.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

from published import ROOT, all_rows, links, of_one_torch, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.errors import number_of
from efficientvlm.script import run_script

PAGE, PICTURE = Path("docs/scenes.md"), Path("docs/scenes.png")
TEACHER, METHOD, PLAIN = SEEING = ("teacher", "method", "no-kd")
KEPT, SMALL, FAST = 0.984, 0.443, 2.2
"""The target: at least this part of the teacher's metric, at most this part of its parameters, at least so many times as fast."""
GOOD, FOUND = 0.9, 0.5
"""What makes a teacher worth following: its accuracy, or of retrieval its recall at 1."""
WORSE = 0.2
"""By which models without pictures have to be worse, so that pictures are what is measured."""
NAMES = {"mean_recall": "mean recall", "cider_d": "CIDEr-D", "statement_accuracy": "accuracy", "box_accuracy": "box accuracy"}
COLOURS = {TEACHER: "#1f2733", METHOD: "#2a6fbb", PLAIN: "#d9822b"}
OTHERS = "#aeb6c1"

Lines = list[dict[str, str]]


def of(lines: Lines, column: str) -> list[float]:
    return [float(line[column]) for line in lines if line[column]]


def by_model(lines: Lines, task: str) -> dict[str, Lines]:
    """The rows of a task by model, those that see everything first; they differ in their seeds."""
    found: dict[str, Lines] = {}
    for line in lines:
        if line["task"] == task:
            found.setdefault(line["model"], []).append(line)
    return {name: found[name] for name in (*SEEING, *found) if name in found}


def doubts(models: dict[str, Lines]) -> list[str]:
    """Why the figures of a task do not count."""
    found, teacher = [], models[TEACHER]
    metric = teacher[0]["metric"]
    if metric == "mean_recall":
        firsts = [min(float(line["image_to_text_r1"]), float(line["text_to_image_r1"])) for line in teacher]
        if min(firsts) < FOUND:
            found.append(f"the teacher's recall at 1 is {100 * min(firsts):.1f} %, less than {100 * FOUND:.0f}")
    elif metric != "cider_d" and min(of(teacher, "value")) < GOOD:
        found.append(f"the teacher reaches {100 * min(of(teacher, 'value')):.1f} %, less than {100 * GOOD:.0f}")
    if PLAIN in models and mean(of(models[PLAIN], "value")) > mean(of(teacher, "value")):
        found.append("the teacher, which was trained for fewer steps than no-kd, is behind it")
    for name, lines in models.items():
        if "hide=" in lines[0]["data"] and mean(of(teacher, "value")) - mean(of(lines, "value")) < WORSE:
            found.append(f"{name} is less than {100 * WORSE:.0f} points worse than the teacher")
    return found


def verdict(models: dict[str, Lines]) -> str:
    """Whether the method reaches the target, and how it does against the student without a teacher."""
    if METHOD not in models:
        return "the method was not run"
    method = models[METHOD]
    kept, small, fast = (mean(of(method, name)) for name in ("of_teacher", "parameters_of_teacher", "batch_8_speedup"))
    missed = [
        text
        for text, reached in (
            (f"{100 * kept:.1f} % of the teacher's {NAMES[method[0]['metric']]}, not {100 * KEPT:.1f}", kept >= KEPT),
            (f"{100 * small:.1f} % of its parameters, not {100 * SMALL:.1f}", small <= SMALL),
            (f"{fast:.2f} times as fast, not {FAST}", fast >= FAST),
        )
        if not reached
    ]
    said = [f"target missed: {', '.join(missed)}" if missed else "target reached"]
    if PLAIN in models:
        values, others = of(method, "value"), of(models[PLAIN], "value")
        gap = mean(values) - mean(others)
        if min(len(values), len(others)) < 2:
            said.append("one seed says nothing about the difference to no-kd")
        elif abs(gap) <= max(max(some) - min(some) for some in (values, others)):
            said.append("a tie with no-kd")
        else:
            said.append(f"{'better' if gap > 0 else 'worse'} than no-kd")
    return "; ".join([*said, *(f"does not count: {doubt}" for doubt in doubts(models))])


def table(models: dict[str, Lines]) -> list[str]:
    """Markdown rows, one a model."""
    metric = NAMES[models[TEACHER][0]["metric"]]
    head = ("model", f"{metric} (× 100)", "seeds: worst to best", "of the teacher's", "parameters", "of the teacher's", "faster at batch 8")
    out = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, lines in models.items():
        values = [100 * value for value in of(lines, "value")]
        seeds = f"{min(values):.1f} to {max(values):.1f} ({len(values)})" if len(values) > 1 else "one seed"
        speed = of(lines, "batch_8_speedup")
        parts = (mean(of(lines, part)) for part in ("of_teacher", "parameters", "parameters_of_teacher"))
        kept, parameters, small = parts
        size = f"{parameters / 1e6:.2f} M | {100 * small:.1f} %" if name in SEEING else "– | –"
        cells = (name, f"{mean(values):.1f}", seeds, f"{100 * kept:.1f} %", size, f"{mean(speed):.2f} ×" if speed else "–")
        out.append(f"| {' | '.join(cells)} |")
    return out


def block(lines: Lines, names: list[Path]) -> str:
    """What stands between the markers of the page."""
    parts: list[str] = []
    for task in dict.fromkeys(line["task"] for line in lines):
        models = by_model(lines, task)
        if TEACHER not in models:
            continue
        first = models[TEACHER][0]
        about = f"Data: `{first['data']}`, {first['images']} test images."
        said = verdict(models)
        parts += [f"### {task}", "", about, "", *table(models), "", f"{said[0].upper()}{said[1:]}.", ""]
    loads = of(lines, "load")
    timed = (
        f" Timed with {number_of(int(lines[0]['threads']), 'thread')} while the load of the machine was {min(loads):g} to {max(loads):g}."
        if loads
        else ""
    )
    parts += [f"Every run: {links(names)}.{timed}", "", f"![What is kept of the teacher]({PICTURE.name})"]
    return "\n".join(parts)


def plot(lines: Lines, path: Path) -> None:
    """A panel a task: the metric over what is left of the parameters, a point a run; models without pictures are lines."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.4 * len(tasks), 4.2), dpi=130, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        models = by_model(lines, task)
        for name, some in models.items():
            if name in COLOURS:
                places = [100 * part for part in of(some, "parameters_of_teacher")]
                axes.scatter(places, [100 * value for value in of(some, "value")], color=COLOURS[name], s=26, label=name, zorder=3)
            else:
                height = 100 * mean(of(some, "value"))
                axes.axhline(height, color=OTHERS, linewidth=0.9, linestyle=":")
                axes.annotate(name, (0, height), textcoords="offset points", xytext=(4, 3), fontsize=7)
        metric = NAMES[next(iter(models.values()))[0]["metric"]]
        axes.set(title=task, xlabel="parameters (% of the teacher's)", ylabel=f"{metric} (× 100)", xlim=(0, 108))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def publish(root: Path = ROOT) -> list[Path]:
    """Write the block of the page and the plot below `root` from the CSVs there, one a machine; the files written.

    Raises:
        BadInput: no CSV, one run in two of them, rows of several torches, or a page without the two markers.
    """
    lines, names = all_rows(root, "scenes", ("task", "seed", "model"), fix="run benchmarks/scenes.py")
    of_one_torch(lines)
    page = with_block((root / PAGE).read_text("utf-8"), "scenes", block(lines, names))
    plot(lines, root / PICTURE)
    write_atomic(root / PAGE, page.encode())
    return [root / PAGE, root / PICTURE]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(run_script(publish))
