"""Publish the ablation: tables with verdicts and two plots of the rows that lie in the CSVs. Nothing is measured or typed here.

python benchmarks/publish_ablation.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from published import ROOT, is_tie, published_rows, rows_of, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.errors import BadInput
from efficientvlm.script import run_script

PAGE = Path("docs/ablation.md")
PICTURES = {"parameters": Path("docs/ablation-parameters.png"), "latency": Path("docs/ablation-latency.png")}
METHOD, QUIRKS, MAIN = "method", "quirks", ("method", "scratch", "no-kd", "magnitude")
COLOURS = {"method": "#2a6fbb", "scratch": "#8a5cc2", "no-kd": "#d9822b", "magnitude": "#2e9e6b"}
OTHERS = "#aeb6c1"


@dataclass(frozen=True)
class Group:
    """The runs of one arm on one task at one sparsity; they differ in their seeds."""

    task: str
    arm: str
    sparsity: float
    lines: tuple[dict[str, str], ...]

    def of(self, column: str) -> list[float]:
        return [float(line[column]) for line in self.lines]


def groups(lines: Iterable[dict[str, str]]) -> list[Group]:
    """The lines by task, arm and sparsity, in the order of their first appearance; the first task's first."""
    found: dict[tuple[str, str, float], list[dict[str, str]]] = {}
    for line in lines:
        found.setdefault((line["task"], line["arm"], float(line["sparsity"])), []).append(line)
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    return sorted((Group(*name, tuple(some)) for name, some in found.items()), key=lambda group: tasks.index(group.task))


def verdict(method: Group | None, other: Group) -> str:
    """How `other` does against `method`: better, worse, or a tie if the means differ by no more than either's seeds do.

    A dash where the method has one seed or none, for then nothing says how much of a difference is chance.
    """
    if method is None or len(method.lines) < 2 or other.arm == METHOD:
        return "–"
    gap = mean(other.of("accuracy")) - mean(method.of("accuracy"))
    if is_tie(method.of("accuracy"), other.of("accuracy")):
        return "tie"
    return "better" if gap > 0 else "worse"


def check(found: list[Group]) -> None:
    """:class:`BadInput` for rows that cannot be compared: other lengths of training, another torch, a sparsity that was missed."""
    for column in ("distill_steps", "task_steps", "torch"):
        values = {line[column] for group in found for line in group.lines} - {"0"}
        if len(values) > 1:
            fix = "run them again with one version of the script"
            raise BadInput("the runs cannot be compared", f"{column}: {', '.join(sorted(values))}", fix)
    for group in found:
        if group.arm != QUIRKS and any(abs(achieved - group.sparsity) > 0.005 for achieved in group.of("achieved_sparsity")):
            raise BadInput(f"{group.arm} missed its sparsity", f"{group.of('achieved_sparsity')} instead of {group.sparsity}")


def table(found: list[Group], task: str) -> list[str]:
    """Markdown rows: an arm at a sparsity, what is left of the teacher, and the verdict."""
    mine = [group for group in found if group.task == task]
    methods = {group.sparsity: group for group in mine if group.arm == METHOD}
    head = (
        *("arm", "sparsity", "of the teacher's parameters", "accuracy (%)", "seeds: worst to best"),
        *("of the teacher's accuracy", "against the method"),
    )
    out = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for group in sorted(mine, key=lambda group: (group.sparsity, group.arm not in MAIN)):
        accuracy = [100 * value for value in group.of("accuracy")]
        against = verdict(methods.get(group.sparsity), group)
        seeds = f"{min(accuracy):.2f} to {max(accuracy):.2f} ({len(accuracy)})" if len(accuracy) > 1 else "one seed"
        out.append(
            f"| {group.arm} | {100 * mean(group.of('achieved_sparsity')):.1f} % | {100 * mean(group.of('parameters_of_teacher')):.1f} %"
            f" | {mean(accuracy):.2f} | {seeds} | {100 * mean(group.of('accuracy_of_teacher')):.1f} % | {against} |"
        )
    return out


def block(found: list[Group], name: Path) -> str:
    """What stands between the markers of the page."""
    parts: list[str] = []
    for task in dict.fromkeys(group.task for group in found):
        line = next(group for group in found if group.task == task).lines[0]
        teacher = f"Teacher: {100 * float(line['teacher_accuracy']):.2f} % of {line['questions']} questions of the test split."
        parts += [f"### {task}", "", f"Data: `{line['data']}`. {teacher}", "", *table(found, task), ""]
    parts += [f"Every run: [{name.name}](../{name.as_posix()}).", ""]
    parts += [f"![Accuracy over {what}]({path.name})" for what, path in PICTURES.items()]
    return "\n".join(parts)


