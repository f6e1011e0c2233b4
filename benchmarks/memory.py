"""The resident peak that a plan states beside the one that is measured, for stages and sizes.

python benchmarks/memory.py --work FOLDER [--only NAME]

Every command runs once with `--dry-run` and once for real, in fresh processes. Models and data are made here, in FOLDER; a model that is
there is used again. The rows of the CSV that are measured again are replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peaks import MIB, planned, run
from published import ROOT, as_csv, csv_of, rows_of

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.manifest import MANIFEST
from efficientvlm.runtime.hardware import processor

SHAPES = "shapes"
TUNED, UNTUNED = "bundled:easy-vqa", "bundled:easy-vqa-pretrained"
PARTS = ("process", "weights", "gradients", "optimizer", "gates", "teacher", "activations")
FEW = ("--max-steps", "3", "--set", "eval_limit=8")
REGIONS = ("--set", "region_probability=1")


def models() -> dict[str, list[str]]:
    """Folder → the command that makes it."""
    tuned = ["finetune", "--model", "small", "--data", SHAPES, "--batch-size", "4", "--max-steps", "1", "--set", "eval_limit=4"]
    return {"small": ["init", "--size", "small", "--data", SHAPES], "answering": tuned}


def cases() -> dict[str, list[str]]:
    """Name → what is measured."""
    found = {
        "eval, bundled": ["eval", "--model", TUNED, "--data", SHAPES, "--limit", "200"],
        "eval, small": ["eval", "--model", "answering", "--data", SHAPES, "--limit", "32"],
        "eval, retrieval, bundled": ["eval", "--model", UNTUNED, "--task", "retrieval", "--data", SHAPES, "--limit", "128"],
        "eval, retrieval, small": ["eval", "--model", "small", "--task", "retrieval", "--data", SHAPES, "--limit", "16", "--rerank", "4"],
        "bench, bundled": ["bench", "--model", TUNED, "--batch-size", "32", "--rounds", "2"],
        "bench, small": ["bench", "--model", "answering", "--batch-size", "8", "--rounds", "2"],
    }
    for name, general, tuned, batch in (("bundled", UNTUNED, TUNED, 64), ("small", "small", "answering", 12)):
        data = ("--data", SHAPES, "--batch-size", str(batch), *FEW)
        found |= {
            f"pretrain, {name}": ["pretrain", "--model", general, *data, "--set", "region_probability=0"],
            f"pretrain with regions, {name}": ["pretrain", "--model", general, *data, *REGIONS],
            f"distill with regions, {name}": ["distill", "--model", general, "--teacher", general, *data, *REGIONS],
            f"finetune, {name}": ["finetune", "--model", general, *data],
            f"finetune with teacher, {name}": ["finetune", "--model", general, "--teacher", tuned, *data],
            f"finetune, retrieval, {name}": ["finetune", "--model", general, "--task", "retrieval", *data],
            f"prune with teacher, {name}": ["prune", "--model", tuned, "--teacher", tuned, "--sparsity", "0.5", *data],
        }
    return found


def measure(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """A row of the CSV."""
    trained = arguments[0] not in ("eval", "bench")
    arguments = [*arguments, *(["--out", "out", "--force"] if trained else [])]
    stated = planned(*arguments, folder=folder)
    peak, seconds = run(*arguments, folder=folder)
    total = stated["total"] / MIB
    parts = {f"{part}_mib": stated.get(part, 0) / MIB for part in PARTS}
    where = {"cpu_seconds": seconds, "processor": processor(), "commit": manifest.code().commit, "date": manifest.now()[:10]}
    return {
        "case": name,
        "command": " ".join(arguments),
        "planned_mib": total,
        "measured_mib": peak,
        "ratio": total / peak,
        **parts,
        **where,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="a part of the name of the cases that are measured")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    for out, arguments in models().items():
        if not (asked.work / out / MANIFEST).is_file():
            run(*arguments, "--out", out, folder=asked.work)
    path = ROOT / csv_of("memory", processor())
    rows: dict[str, dict[str, Any]] = {row["case"]: dict(row) for row in rows_of(path)}
    for name, arguments in cases().items():
        if not asked.only or any(part in name for part in asked.only):
            rows[name] = measure(name, arguments, asked.work)
            print(f"{name}: planned {rows[name]['planned_mib']:.0f} MiB, measured {rows[name]['measured_mib']:.0f} MiB", flush=True)
            write_atomic(path, as_csv(list(rows.values())))


if __name__ == "__main__":
    main()
