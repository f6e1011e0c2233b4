"""Publish what `dlip.py` has measured so far: tables with verdicts and a plot. Nothing is measured or typed here.

python benchmarks/publish_dlip.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from publish_scenes import Lines, by_model, doubts, of
from published import ROOT, all_rows, csvs, is_tie, lines_of, links, of_one_torch, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.script import run_script

PAGE, PICTURE = Path("docs/dlip.md"), Path("docs/dlip.png")
TEACHER, STUDENT, ALONE, BASE = "teacher", "small", "small, no teacher", "base"
BRIEF = "small, a third of the steps"
TASKS = ("retrieval", "captions", "answers")
NAMES = {"mean_recall": "mean recall", "cider_d": "CIDEr-D", "accuracy": "accuracy"}
KEPT, LEAST, SMALL, FAST, BASE_KEPT = 0.95, 0.9, 0.224, 2.7, 0.99
"""The target: this part of the teacher in the mean of the tasks, and in each of them; at most this part of its parameters of each, so many
times as fast in the mean at batch 8. And what the larger student keeps in the mean."""
TIE = 0.01
"""Of the teacher's: what one seed does not tell apart."""
SAME = 1e-3
"""Teachers whose metrics are as close as this are one."""
COLOURS = {TEACHER: "#1f2733", STUDENT: "#2a6fbb", ALONE: "#d9822b", BASE: "#3f8f5f", "small, pruned": "#8b5fbf"}
OTHERS = "#aeb6c1"
VARIED = (
    *("vision narrower", "text narrower", "both narrower", "fusion 1", "fusion 2", "fusion 3", "no decoder terms"),
    *("vision random", "text random", "logit alone", "feature alone", "attention alone"),
)
"""Rows of all parts but the main one, in the order in which they are shown, behind the student with all terms."""

Kept = dict[str, dict[str, float]]
"""Task → model → part of the teacher's metric, mean of the seeds."""


def kept(lines: Lines) -> Kept:
    return {task: {name: mean(of(some, "of_teacher")) for name, some in by_model(lines, task).items()} for task in tasks_of(lines)}


def tasks_of(lines: Lines) -> list[str]:
    there = {line["task"] for line in lines}
    return [task for task in TASKS if task in there]


def verdict(lines: Lines) -> list[str]:
    """What the students reach of the target, each a sentence; what is not measured is said."""
    found = kept(lines)
    said = []
    for name, wanted in ((STUDENT, KEPT), (BASE, BASE_KEPT)):
        measured = {task: some[name] for task, some in found.items() if name in some}
        if missing := [task for task in TASKS if task not in measured]:
            said.append(f"`{name}`: not measured yet on {', '.join(missing)}, so that nothing is said of the target")
            continue
        whole = mean(measured.values())
        text = f"`{name}` keeps {100 * whole:.1f} % of the teacher in the mean of the tasks (target: {100 * wanted:g} %)"
        if name == STUDENT:
            own = [line for line in lines if line["model"] == name]
            worst, size = min(measured.values()), max(of(own, "parameters_of_teacher"))
            fast = mean(mean(of(by_model(own, task)[name], "batch_8_speedup")) for task in TASKS)
            reached = whole > wanted and worst >= LEAST and size <= SMALL and fast >= FAST
            text += f", {100 * worst:.1f} % in the worst of them ({100 * LEAST:g} %), with at most {100 * size:.1f} % of its parameters"
            text += f" ({100 * SMALL:g} %), and is {fast:.2f} times as fast at batch 8 in the mean of the tasks ({FAST})"
        else:
            reached = whole >= wanted
        said.append(f"{text}: {'reached' if reached else 'missed'}")
    for task in found:
        models = by_model(lines, task)
        if STUDENT in models and ALONE in models:
            said.append(f"{task}: {against(models)}")
        said += [f"{task} does not count: {doubt}" for doubt in (doubts(models) if TEACHER in models else ["the teacher was not measured"])]
        if others := beside_another(models):
            said.append(
                f"{task}: the percentages of {', '.join(others)} are of another training of the teacher, not of the one in the table"
            )
        if "text only" not in models:
            said.append(f"{task} does not count yet: no model without pictures stands beside it")
    return [f"{text[0].upper()}{text[1:]}." for text in said]


def beside_another(models: dict[str, Lines]) -> list[str]:
    """Models whose part of the teacher's metric is that of another teacher than the one in the table: trained again, it is not the same."""
    best = of(models.get(TEACHER, []), "value")
    pairs = {name: zip(of(some, "value"), of(some, "of_teacher"), strict=True) for name, some in models.items()}
    return [name for name, some in pairs.items() if best and any(kept and abs(value / kept / best[0] - 1) > SAME for value, kept in some)]


