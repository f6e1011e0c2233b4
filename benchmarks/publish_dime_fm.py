"""Publish what `dime_fm.py` has measured so far: a table with a verdict a part, and a plot. Nothing is measured or typed here.

python benchmarks/publish_dime_fm.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from publish_scenes import Lines, of
from published import ROOT, against, all_rows, csvs, grouped, links, markdown, of_one_torch, spread, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.errors import BadInput
from efficientvlm.script import run_script

PAGE, PICTURE = Path("docs/dime-fm.md"), Path("docs/dime-fm.png")
TEACHER, STUDENT, PUBLISHED, UNREAD, PRUNED = "teacher", "student", "both terms", "both terms unread", "pruned"
ACCURACY, FIRST, SMALL, FAST = 0.95, 0.9, 0.29, 0.9
"""The target on scenes: at least these parts of the teacher's accuracy and R@1, at most this part of its tower's parameters, at least this
part of what fewer multiply-adds promise."""
FOUND = 0.5
"""R@1 and accuracy from which on a teacher is worth following."""
STORED = 2.0
"""How many times as fast training from the stores of both sides has to be."""
SELECTED, WHOLE, RANDOM, PAIRS = "selected", "whole pile", "random part", "true pairs"
ORDER = (TEACHER, PAIRS, SELECTED, RANDOM, WHOLE)
"""Rows of photos that come first, in the order of what they tell; the others follow as they were measured."""
FEW, MANY = 8, 32
"""Batches that are timed; the target is held against the larger one, in which what is no product of matrices takes little."""
COLOURS = {TEACHER: "#1f2733", STUDENT: "#2a6fbb", PUBLISHED: "#3f8f5f", UNREAD: "#7b4fa3", PRUNED: "#d9822b"}


def of_photo_models(lines: Lines) -> dict[str, Lines]:
    """The rows of photos by model, in the order in which they are shown."""
    models = grouped(lines, "model")
    return {name: models[name] for name in (*ORDER, *models) if name in models}


def loads(lines: Lines) -> str:
    found = of(lines, "load")
    return f"{min(found):g} to {max(found):g}"


def percent(lines: Lines, column: str) -> str:
    values = of(lines, column)
    return f"{100 * mean(values):.1f} %" if values else "–"


def of_macs(lines: Lines, batch: int = MANY) -> float:
    """What is reached of the speed-up that fewer multiply-adds promise, mean of the seeds."""
    return mean(float(line[f"batch_{batch}_speedup"]) * float(line["macs_of_teacher"]) for line in lines)


def scenes(lines: Lines) -> list[str]:
    models = grouped(lines, "model")
    fast = (f"faster at batch {FEW} / {MANY}", "of the MACs' ratio")
    head = ("model", "seeds", "accuracy", "of the teacher's", "R@1", "of the teacher's", "tower of images", *fast)
    rows = []
    for name, some in models.items():
        size = f"{mean(of(some, 'vision_parameters')) / 1e6:.2f} M, {percent(some, 'vision_of_teacher')}"
        times = " / ".join(f"{mean(of(some, f'batch_{batch}_speedup')):.2f} ×" for batch in (FEW, MANY))
        part = " / ".join(f"{100 * of_macs(some, batch):.0f} %" for batch in (FEW, MANY))
        values = [spread(of(some, column)) for column in ("accuracy", "r1")]
        kept = [f"{spread(of(some, column))} %" for column in ("accuracy_of_teacher", "r1_of_teacher")]
        rows.append((name, str(len(some)), values[0], kept[0], values[1], kept[1], size, times, part))
    sizes = [f"{int(lines[0][column]):,}" for column in ("classified", "images")]
    data = f"Accuracy among all colours of shapes: of {sizes[0]} test images of `{lines[0]['classified_data']}`. R@1, as mean of both "
    data += f"ways: among {sizes[1]} of `{lines[0]['data']}`."
    timed = f"Timed with {lines[0]['threads']} thread(s), load of the machine {loads(lines)}."
    return [data, "", *markdown(head, rows), "", *(f"- {text}" for text in of_scenes(models)), "", timed]


def of_scenes(models: dict[str, Lines]) -> list[str]:
    """What the students reach of the target, each a sentence."""
    said = []
    for name in (STUDENT, PUBLISHED, UNREAD, PRUNED):
        if name not in models:
            said.append(f"`{name}`: not measured yet.")
            continue
        some = models[name]
        kept = [mean(of(some, column)) if of(some, column) else 0.0 for column in ("accuracy_of_teacher", "r1_of_teacher")]
        small, fast = max(of(some, "vision_of_teacher")), of_macs(some)
        reached = kept[0] >= ACCURACY and kept[1] >= FIRST and small <= SMALL and fast >= FAST
        text = f"`{name}` keeps {100 * kept[0]:.1f} % of the teacher's accuracy (target: {100 * ACCURACY:g} %) and "
        text += f"{100 * kept[1]:.1f} % of its R@1 ({100 * FIRST:g} %) with {100 * small:.1f} % of its tower's parameters "
        text += (
            f"({100 * SMALL:g} %), and is faster by {100 * fast:.0f} % of the ratio of multiply-adds at batch {MANY} ({100 * FAST:g} %): "
        )
        said.append(f"{text}{'reached' if reached else 'missed'}{', of one seed' if len(some) == 1 else ''}.")
    if STUDENT in models and PRUNED in models:
        both = {line["seed"] for line in models[STUDENT]} & {line["seed"] for line in models[PRUNED]}
        for column, unit in (("accuracy", "points of accuracy"), ("r1", "points of R@1")):
            own, other = (of([line for line in models[name] if line["seed"] in both], column) for name in (PRUNED, STUDENT))
            if both:
                said.append(f"`{PRUNED}`, of equal size, against `{STUDENT}`, of the same seeds: {against(own, other, unit)}.")
    teachers = models.get(TEACHER, [])
    for column, what in (("r1", "R@1"), ("accuracy", "accuracy")):
        if weak := [line for line in teachers if float(line[column]) < FOUND]:
            seeds = ", ".join(line["seed"] for line in weak)
            alone = "Nothing of this counts" if len(weak) == len(teachers) else f"Seed {seeds} says little"
            values = ", ".join(f"{100 * float(line[column]):.1f}" for line in weak)
            said.append(f"{alone}: the teacher's {what} is {values} %, less than {100 * FOUND:.0f}.")
    return said


def store(lines: Lines) -> list[str]:
    head = ("networks", "looked up", "images a second", "quartiles", "faster", "teacher (ms)", "student (ms)", "rest (ms)")
    rows = []
    for line in lines:
        speed, low, high = (f"{float(line[column]):.1f}" for column in ("images_per_s", "images_per_s_q1", "images_per_s_q3"))
        rest = float(line["data_ms"]) + float(line["optimizer_ms"])
        times = (f"{float(line['teacher_ms']):.0f}", f"{float(line['student_ms']):.0f}", f"{rest:.0f}")
        looked_up = "nothing" if line["source"] == "live" else line["source"]
        rows.append((line["what"], looked_up, speed, f"{low} to {high}", f"{float(line['speedup']):.2f} ×", *times))
    said = []
    for name, some in grouped(lines, "pair").items():
        both = next((float(line["speedup"]) for line in some if line["source"] == "images and sentences"), None)
        if both is not None:
            text = (
                f"{some[0]['what']}, {some[0]['batch_size']} images and as many sentences a step: {both:.2f} times as many images a second"
            )
            said.append(f"- `{name}`, {text} (target: {STORED:g}): {'reached' if both >= STORED else 'missed'}.")
    timed = f"Medians of steps in one process with {lines[0]['threads']} thread(s), the ways in turns; load of the machine {loads(lines)}."
    return [*markdown(head, rows), "", *said, "", timed]


def photos(lines: Lines) -> list[str]:
    models = of_photo_models(lines)
    shown = ("mean recall", "of the teacher's", "R@1: photo to text", "text to photo")
    head = ("model", "seeds", "photos", "sentences", "captions among them", *shown)
    rows = []
    for name, some in models.items():
        sentences = f"{int(some[0]['sentences']):,}" if some[0]["sentences"] else "–"
        firsts = [spread(of(some, f"{direction}_r1")) for direction in ("image_to_text", "text_to_image")]
        recall, kept = spread(of(some, "mean_recall")), percent(some, "of_teacher")
        rows.append(
            (name, str(len(some)), f"{int(some[0]['photos']):,}", sentences, percent(some, "captions_among"), recall, kept, *firsts)
        )
    trained = [line for line in lines if line["model"] != TEACHER]
    how = [" or ".join(dict.fromkeys(line[column] for line in trained)) for column in ("steps", "precision")]
    steps = f"Students were trained for {how[0]} steps, in {how[1]}." if trained else "No student was trained yet."
    return [*markdown(head, rows), "", *(f"- {text}" for text in of_photos(models)), "", steps]


def of_photos(models: dict[str, Lines]) -> list[str]:
    """What the rows say of the paper's claim and of the selection, each a sentence."""
    recalls = {name: of(some, "mean_recall") for name, some in models.items()}
    said = []
    for name, text in (
        (PAIRS, "the same student, trained on true pairs for as many steps"),
        (WHOLE, "the whole pile"),
        (RANDOM, "a random part of equal size"),
    ):
        if SELECTED in recalls and name in recalls:
            said.append(f"Selected sentences against {text}: {against(recalls[SELECTED], recalls[name])}.")
    others = [name for name in recalls if name not in ORDER] if SELECTED in recalls else []
    said += [f"`{name}` against `{SELECTED}`: {against(recalls[name], recalls[SELECTED])}." for name in others]
    if SELECTED in recalls and PAIRS in recalls:
        pairs = mean(recalls[PAIRS])
        reached = mean(recalls[SELECTED]) >= pairs
        text = f"That no pairs are needed to reach what pairs give, as the paper says, {'holds' if reached else 'does not hold'} here for"
        text += f" `{SELECTED}` (both terms)"
        more = [name for name in others if mean(recalls[name]) >= pairs]
        reach = "; ".join(f"`{name}` ({seeds_in_words(recalls[name])}) reaches it" for name in more)
        said.append(f"{text}{f', while {reach}' if reach else ''}.")
    return said