def summary(found: list[Group]) -> str:
    """The block of the README: the main arms, the mean accuracy of their seeds in percent of the teacher's, and the verdict."""
    cases = sorted({(group.task, group.sparsity) for group in found if group.arm in MAIN and len(group.lines) > 1})
    by_name = {(group.arm, group.task, group.sparsity): group for group in found}
    head = [f"{task}, sparsity {sparsity:g}" for task, sparsity in cases]
    out = [f"| of the teacher's accuracy | {' | '.join(head)} |", "| --- " * (len(cases) + 1) + "|"]
    methods = [by_name.get((METHOD, *case)) for case in cases]
    sizes = [f"{100 * mean(group.of('parameters_of_teacher')):.1f} %" if group else "–" for group in methods]
    out.append(f"| parameters, of the teacher's | {' | '.join(sizes)} |")
    for arm in MAIN:
        cells = []
        for case, method in zip(cases, methods, strict=True):
            group = by_name.get((arm, *case))
            share = f"{100 * mean(group.of('accuracy_of_teacher')):.1f} % ({len(group.lines)})" if group else "–"
            cells.append(f"{share} {verdict(method, group)}".removesuffix(" –") if group else share)
        out.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(out)


def plot(found: list[Group], timed: list[dict[str, str]], what: str, path: Path) -> None:
    """Accuracy over what is left of the teacher: its parameters in percent, or its latency at batch 8 in percent. A panel a task.

    A point is a run; lines join the means of the main arms.
    """
    from matplotlib.figure import Figure

    batch8 = {(t["task"], t["arm"], float(t["sparsity"]), t["seed"]): 100 / float(t["speedup"]) for t in timed if t["batch"] == "8"}

    def place(group: Group, line: dict[str, str]) -> float | None:
        if what == "parameters":
            return 100 * float(line["parameters_of_teacher"])
        return batch8.get((group.task, group.arm, group.sparsity, line["seed"]))

    tasks = list(dict.fromkeys(group.task for group in found))
    figure = Figure(figsize=(6.4 * len(tasks), 4.6), dpi=130, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        joined: dict[str, list[tuple[float, float]]] = {}
        named: list[tuple[str, float, float]] = []
        for group in (group for group in found if group.task == task):
            points = [(x, 100 * float(line["accuracy"])) for line in group.lines if (x := place(group, line)) is not None]
            if not points:
                continue
            main, seen = group.arm in MAIN, group.arm in joined
            style: dict[str, Any] = {"color": COLOURS.get(group.arm, OTHERS), "s": 26 if main else 18, "zorder": 3 if main else 2}
            axes.scatter(*zip(*points, strict=True), **style, label=group.arm if main and not seen else None)
            joined.setdefault(group.arm, []).append((mean(x for x, _ in points), mean(y for _, y in points)))
            if not main:
                named.append((group.arm, *points[0]))
        for arm in (arm for arm in MAIN if arm in joined):
            axes.plot(*zip(*sorted(joined[arm]), strict=True), color=COLOURS[arm], linewidth=1.2, alpha=0.6)
        teacher = next(float(group.lines[0]["teacher_accuracy"]) for group in found if group.task == task)
        axes.axhline(100 * teacher, color="#1f2733", linewidth=0.8, linestyle=":")
        axes.annotate("teacher", (0, 100 * teacher), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set(title=task, ylabel="accuracy (%)")
        axes.set_xlabel("parameters (% of the teacher's)" if what == "parameters" else "latency at batch 8 (% of the teacher's)")
        axes.grid(alpha=0.25)
        if joined:
            axes.set_xlim(0, 1.2 * max(x for points in joined.values() for x, _ in points))
            axes.legend(frameon=False, loc="lower left", fontsize=8)
        label(axes, named)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def label(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write the name of every point to its right, with a line to it, from the top down; each below the names it would run into."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    line, width = 0.028 * (high - low), 0.14 * (right - left)
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        at = min([y, *(other - line for near, other in placed if abs(near - x) < width)])
        placed.append((x, at))
        style = {"va": "center", "fontsize": 6.5, "color": "#5f6b7a", "arrowprops": {"arrowstyle": "-", "linewidth": 0.4, "color": OTHERS}}
        axes.annotate(name, (x, y), xytext=(x + 0.025 * (right - left), at), **style)


def publish(root: Path = ROOT) -> list[Path]:
    """Write the blocks of the page and the README and the plots below `root` from the CSVs there; the files written.

    Raises:
        BadInput: no CSV or more than one (which machine's is published?), or a page without the two markers.
    """
    rows, name = published_rows(root, "vqa_ablation", fix="run benchmarks/vqa_ablation.py, or move the others away")
    found = groups(rows)
    check(found)
    timed = rows_of(root / name.with_name(name.name.replace("vqa_ablation_", "vqa_ablation_latency_")))
    page = with_block((root / PAGE).read_text("utf-8"), "ablation", block(found, name))
    for what, path in PICTURES.items():
        plot(found, timed, what, root / path)
    readme = with_block((root / "README.md").read_text("utf-8"), "ablation", summary(found))
    for path, text in ((PAGE, page), (Path("README.md"), readme)):
        write_atomic(root / path, text.encode())
    return [root / PAGE, root / "README.md", *(root / path for path in PICTURES.values())]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(run_script(publish))