def against(models: dict[str, Lines]) -> str:
    """How the student does beside the one without a teacher."""
    own, other = of(models[STUDENT], "of_teacher"), of(models[ALONE], "of_teacher")
    gap = mean(own) - mean(other)
    text = f"with a teacher the student keeps {abs(100 * gap):.1f} points {'more' if gap > 0 else 'less'} than without one"
    if min(len(own), len(other)) < 2:
        return f"{text}, which one seed does not prove"
    return f"{text}{', a tie beside the spread of the seeds' if is_tie(own, other) else ''}"


def findings(found: Kept) -> Iterator[tuple[str, str]]:
    """The four findings of the paper, and what is seen of each here, task by task."""
    rules = (
        ("vision and text are to be shrunk in balance", ("both narrower", "vision narrower", "text narrower"), TASKS),
        ("a moderate number of fusion layers is enough", ("fusion 2", "fusion 3"), TASKS),
        ("a decoder needs a distillation of its own", (BRIEF, "no decoder terms"), ("captions",)),
        ("pretrained weights matter for vision more than for text", ("text random", "vision random"), TASKS),
    )
    for rule, names, tasks in rules:
        for task in tasks:
            if not {*names} <= {*found.get(task, {})}:
                continue
            first, *others = (found[task][name] for name in names)
            gap = first - max(others)
            holds = gap >= -TIE if rule.startswith("a moderate") else gap > TIE
            numbers = ", ".join(f"{name} {100 * found[task][name]:.1f} %" for name in names)
            yield rule, f"{task}: {'holds' if holds else 'a tie' if abs(gap) <= TIE else 'does not hold'} ({numbers})"


def main_table(lines: Lines, task: str) -> list[str]:
    """Markdown rows of a task, one a model of the part `main`."""
    models = {name: some for name, some in by_model(lines, task).items() if some[0]["part"] == "main"}
    metric = NAMES[next(iter(models.values()))[0]["metric"]]
    head = (
        "model",
        f"{metric} (× 100)",
        "seeds: worst to best",
        "of the teacher's",
        "parameters",
        "without embeddings",
        "faster at batch 8",
    )
    out = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, some in models.items():
        values, speed = [100 * value for value in of(some, "value")], of(some, "batch_8_speedup")
        seeds = f"{min(values):.1f} to {max(values):.1f} ({len(values)})" if len(values) > 1 else "one seed"
        parts = ("of_teacher", "parameters_of_teacher", "without_embeddings_of_teacher")
        shares = [f"{100 * mean(of(some, part)):.1f} %" for part in parts]
        cells = (name, f"{mean(values):.1f}", seeds, *shares, f"{mean(speed):.2f} ×" if speed else "–")
        out.append(f"| {' | '.join(cells)} |")
    return out


def varied(lines: Lines) -> list[str]:
    """The rows that are not of the main part, in the order of :data:`VARIED`."""
    there = {line["model"] for line in lines if line["part"] != "main"}
    return sorted(there, key=lambda name: (BRIEF, *VARIED).index(name))