def seeds_in_words(values: list[float]) -> str:
    return "one seed" if len(values) == 1 else f"{len(values)} seeds"


def plot_scenes(axes: Any, lines: Lines) -> None:
    """What is kept over the size of the tower, a point a run."""
    for name, some in grouped(lines, "model").items():
        sizes = [100 * part for part in of(some, "vision_of_teacher")]
        axes.scatter(sizes, [100 * part for part in of(some, "accuracy")], color=COLOURS[name], s=26, label=name, zorder=3)
        axes.scatter(sizes, [100 * part for part in of(some, "r1")], color=COLOURS[name], s=26, marker="^", zorder=3)
    axes.set(
        title="scenes", xlabel="tower of images (% of the teacher's)", ylabel="accuracy (●), R@1 (▲), in %", xlim=(0, 108), ylim=(0, 104)
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def plot_store(axes: Any, lines: Lines) -> None:
    """How many times as fast steps are, by what is looked up."""
    pairs = grouped(lines, "pair")
    for number, (name, some) in enumerate(pairs.items()):
        places = [place + 0.8 * number / len(pairs) for place in range(len(some))]
        axes.barh(places, of(some, "speedup"), 0.8 / len(pairs), label=name)
    axes.set_yticks([place + 0.4 - 0.4 / len(pairs) for place in range(3)], ["nothing", "images", "images,\nsentences"], fontsize=8)
    axes.set(title="looked up in stores", xlabel="images a second (× the live teacher's)")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)


