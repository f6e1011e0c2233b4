"""Publish a finished recipe flickr8k, flickr8k-captions or dlip/photos, teacher and students with and without it: CSV, table in docs/.

python benchmarks/flickr8k.py [--task retrieval|captions|dlip] [runs/flickr8k]

Nothing is measured or typed here, and no model is published. Run it on the machine that trained.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published import ROOT, as_csv, csv_of, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import fingerprint, require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.errors import BadInput
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script
from efficientvlm.stages.results import read_result

DIRECTIONS = ("image_to_text", "text_to_image")
TEACHER, PLAIN, METHOD = "teacher", "no-kd", "method"
CUT = "shrunk teacher cut by magnitude, then trained without a teacher"
TAUGHT = "shrunk teacher, distilled, pruned with learnt gates and KD, finetuned with KD"


@dataclass(frozen=True)
class Figures:
    """`rows`: model → its checkpoint, the stages that were trained for it (after the teacher), and what it is.

    `compared` are the metrics whose share of the teacher's is given; `results` end the names of the results that metrics are read from.
    """

    recipe: str
    compared: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[str, tuple[str, tuple[str, ...], str]]
    results: tuple[str, ...] = ("val",)
    page: Path = Path("docs/own-data.md")


RECALLS = tuple(f"{direction}_r{top}" for direction in DIRECTIONS for top in (1, 5, 10))
FIGURES = {
    "retrieval": Figures(
        "flickr8k",
        ("mean_recall",),
        (*RECALLS, "mean_recall", "itm_accuracy", "itm_preferred"),
        {
            TEACHER: ("teacher", ("aligned", "teacher"), "pretrained towers, contrast, then contrast and matching"),
            PLAIN: ("no-kd", ("no-kd",), CUT),
            METHOD: ("final", ("distilled", "pruned", "final"), TAUGHT),
        },
    ),
    "captions": Figures(
        "flickr8k-captions",
        ("cider_d",),
        ("bleu_1", "bleu_4", "rouge_l", "cider_d"),
        {
            TEACHER: ("captions-teacher", ("aligned", "captions-teacher"), "pretrained towers, contrast, then captions"),
            PLAIN: ("captions-no-kd", ("captions-no-kd",), CUT),
            METHOD: ("captions-final", ("captions-distilled", "captions-pruned", "captions-final"), TAUGHT),
        },
    ),
    "dlip": Figures(
        "dlip-photos",
        ("mean_recall", "cider_d"),
        (*RECALLS, "mean_recall", "itm_accuracy", "bleu_4", "cider_d"),
        {
            TEACHER: ("teacher", ("aligned", "teacher"), "pretrained towers, contrast, then contrast, matching and captions"),
            PLAIN: ("no-kd", ("no-kd",), "fewer layers and columns of the teacher, trained without it"),
            METHOD: ("method", ("method",), "the same beginning, all nine terms of DLIP"),
        },
        results=("retrieval", "captions"),
        page=Path("docs/dlip.md"),
    ),
}


def publish(run: Path, root: Path = ROOT, figures: Figures = FIGURES["retrieval"]) -> list[Path]:
    """Write the CSV and the table of the recipe output `run` below `root`; the files written.

    Raises:
        BadInput: a stage has not finished, a result is of another checkpoint than lies there now, or the page has no place for the table.
    """
    records, name = as_csv(rows(run, figures)), csv_of(figures.recipe.replace("-", "_"), processor())
    shown = list(csv.DictReader(io.StringIO(records.decode())))
    page = with_block((root / figures.page).read_text("utf-8"), figures.recipe, block(shown, name, figures))
    content = {root / name: records, root / figures.page: page.encode()}
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return list(content)


def rows(run: Path, figures: Figures) -> list[dict[str, Any]]:
    """One record a model, the teacher first.

    Raises:
        BadInput: as :func:`publish`; or the students were not trained for as many steps, or are not of one sparsity.
    """
    records = [row(run, name, figures) for name in figures.rows]
    teacher, plain, method = records
    if plain["steps"] != method["steps"] or abs(plain["sparsity"] - method["sparsity"]) > 0.005:
        steps, sparsity = (f"{plain[key]} and {method[key]}" for key in ("steps", "sparsity"))
        raise BadInput(f"{run}: the students cannot be compared", f"steps {steps}, sparsity {sparsity}", "run the recipe again")
    for record in records:
        record["parameters_of_teacher"] = record["parameters"] / teacher["parameters"]
        for metric in figures.compared:
            record[f"{metric}_of_teacher"] = record[metric] / teacher[metric] if teacher[metric] else None
    return records


def row(run: Path, name: str, figures: Figures) -> dict[str, Any]:
    """The record of one model."""
    folder, stages, what = figures.rows[name]
    done = require_complete(run / folder)
    results = {end: read_result(run / f"{folder}-{end}.json", "eval") for end in figures.results}
    for end, result in results.items():
        if result["provenance"]["inputs"].get("model") != fingerprint(str(run / folder)):
            raise BadInput(
                f"{run / folder}-{end}.json is out of date", "the checkpoint has changed since", f"evlm run {figures.recipe} again"
            )
    data = {(Path(result["data"]["name"]).name, result["data"]["split"], result["metrics"]["images"]) for result in results.values()}
    if len(data) > 1:
        raise BadInput(
            f"{run / folder}: its results cannot stand in one row", "they are of different data", f"evlm run {figures.recipe} again"
        )
    trained = [require_complete(run / stage) for stage in stages]
    metrics = {name: value for result in results.values() for name, value in result["metrics"].items()}
    errors = {name: value for result in results.values() for name, value in result["metrics"].get("standard_errors", {}).items()}
    counted, environment = done.accounting["parameters"], done.environment
    return {
        "model": name,
        "what": what,
        "parameters": counted["total"],
        "parameters_of_teacher": None,
        "parameters_without_embeddings": counted["without_embeddings"],
        "macs": done.accounting["macs"]["total"],
        "image_size": done.accounting["macs"]["image_size"],
        "sparsity": done.accounting["sparsity"]["achieved"],
        **{metric: metrics[metric] for metric in figures.metrics},
        **{f"{metric}_of_teacher": None for metric in figures.compared},
        "images": metrics["images"],
        "captions": metrics.get("captions"),
        "standard_error": errors.get(figures.compared[-1]),
        "data": "{} {}".format(*next(iter(data))),
        "training_images": next(record.count for record in trained[0].data if record.split == "train"),
        "steps": sum(steps(stage) for stage in trained),
        "samples": sum(stage.cost.samples for stage in trained),
        "seconds": round(sum(stage.cost.seconds for stage in trained)),
        "training_precision": trained[-1].config["precision"],
        "seed": done.seed,
        "torch": environment["torch"],
        "efficientvlm": done.code.version,
        "commit": done.code.commit,
        "date": done.created[:10],
    }


def steps(trained: Manifest) -> int:
    """Steps of a training stage."""
    return int(trained.config["max_steps"] or round(trained.cost.samples / trained.config["batch_size"]))


def block(records: list[dict[str, str]], name: Path, figures: Figures) -> str:
    """What stands between the markers of the page, from the lines of the CSV `name`."""
    teacher, student = records[0], records[-1]
    photos = f"{int(teacher['images']):,} photos" + (f" and {int(teacher['captions']):,} captions" if teacher["captions"] else "")
    if "cider_d" in figures.compared:
        written = both_table(records) if "mean_recall" in figures.compared else caption_table(records)
        error = f"The standard error of CIDEr-D by photo is {percent(student['standard_error'])}"
    else:
        written, found = table(records), float(student["image_to_text_r10"])
        error = f"The standard error of R@10 by photo is {percent((found * (1 - found) / int(teacher['images'])) ** 0.5)}"
    return "\n".join(
        [
            written,
            "",
            f"In per cent, of {photos} that were not trained on. One run, seed {student['seed']},",
            f"training in {student['training_precision']}: {teacher['steps']} steps of the teacher, {student['steps']} of each student,",
            f"{sum(int(record['seconds']) for record in records) / 60:.0f} minutes in all.",
            f"{error} points; differences that are not well above it say nothing.",
            f"All of it as CSV: [{name.name}](../{name.as_posix()}).",
        ]
    )


def headed(heads: tuple[str, ...]) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]


def caption_table(records: list[dict[str, str]]) -> str:
    """The lines of the CSV as a table in Markdown; metrics times 100."""
    heads = ("", "parameters", "of the teacher's", "CIDEr-D", "of the teacher's", "BLEU-1", "BLEU-4", "ROUGE-L")
    lines = headed(heads)
    for record in records:
        shares = [f"{percent(record[name])} %" for name in ("parameters_of_teacher", "cider_d_of_teacher")]
        rest = [percent(record[name]) for name in ("bleu_1", "bleu_4", "rouge_l")]
        size = f"{int(record['parameters']) / 1e6:.1f} M"
        lines.append(f"| {' | '.join([record['model'], size, shares[0], percent(record['cider_d']), shares[1], *rest])} |")
    return "\n".join(lines)


def both_table(records: list[dict[str, str]]) -> str:
    """The lines of a CSV of retrieval and captions as a table in Markdown; parameters also without embeddings, shares of the teacher's."""
    heads = (
        "",
        "parameters",
        "without embeddings",
        "R@1 / 5 / 10 by photo",
        "by caption",
        "mean recall",
        "kept",
        "CIDEr-D",
        "kept",
        "BLEU-4",
    )
    lines, teacher = headed(heads), records[0]
    for record in records:
        sizes = [
            f"{int(record[name]) / 1e6:.1f} M, {percent(int(record[name]) / int(teacher[name]))} %"
            for name in ("parameters", "parameters_without_embeddings")
        ]
        recalls = [" / ".join(percent(record[f"{direction}_r{top}"]) for top in (1, 5, 10)) for direction in DIRECTIONS]
        found = [text for name in ("mean_recall", "cider_d") for text in (percent(record[name]), kept(record[f"{name}_of_teacher"]))]
        lines.append(f"| {' | '.join([record['model'], *sizes, *recalls, *found, percent(record['bleu_4'])])} |")
    return "\n".join(lines)


