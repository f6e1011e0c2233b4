"""Publish what gates choose beside scores: tables with verdicts and a plot of the rows of `gates.py` and, where there are any, of
`gates.py --times 2`, `photo_gates.py` and `equal_time.py`. Nothing is measured or typed here.

python benchmarks/publish_gates.py
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import mean

from publish_ablation import Group, check, groups, verdict
from published import ROOT, against, csvs, grouped, markdown, of_one_torch, published_rows, spread, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.script import run_script

PAGE, PICTURE = Path("docs/ablation.md"), Path("docs/gates.png")
LEARNT, SCORES = "tuned first", ("magnitude-kd", "taylor-kd")
LONGER, PHOTOS = "gates_x2", "photo_gates"
BUDGETS, EQUAL_TIME = Path("docs/pruning.md"), "equal_time"
KEPT, AT = 0.97, 0.8
"""The target: what gates that are learnt as proposed keep of the teacher's accuracy at this sparsity."""
COLOURS = {
    "multipliers": "#7fa8d6",
    "held": "#2a6fbb",
    "held, one stage": "#1b3f6e",
    "defaults": "#7b4fa3",
    "tuned first": "#b0306a",
    "magnitude-kd": "#2e9e6b",
    "taylor-kd": "#d9822b",
}


def seeds_of(group: Group) -> str:
    return f"{len(group.lines)} seeds" if len(group.lines) > 1 else "one seed"


def said(found: list[Group]) -> list[str]:
    """What the gates reach of the target on each task and at each sparsity, a sentence each; what is not measured is said."""
    lines = []
    for task, sparsity in dict.fromkeys((group.task, group.sparsity) for group in found):
        arms = {group.arm: group for group in found if (group.task, group.sparsity) == (task, sparsity)}
        where, own = f"{task} at {sparsity:g}", arms.get(LEARNT)
        if own is None:
            lines.append(f"{where}: `{LEARNT}` is not measured yet.")
            continue
        share = mean(own.of("accuracy_of_teacher"))
        target = f" (target: {100 * KEPT:g} %: {'reached' if share >= KEPT else 'missed'})" if sparsity == AT else ""
        text = f"{where}: `{LEARNT}` keeps {100 * share:.1f} % of the teacher's accuracy{target}, {seeds_of(own)}"
        beside = []
        for name in (*SCORES, "multipliers", "held", "held, one stage", "defaults"):
            if other := arms.get(name):
                how = {"worse": "better than", "better": "worse than", "tie": "a tie with"}.get(verdict(own, other), "not compared with")
                beside.append(f"{how} `{name}` ({100 * mean(other.of('accuracy_of_teacher')):.1f} %, {seeds_of(other)})")
        lines.append(f"{text}; {', '.join(beside) or 'nothing beside it is measured yet'}.")
    return lines


def table(found: list[Group]) -> list[str]:
    """Markdown rows: a task, a sparsity and an arm, and what it keeps of the teacher."""
    head = ("task", "sparsity", "arm", "parameters", "of the teacher's accuracy", "seeds: worst to best")
    out = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for group in sorted(found, key=lambda group: (group.task, -group.sparsity, list(COLOURS).index(group.arm))):
        shares = [100 * value for value in group.of("accuracy_of_teacher")]
        seeds = f"{min(shares):.1f} to {max(shares):.1f} ({len(shares)})" if len(shares) > 1 else "one seed"
        size = f"{100 * mean(group.of('parameters_of_teacher')):.1f} %"
        out.append(f"| {group.task} | {group.sparsity:g} | {group.arm} | {size} | {mean(shares):.1f} % | {seeds} |")
    return out


def verdicts(found: list[Group]) -> list[str]:
    """What the gates reach, and the table of it."""
    return [*(f"- {text}" for text in said(found)), "", *table(found)]


def block(found: list[Group], name: Path) -> str:
    """What stands between the markers of the page."""
    parts = [*verdicts(found), ""]
    parts += [f"Every run: [{name.name}](../{name.as_posix()}).", "", f"![What gates and scores keep]({PICTURE.name})"]
    return "\n".join(parts)


def of_longer(found: list[Group], name: Path) -> str:
    """What stands between the markers of the page about runs with more steps."""
    steps = f"{int(found[0].lines[0]['task_steps']):,} steps on the task in all rows."
    return "\n".join([*verdicts(found), "", steps, f"Every run: [{name.name}](../{name.as_posix()})."])


def more_often(own: list[dict[str, str]], other: list[dict[str, str]], column: str) -> str:
    """In how many of the seeds that both have `own` has more in `column`; nothing of one seed."""
    mine, others = ({line["seed"]: float(line[column]) for line in some} for some in (own, other))
    both = mine.keys() & others.keys()
    return f"; more in {sum(mine[seed] > others[seed] for seed in both)} of {len(both)} seeds" if len(both) > 1 else ""


