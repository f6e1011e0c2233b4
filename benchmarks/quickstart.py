"""Publish a finished quickstart: figures as CSV, table in README.md, picture in docs/. Nothing is measured or typed here.

python benchmarks/quickstart.py [runs/quickstart] [OTHER ...]

OTHER are runs of the same recipe with other seeds: their figures are in the CSV too, and their results in a line below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from published import ROOT, as_csv, csv_of, markers, with_block

from efficientvlm.checkpoints.files import resolve, write_atomic
from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.checkpoints.manifest import read
from efficientvlm.errors import BadInput
from efficientvlm.script import run_script

BEGIN, END = markers("quickstart")
PICTURE = Path("docs/quickstart-structure.png")
LAYERED, KINDS = ("vision", "text", "fusion", "decoder"), ("head", "cross_head", "neuron")
AGAIN = "run evlm run quickstart again"


def publish(run: Path, root: Path = ROOT, others: Sequence[Path] = ()) -> list[Path]:
    """Write the CSV, the README block and the picture of the recipe output `run` below `root`; the files written.

    `others` are outputs of the same recipe with other seeds.

    Raises:
        BadInput: no finished report in `run`, one of other checkpoints than lie there now, or a README without the two markers.
    """
    report = run / "report"
    summary, *more = (read_summary(folder / "report" / "summary.json") for folder in (run, *others))
    texts = [report / "summary.txt", report / "structure.png"]
    if missing := [path for path in texts if not path.is_file()]:
        raise BadInput(f"{missing[0]} is not there", "the report is not complete", AGAIN)
    table = texts[0].read_text("utf-8").rstrip("\n")
    name = csv_of("quickstart", summary["speed"]["machine"]["name"])
    readme = with_block((root / "README.md").read_text("utf-8"), "quickstart", block(table, summary, more, name))
    records = [record for each in (summary, *more) for record in rows(each)]
    content = {root / name: as_csv(records), root / PICTURE: texts[1].read_bytes(), root / "README.md": readme.encode()}
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return list(content)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a report, if it is of the checkpoints that lie there now and holds everything that is published."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        made_of = {label: (record["path"], record["sha256"]) for label, record in summary["provenance"]["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no summary", "the quickstart has not finished there", "make quickstart, or name its folder") from None
    for label, (spec, digest) in made_of.items():
        if fingerprint(spec) != digest:
            raise BadInput(f"{path} is out of date", f"{label} ({spec}) has changed since", AGAIN)
    if not summary.get("test") or not summary.get("speed"):
        raise BadInput(f"{path} is incomplete", "it has no accuracy or no latency", AGAIN)
    return summary


def rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a model; what a model does not have (a decoder, a measured accuracy) is None."""
    models, speed, provenance = summary["models"], summary["speed"], summary["provenance"]
    present = {tower for model in models.values() for tower in model["parameters"]["by_tower"]}
    towers = [tower for tower in (*LAYERED, "heads") if tower in present]
    seed = seed_of(summary)
    records = []
    for label, model in models.items():
        parameters = model["parameters"]
        record: dict[str, Any] = {
            "model": label,
            "seed": seed,
            "stage": model["stage"],
            "parameters": parameters["total"],
            "parameters_of_reference": parameters["of_reference"],
            "parameters_without_embeddings": parameters["without_embeddings"],
            "parameters_embeddings": parameters["embeddings"],
            **{f"parameters_{tower}": parameters["by_tower"].get(tower) for tower in towers},
            "macs": model["macs"]["total"],
            "macs_of_reference": model["macs"]["of_reference"],
            "image_size": model["macs"]["image_size"],
            "text_length": model["macs"]["text_length"],
            "sparsity": model["sparsity"],
            "accuracy": model["accuracy"],
            "accuracy_of_reference": model["accuracy_of_reference"],
            "standard_error": model["standard_error"],
            "majority_accuracy": model["majority_accuracy"],
            "questions": summary["test"]["counted"]["questions"] if model["accuracy"] is not None else None,
        }
        for tower in (tower for tower in towers if tower in LAYERED):
            record[f"{tower}_layers"] = model["layers"].get(tower, 0)
            for kind in KINDS if tower in ("fusion", "decoder") else ("head", "neuron"):
                record[f"{tower}_{kind}_kept"], record[f"{tower}_{kind}_of"] = model["kept"].get(tower, {}).get(kind, (None, None))
        for size in ("1", "8"):
            timed = model["latency"].get(size, {})
            for key in ("median_ms", "p10_ms", "p90_ms", "speedup", "speedup_q1", "speedup_q3"):
                record[f"batch_{size}_{key}"] = timed.get(key)
        records.append(
            {
                **record,
                "timed_with_untrained_decoder": model["timed_untrained"],
                "reference": summary["reference"],
                "data": f"{summary['test']['data']} {summary['test']['split']}",
                "device": speed["machine"]["device"],
                "processor": speed["machine"]["name"],
                "cpus": speed["machine"]["cpus"],
                "threads": speed["machine"]["threads"],
                "precision": speed["precision"],
                "torch": speed["machine"]["torch"],
                "efficientvlm": provenance["code"]["version"],
                "commit": provenance["code"]["commit"],
                "date": provenance["created"][:10],
            }
        )
    return records


def seed_of(summary: dict[str, Any]) -> int:
    """The seed of the run that made the last model of a summary."""
    last = list(summary["models"])[-1]
    return int(read(resolve(summary["provenance"]["models"][last]["path"])).config["seed"])


def spelled(summary: dict[str, Any]) -> str:
    """What became of the last model, in words."""
    last = list(summary["models"].values())[-1]
    parts = f"{last['parameters']['of_reference']:.1%} of the parameters, {last['accuracy_of_reference']:.1%} of the accuracy"
    return f"seed {seed_of(summary)}: {parts}, {last['latency']['8']['speedup']:.2f}×".replace("%", " %")


def block(table: str, summary: dict[str, Any], others: Sequence[dict[str, Any]], name: Path) -> str:
    """What stands between the markers of the README."""
    machine, provenance = summary["speed"]["machine"], summary["provenance"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    source = f"Measured on {provenance['created'][:10]}: {machine['name']}, {threads}, torch {machine['torch']}."
    again = [f"The same recipe with other seeds: {'; '.join(map(spelled, others))}.", ""] if others else []
    return "\n".join(
        [
            *("```text", table, "```", ""),
            f"{source} The same figures as CSV: [{name.name}]({name.as_posix()}).",
            "",
            *again,
            f"![Heads and neurons that each model keeps]({PICTURE.as_posix()})",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Publish a finished quickstart in the README and in benchmarks/results.")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="folder of the recipe's stages")
    parser.add_argument("others", nargs="*", type=Path, help="runs of the recipe with other seeds")
    given = parser.parse_args()
    return run_script(lambda: publish(given.run, others=given.others))


if __name__ == "__main__":
    sys.exit(main())