def plot_photos(axes: Any, lines: Lines) -> None:
    """Mean recall by row, a point a seed beside the mean."""
    models = of_photo_models(lines)
    axes.barh(range(len(models)), [100 * mean(of(some, "mean_recall")) for some in models.values()], color="#aeb6c1")
    for place, some in enumerate(models.values()):
        axes.scatter([100 * value for value in of(some, "mean_recall")], [place] * len(some), color="#1f2733", s=14, zorder=3)
    axes.set_yticks(range(len(models)), list(models), fontsize=8)
    axes.set(title="photos", xlabel="mean recall (%)")
    axes.invert_yaxis()


PARTS: dict[str, tuple[Callable[[Lines], list[str]], Callable[[Any, Lines], None]]] = {
    "scenes": (scenes, plot_scenes),
    "store": (store, plot_store),
    "photos": (photos, plot_photos),
}
"""Part → what stands between its markers, and its panel."""
KEYS = {"scenes": ("seed", "model"), "store": ("pair", "source"), "photos": ("seed", "model")}
"""Part → columns by which its rows are known."""


def plot(measured: dict[str, Lines], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(measured), 4.2), dpi=130, layout="constrained")
    for axes, (part, lines) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True):
        PARTS[part][1](axes, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def publish(root: Path = ROOT) -> list[Path]:
    """Write the blocks of the page and the plot below `root` from the CSVs there, of the parts that have one; the files written.

    Raises:
        BadInput: no CSV at all, one run in two of them, rows of several torches, or a page without the markers.
    """
    page, measured = (root / PAGE).read_text("utf-8"), {}
    for part, (block, _) in PARTS.items():
        if not csvs(root, f"dime_fm_{part}"):
            continue
        lines, names = all_rows(root, f"dime_fm_{part}", KEYS[part], fix="run benchmarks/dime_fm.py")
        of_one_torch(lines)
        measured[part] = lines
        page = with_block(page, f"dime-fm-{part}", "\n".join([*block(lines), f"Every row: {links(names)}."]))
    if not measured:
        raise BadInput("there are no CSVs of DIME-FM", "nothing was measured", "run benchmarks/dime_fm.py")
    plot(measured, root / PICTURE)
    page = with_block(page, "dime-fm-plot", f"![Figures of DIME-FM]({PICTURE.name})")
    write_atomic(root / PAGE, page.encode())
    return [root / PAGE, root / PICTURE]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(run_script(publish))