def of_photos(lines: list[dict[str, str]], name: Path) -> str:
    """What stands between the markers of the page about photos.

    Raises:
        BadInput: rows that cannot be compared.
    """
    of_one_torch(lines)
    arms = grouped(lines, "arm")
    recalls = {arm: [float(line["mean_recall"]) for line in some] for arm, some in arms.items()}
    rows = []
    for arm, some in arms.items():
        parts = [
            f"{100 * mean(float(line[column]) for line in some):.1f} %" for column in ("parameters_of_teacher", "mean_recall_of_teacher")
        ]
        rows.append((arm, str(len(some)), parts[0], spread(recalls[arm]), parts[1]))
    out = markdown(("arm", "seeds", "parameters", "mean recall", "of the teacher's"), rows)
    if LEARNT in recalls and SCORES[0] in recalls:
        gap = against(recalls[LEARNT], recalls[SCORES[0]])
        out += ["", f"`{LEARNT}` against `{SCORES[0]}`: {gap}{more_often(arms[LEARNT], arms[SCORES[0]], 'mean_recall')}."]
    how = [" or ".join(dict.fromkeys(line[column] for line in lines)) for column in ("task_steps", "precision")]
    told = f"The teacher has {100 * float(lines[0]['teacher_mean_recall']):.1f}. {how[0]} steps on the task, trained in {how[1]}."
    return "\n".join([*out, "", told, f"Every run: [{name.name}](../{name.as_posix()})."])


def of_equal_time(lines: list[dict[str, str]], name: Path) -> str:
    """What stands between the markers of the page about budgets, at equal milliseconds.

    Raises:
        BadInput: rows that cannot be compared.
    """
    of_one_torch(lines)
    shown = ("of the teacher's accuracy (%)", "ms by the table", "faster, measured", "parameters", "multiply-adds")
    rows, said = [], []
    for sparsity, of_both in grouped(lines, "sparsity").items():
        kept, budgets = {}, grouped(of_both, "budget")
        for budget, some in budgets.items():
            kept[budget] = [float(line["accuracy_of_teacher"]) for line in some]
            means = [mean(float(line[column]) for line in some) for column in ("table_ms", "speedup", "parameters", "macs")]
            cells = (f"{means[0]:.2f}", f"{means[1]:.2f} ×", f"{means[2] / 1e3:.0f} k", f"{means[3] / 1e6:.1f} M")
            rows.append((sparsity, budget, str(len(some)), spread(kept[budget]), *cells))
        by_time, by_size = kept["latency"], kept["parameters"]
        gap = against(by_time, by_size, "points of the teacher's accuracy")
        seeds = more_often(budgets["latency"], budgets["parameters"], "accuracy_of_teacher")
        said.append(f"- At a sparsity of {sparsity}, gates under a budget in milliseconds keep, against one in parameters: {gap}{seeds}.")
    return "\n".join(
        [*markdown(("sparsity", "budget", "seeds", *shown), rows), "", *said, "", f"Every run: [{name.name}](../{name.as_posix()})."]
    )


def plot(found: list[Group], path: Path) -> None:
    """A panel a task (a row of panels) and sparsity: a row an arm, a point a run."""
    from matplotlib.figure import Figure

    tasks, sparsities = sorted({group.task for group in found}), sorted({group.sparsity for group in found}, reverse=True)
    figure = Figure(figsize=(4.4 * len(sparsities), 2.8 * len(tasks)), dpi=130, layout="constrained")
    grid = figure.subplots(len(tasks), len(sparsities), squeeze=False)
    for axes, (task, sparsity) in zip(grid.flat, product(tasks, sparsities), strict=True):
        for row, (arm, colour) in enumerate(COLOURS.items()):
            for group in found:
                if (group.task, group.sparsity, group.arm) == (task, sparsity, arm):
                    shares = [100 * value for value in group.of("accuracy_of_teacher")]
                    axes.scatter(shares, [row] * len(shares), color=colour, s=26, zorder=3)
        axes.axvline(100, color="#1f2733", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(COLOURS)), list(COLOURS), fontsize=8)
        axes.set_ylim(len(COLOURS) - 0.5, -0.5)
        axes.set(title=f"{task}, sparsity {sparsity:g}", xlabel="kept of the teacher's accuracy (%)")
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def publish(root: Path = ROOT) -> list[Path]:
    """Write the block of the page and the plot below `root` from the CSV there; the files written.

    Raises:
        BadInput: no CSV or more than one, rows that cannot be compared, or a page without the two markers.
    """
    rows, name = published_rows(root, "gates", fix="run benchmarks/gates.py")
    found = groups(rows)
    check(found)
    page = with_block((root / PAGE).read_text("utf-8"), "gates", block(found, name))
    if csvs(root, LONGER):
        rows, name = published_rows(root, LONGER)
        longer = groups(rows)
        check(longer)
        page = with_block(page, "gates-longer", of_longer(longer, name))
    if csvs(root, PHOTOS):
        page = with_block(page, "photo-gates", of_photos(*published_rows(root, PHOTOS)))
    plot(found, root / PICTURE)
    pages = {root / PAGE: page}
    if csvs(root, EQUAL_TIME):
        text = (root / BUDGETS).read_text("utf-8")
        pages[root / BUDGETS] = with_block(text, "equal-time", of_equal_time(*published_rows(root, EQUAL_TIME)))
    for path, text in pages.items():
        write_atomic(path, text.encode())
    return [*pages, root / PICTURE]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(run_script(publish))