def other_table(lines: Lines, part: str) -> list[str]:
    """Markdown rows of a part: parameters, and what is kept of the teacher in each task; the student with all terms comes first."""
    found = kept(lines)
    own = [line for line in lines if line["part"] == part]
    tasks, names = tasks_of(own), varied(own)
    if not names:
        return []
    out = [f"| model | parameters | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 2) + "|"]
    for name in dict.fromkeys((BRIEF, *names)):
        sizes = of([line for line in lines if line["model"] == name], "parameters_of_teacher")
        size = f"{100 * mean(sizes):.1f} %" if sizes else "–"
        cells = (f"{100 * found[task][name]:.1f} %" if name in found[task] else "–" for task in tasks)
        out.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return out


def start_table(lines: Lines) -> list[str]:
    """How much students agree with their teacher as they were cut, and later; means of the seeds."""
    head = ("columns", "steps", "seeds", "same word", "image cosine", "text cosine", "loss of words", "the teacher's")
    out = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, steps in dict.fromkeys((line["model"], line["steps"]) for line in lines):
        some = [line for line in lines if (line["model"], line["steps"]) == (name, steps)]
        words, *rest = (mean(of(some, column)) for column in ("words", "image", "text", "loss", "teacher_loss"))
        out.append(f"| {name} | {steps} | {len(some)} | {100 * words:.1f} % | {' | '.join(f'{value:.3f}' for value in rest)} |")
    return out


def block(lines: Lines, names: list[Path], starts: Lines, start_names: list[Path]) -> str:
    """What stands between the markers of the page."""
    parts: list[str] = [*(f"- {text}" for text in verdict(lines)), ""]
    for task in tasks_of(lines):
        own = [line for line in lines if line["task"] == task]
        first = next((line for line in own if line["model"] == TEACHER), own[0])
        other = {line["model"]: line["data"] for line in own if line["data"] != first["data"]}
        also = "".join(f" `{name}`: `{data}`." for name, data in other.items())
        parts += [f"### {task}", "", f"Data: `{first['data']}`, {first['images']} test images.{also}", "", *main_table(lines, task), ""]
    titles = {"modules": "### Modules", "information": "### Kinds of information alone"}
    for part, title in titles.items():
        if rows := other_table(lines, part):
            about = (
                "Parameters, of the teacher's (mean of the tasks), and the part of its metric that is kept, by students that take a third "
            )
            about += "of the recipe's steps; one seed."
            parts += [title, "", about, "", *rows, ""]
    if said := [*findings(kept(lines))]:
        parts += ["| finding of the paper | here |", "| --- | --- |"]
        parts += [
            f"| {rule} | {'; '.join(text for other, text in said if other == rule)} |" for rule in dict.fromkeys(rule for rule, _ in said)
        ]
        parts += [""]
    if starts:
        about = (
            f"Students of the recipe as they were cut out of the teacher, and after {max(int(line['steps']) for line in starts)} steps of "
        )
        about += f"distillation, on {starts[0]['scenes']} test scenes: {links(start_names)}."
        parts += ["### Which columns a student begins with", "", about, "", *start_table(starts), ""]
    timed = ""
    if loads := of(lines, "load"):
        threads = " or ".join(dict.fromkeys(line["threads"] for line in lines if line["threads"]))
        timed = f" Timed with {threads} thread{'s' * (threads != '1')}, load of the machine {min(loads):g} to {max(loads):g}."
    parts += [f"Every run: {links(names)}.{timed}", "", f"![What is kept of the teacher]({PICTURE.name})"]
    return "\n".join(parts)


def plot(lines: Lines, path: Path) -> None:
    """A panel a task of what is kept over what is left of the parameters, and one of all other rows, side by side for the tasks."""
    from matplotlib.figure import Figure

    tasks, found = tasks_of(lines), kept(lines)
    names = varied(lines)
    panels = len(tasks) + bool(names)
    figure = Figure(figsize=(4.2 * panels, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for place, task in zip(axes, tasks, strict=False):
        for name, some in by_model(lines, task).items():
            if name in COLOURS:
                sizes = [100 * part for part in of(some, "parameters_of_teacher")]
                place.scatter(sizes, [100 * part for part in of(some, "of_teacher")], color=COLOURS[name], s=26, label=name, zorder=3)
            elif some[0]["part"] == "main":
                place.axhline(100 * found[task][name], color=OTHERS, linewidth=0.9, linestyle=":", label=name)
        place.set(title=task, xlabel="parameters (% of the teacher's)", ylabel="kept (% of the teacher's)", xlim=(0, 108))
        place.set_ylim(bottom=0)
        place.grid(alpha=0.25)
        place.legend(frameon=False, loc="lower right", fontsize=8)
    if names:
        shown = [task for task in tasks if found[task].keys() & {*names}]
        for number, task in enumerate(shown):
            places = [row + 0.8 * number / len(shown) for row, name in enumerate(names) if name in found[task]]
            axes[-1].barh(places, [100 * found[task][name] for name in names if name in found[task]], 0.8 / len(shown), label=task)
        axes[-1].set_yticks([row + 0.3 for row in range(len(names))], names, fontsize=7)
        axes[-1].set(title="variations", xlabel="kept (% of the teacher's)")
        axes[-1].invert_yaxis()
        axes[-1].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, -0.12), ncol=len(shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def publish(root: Path = ROOT) -> list[Path]:
    """Write the block of the page and the plot below `root` from the CSVs there; the files written.

    Raises:
        BadInput: no CSV, one run in two of them, rows of several torches, or a page without the two markers.
    """
    lines, names = all_rows(root, "dlip", ("task", "seed", "model"), fix="run benchmarks/dlip.py")
    of_one_torch(lines)
    beside = [path.relative_to(root) for path in csvs(root, "dlip_start")]
    page = with_block((root / PAGE).read_text("utf-8"), "dlip", block(lines, names, lines_of("dlip_start", root=root), beside))
    plot(lines, root / PICTURE)
    write_atomic(root / PAGE, page.encode())
    return [root / PAGE, root / PICTURE]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(run_script(publish))
