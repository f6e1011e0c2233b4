"""Publish a finished recipe flickr8k: retrieval of the teacher, of a student without a teacher, and of the method; CSV, table in docs/.

python benchmarks/flickr8k.py [runs/flickr8k]

Nothing is measured or typed here, and no model is published. Run it on the machine that trained.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
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

# row → its checkpoint, the stages that were trained for it (after the teacher), and what it is
ROWS = {
    "teacher": ("teacher", ("aligned", "teacher"), "pretrained towers, contrast, then contrast and matching"),
    "no-kd": ("no-kd", ("no-kd",), "shrunk teacher cut by magnitude, then trained without a teacher"),
    "method": ("final", ("distilled", "pruned", "final"), "shrunk teacher, distilled, pruned with learnt gates and KD, finetuned with KD"),
}
PAGE = Path("docs/own-data.md")
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = (*(f"{direction}_r{top}" for direction in DIRECTIONS for top in (1, 5, 10)), "mean_recall", "itm_accuracy", "itm_preferred")


def publish(run: Path, root: Path = ROOT) -> list[Path]:
    """Write the CSV and the table of the recipe output `run` below `root`; the files written.

    Raises:
        BadInput: a stage has not finished, a result is of another checkpoint than lies there now, or the page has no place for the table.
    """
    records, name = as_csv(rows(run)), csv_of("flickr8k", processor())
    shown = list(csv.DictReader(io.StringIO(records.decode())))
    page = with_block((root / PAGE).read_text("utf-8"), "flickr8k", block(shown, name))
    content = {root / name: records, root / PAGE: page.encode()}
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return list(content)


def rows(run: Path) -> list[dict[str, Any]]:
    """One record a model, the teacher first.

    Raises:
        BadInput: as :func:`publish`; or the students were not trained for as many steps, or are not of one sparsity.
    """
    records = [row(run, name) for name in ROWS]
    teacher, plain, method = records
    if plain["steps"] != method["steps"] or abs(plain["sparsity"] - method["sparsity"]) > 0.005:
        steps, sparsity = (f"{plain[key]} and {method[key]}" for key in ("steps", "sparsity"))
        raise BadInput(f"{run}: the students cannot be compared", f"steps {steps}, sparsity {sparsity}", "run the recipe again")
    for record in records:
        record["parameters_of_teacher"] = record["parameters"] / teacher["parameters"]
        record["mean_recall_of_teacher"] = record["mean_recall"] / teacher["mean_recall"]
    return records


def row(run: Path, name: str) -> dict[str, Any]:
    """The record of one model."""
    folder, stages, what = ROWS[name]
    done, result = require_complete(run / folder), read_result(run / f"{folder}-val.json", "eval")
    if result["provenance"]["inputs"].get("model") != fingerprint(str(run / folder)):
        raise BadInput(f"{run / folder}-val.json is out of date", "the checkpoint has changed since", "evlm run flickr8k again")
    trained = [require_complete(run / stage) for stage in stages]
    metrics, environment = result["metrics"], done.environment
    return {
        "model": name,
        "what": what,
        "parameters": done.accounting["parameters"]["total"],
        "parameters_of_teacher": None,
        "macs": done.accounting["macs"]["total"],
        "image_size": done.accounting["macs"]["image_size"],
        "sparsity": done.accounting["sparsity"]["achieved"],
        **{metric: metrics[metric] for metric in METRICS},
        "mean_recall_of_teacher": None,
        "images": metrics["images"],
        "captions": metrics["captions"],
        "data": f"{Path(result['data']['name']).name} {result['data']['split']}",
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


def block(records: list[dict[str, str]], name: Path) -> str:
    """What stands between the markers of the page, from the lines of the CSV `name`."""
    teacher, student = records[0], records[-1]
    images, captions, found = int(teacher["images"]), int(teacher["captions"]), float(student["image_to_text_r10"])
    error = percent((found * (1 - found) / images) ** 0.5)
    return "\n".join(
        [
            table(records),
            "",
            f"In per cent, of {images:,} photos and {captions:,} captions that were not trained on. One run, seed {student['seed']},",
            f"training in {student['training_precision']}: {teacher['steps']} steps of the teacher, {student['steps']} of each student,",
            f"{sum(int(record['seconds']) for record in records) / 60:.0f} minutes in all.",
            f"The standard error of R@10 by photo is {error} points; differences that are not well above it say nothing.",
            f"All of it as CSV: [{name.name}](../{name.as_posix()}).",
        ]
    )


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
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
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


def percent(fraction: str | float) -> str:
    return f"{100 * float(fraction):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Publish a finished recipe flickr8k in benchmarks/results.")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/flickr8k"), help="folder of the recipe's stages")
    run = parser.parse_args().run
    return run_script(lambda: publish(run))


if __name__ == "__main__":
    sys.exit(main())
