"""Which modality kept what: heads and neurons that the learnt gates left, by tower, for every task of the scenes and for easy-VQA.

python benchmarks/kept.py [runs/scenes]

Reads the manifests of what `scenes.py` pruned (`SEED/TASK-pruned`) and the CSV of the quickstart; nothing is measured or typed here.
Without a folder the picture is drawn again from the CSVs that are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from published import RESULTS, ROOT, all_rows, as_csv, csv_of, links, rows_of, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput
from efficientvlm.report.structure import KINDS
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script

NAME = "kept"
PAGE, PICTURE = Path("docs/scenes.md"), Path("docs/scenes_kept.png")
PRUNED = "-pruned"
TOWERS = ("vision", "text", "fusion", "decoder")
COLOURS = ("#2a6fbb", "#d9822b", "#3f8f5f", "#8b5fbf", "#6b7280")

Lines = list[dict[str, str]]


def records(root: Path) -> Iterator[dict[str, Any]]:
    """A record a task, seed, tower and kind of unit, of every pruned checkpoint below `root`.

    Raises:
        BadInput: there is none, or one is unfinished.
    """
    found = sorted(path for path in root.glob(f"*/*{PRUNED}") if path.is_dir())
    if not found:
        raise BadInput(f"{root} holds no pruned checkpoints", f"SEED/TASK{PRUNED} is looked for", "run benchmarks/scenes.py first")
    for folder in found:
        done = require_complete(folder)
        common = {"task": folder.name.removesuffix(PRUNED), "seed": done.seed, "sparsity": done.accounting["sparsity"]["achieved"]}
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for group, count in done.accounting["units"].items():
            tower, _, kind = group.split(".")
            kept, everything = sums.get((tower, kind), (0, 0))
            sums[tower, kind] = kept + count["kept"], everything + count["of"]
        for (tower, kind), (kept, everything) in sums.items():
            yield {
                **common,
                "tower": tower,
                "kind": kind,
                "kept": kept,
                "of": everything,
                "commit": done.code.commit,
                "date": done.created[:10],
            }


def quickstart(root: Path) -> Lines:
    """The pruned models of the quickstart's CSV as such records, under the task `easy-VQA`."""
    found: Lines = []
    for line in (line for path in sorted((root / RESULTS).glob("quickstart_*.csv")) for line in rows_of(path) if line["model"] == "pruned"):
        for tower in TOWERS:
            for kind in KINDS:
                if line.get(f"{tower}_{kind}_of"):
                    counts = {"kept": line[f"{tower}_{kind}_kept"], "of": line[f"{tower}_{kind}_of"]}
                    common = {"task": "easy-VQA", "seed": line["seed"], "sparsity": line["sparsity"]}
                    found.append({**common, "tower": tower, "kind": kind, **counts})
    return found


def parts(lines: Lines) -> dict[tuple[str, str, str], list[float]]:
    """(task, tower, kind) → the part that was kept, a number a seed."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        found.setdefault((line["task"], line["tower"], line["kind"]), []).append(int(line["kept"]) / int(line["of"]))
    return found


def places(kept: dict[tuple[str, str, str], list[float]]) -> list[tuple[str, str]]:
    """Tower and kind in the order of the picture, those that there are."""
    there = {(tower, kind) for _, tower, kind in kept}
    return [(tower, kind) for tower in TOWERS for kind in KINDS if (tower, kind) in there]


def plot(lines: Lines, path: Path) -> None:
    """A group of bars a tower and kind, a bar a task: the mean of its seeds; a point is a seed."""
    from matplotlib.figure import Figure

    kept = parts(lines)
    tasks, groups = list(dict.fromkeys(task for task, _, _ in kept)), places(kept)
    width = 0.8 / len(tasks)
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for number, task in enumerate(tasks):
        shift, colour = (number + 0.5) * width - 0.4, COLOURS[number % len(COLOURS)]
        there = [(at + shift, kept[task, *group]) for at, group in enumerate(groups) if (task, *group) in kept]
        axes.bar([x for x, _ in there], [100 * mean(values) for _, values in there], width * 0.92, color=colour, label=task)
        for x, values in there:
            axes.scatter([x] * len(values), [100 * value for value in values], s=9, color="black", zorder=3)
    axes.set_xticks(range(len(groups)), [f"{tower}\n{KINDS[kind]}" for tower, kind in groups], fontsize=8)
    axes.set(ylabel="kept (%)", ylim=(0, 105))
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=len(tasks), loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def block(lines: Lines, names: list[Path]) -> str:
    """The table by task and its seeds, and the picture."""
    kept = parts(lines)
    groups = places(kept)
    heads = ("task", "seeds", "sparsity", *(f"{tower}: {KINDS[kind]}" for tower, kind in groups))
    out = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for task in dict.fromkeys(task for task, _, _ in kept):
        sparsity = 100 * mean(float(line["sparsity"]) for line in lines if line["task"] == task)
        values = [kept.get((task, *group)) for group in groups]
        cells = [f"{100 * mean(some):.0f}" if some else "–" for some in values]
        out.append(f"| {' | '.join([task, str(max(len(some or ()) for some in values)), f'{sparsity:.0f} %', *cells])} |")
    return "\n".join(
        [
            *out,
            "",
            "In per cent of what the student had, means of the seeds; of easy-VQA by the quickstart. Only tasks of one sparsity can be",
            "compared, and a difference that is smaller than that between two seeds of one task says nothing.",
            f"Every run: {links(names)}.",
            "",
            f"![What every tower kept, by task]({PICTURE.name})",
        ]
    )


def publish(runs: Path | None = None, root: Path = ROOT) -> list[Path]:
    """Write this machine's CSV (if `runs` is given), the block of the page and the picture below `root`; the files written or read.

    Raises:
        BadInput: as :func:`records`; or no CSV lies there, or two of them have one run.
    """
    if runs:
        path = root / csv_of(NAME, processor())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, as_csv(list(records(runs))))
    rows, names = all_rows(root, NAME, ("task", "seed", "tower", "kind"), fix="give the folder that benchmarks/scenes.py wrote")
    lines = quickstart(root) + rows
    page = with_block((root / PAGE).read_text("utf-8"), "kept", block(lines, names))
    plot(lines, root / PICTURE)
    write_atomic(root / PAGE, page.encode())
    return [root / PAGE, root / PICTURE, *(root / name for name in names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="the folder that scenes.py wrote")
    runs = parser.parse_args().runs
    return run_script(lambda: publish(runs))


if __name__ == "__main__":
    sys.exit(main())