def table(records: list[dict[str, str]]) -> str:
    """The lines of the CSV as a table in Markdown; fractions in per cent."""
    heads = (
        "",
        "parameters",
        "of the teacher's",
        "captions by photo, R@1 / 5 / 10",
        "photos by caption, R@1 / 5 / 10",
        "mean recall",
        "matching",
        "match preferred",
    )
    lines = headed(heads)
    for record in records:
        recalls = [" / ".join(percent(record[f"{direction}_r{top}"]) for top in (1, 5, 10)) for direction in DIRECTIONS]
        share = percent(record["parameters_of_teacher"])
        rest = [percent(record[name]) for name in ("mean_recall", "itm_accuracy", "itm_preferred")]
        cells = (record["model"], f"{int(record['parameters']) / 1e6:.1f} M", f"{share} %", *recalls, *rest)
        lines.append(f"| {' | '.join(cells)} |")
    images = int(records[0]["images"])
    by_photo = " / ".join(percent(1 - (1 - 1 / images) ** top) for top in (1, 5, 10))  # each caption is one of its own with this chance
    by_caption = " / ".join(percent(top / images) for top in (1, 5, 10))
    lines.append(f"| by chance | | | {by_photo} | {by_caption} | | 50.0 | 50.0 |")
    return "\n".join(lines)


def kept(fraction: str) -> str:
    """Of what the teacher has; a dash where it has nothing."""
    return f"{percent(fraction)} %" if fraction else "–"


def percent(fraction: str | float) -> str:
    return f"{100 * float(fraction):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Publish a finished recipe flickr8k, flickr8k-captions or dlip/photos in benchmarks/results."
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of the recipe's stages; else runs/RECIPE")
    parser.add_argument("--task", choices=FIGURES, default="retrieval")
    options = parser.parse_args()
    figures = FIGURES[options.task]
    return run_script(lambda: publish(options.run or Path("runs") / figures.recipe, figures=figures))


if __name__ == "__main__":
    sys.exit(main())
