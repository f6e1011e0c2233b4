"""Do gates that are learnt choose better than magnitude on real photos, where three fifths go? Retrieval, from one distilled student.

python benchmarks/photo_gates.py --data DIR --towers DIR [--seed 0] [--precision fp32|bf16] [--out runs/photo-gates] [--list]

Teacher and student are those of the recipe `flickr8k`. The student is trained on the task under its teacher for half of the steps, once a
seed; then gates are learnt (the defaults of `prune`), or magnitude cuts, and the other half follows, under the same teacher. A row is
appended to the CSV as soon as it is measured; rows that are there are passed over, and a training that was interrupted resumes.
`publish_gates.py` makes a table of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from published import ROOT, about, append, csv_of, of_towers, rows_of
from scenes import Chain

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script

RECIPE = ROOT / "recipes" / "flickr8k.yaml"
SEEDS = (0, 1, 2)
SPARSITY, STEPS = 0.6, 300
"""What is removed of the prunable weights, and the steps of each half."""
LEARNT, MAGNITUDE = "tuned first", "magnitude-kd"
WHAT = {
    LEARNT: "trained on the task, then gates learnt under the defaults, both with a teacher",
    MAGNITUDE: "trained on the task, cut by weight magnitude, trained on, all with a teacher",
}
METHODS = {LEARNT: "l0", MAGNITUDE: "magnitude"}
OWN = ("gates", "sparsity_hold", "sparsity_warmup")
"""What the recipe sets about its gates, in place of the defaults."""


class Photos(Chain):
    """All rows; one teacher and one distilled student serve them."""

    def __init__(self, root: Path, overrides: Sequence[str]) -> None:
        super().__init__(RECIPE, SEEDS[0], root, overrides)

    def model(self, arm: str, seed: int) -> str:
        """The checkpoint of a row."""
        student, tuned, out = self.made("distilled"), f"tuned-{seed}", f"{arm.replace(' ', '-')}-{seed}"
        self.like("final", tuned, model=student, seed=seed, max_steps=STEPS)
        cut = {"method": METHODS[arm], "sparsity": SPARSITY, "max_steps": STEPS, **dict.fromkeys(OWN)}
        self.like("pruned", out, model=str(self.root / tuned), seed=seed, **cut)
        return str(self.root / out)

    def recall(self, model: str) -> dict[str, Any]:
        """The metrics of a model on the validation photos, measured once."""
        return dict(self.like("teacher-val", f"{Path(model).name}-val.json", model=model)["metrics"])


def row(arm: str, seed: int, chain: Photos) -> dict[str, Any]:
    """Train, measure and say what came out."""
    began = time.process_time()
    folder, teacher = chain.model(arm, seed), chain.made("teacher")
    seconds = time.process_time() - began
    model, of = (checkpoint.require_complete(each).accounting for each in (folder, teacher))
    found, best = chain.recall(folder), chain.recall(teacher)
    return {
        "arm": arm,
        "sparsity": SPARSITY,
        "seed": seed,
        "achieved_sparsity": model["sparsity"]["achieved"],
        "parameters": model["parameters"]["total"],
        "parameters_of_teacher": model["parameters"]["total"] / of["parameters"]["total"],
        "macs": model["macs"]["total"],
        "macs_of_teacher": model["macs"]["total"] / of["macs"]["total"],
        **{name: found[name] for name in ("mean_recall", "image_to_text_r1", "text_to_image_r1")},
        "teacher_mean_recall": best["mean_recall"],
        "mean_recall_of_teacher": found["mean_recall"] / best["mean_recall"],
        "task_steps": 2 * STEPS,
        "precision": chain.settings("final").precision,
        "cpu_seconds": round(seconds, 1),
        **about(WHAT[arm]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k", help="a folder with train.parquet and val.parquet, or other data with captions")
    parser.add_argument("--towers", type=Path, default=Path("towers"), help="what efficientvlm.examples.towers wrote")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="all by default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="in which networks are trained")
    parser.add_argument("--out", type=Path, default=Path("runs/photo-gates"), help="where models are kept")
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    options = parser.parse_args(arguments)
    return run_script(lambda: [work(options)])


def work(options: argparse.Namespace) -> Path:
    """The CSV of this machine, to which rows were added."""
    path = ROOT / csv_of("photo_gates", processor())
    given = [f"data={options.data}", f"precision={options.precision}", *of_towers(options.towers)]
    for seed, arm in product(options.seed or SEEDS, WHAT):
        if (arm, str(seed)) not in {(line["arm"], line["seed"]) for line in rows_of(path)}:
            print(arm, seed, file=sys.stderr, flush=True)
            if not options.list:
                append(path, row(arm, seed, Photos(options.out, given)))
    return path


if __name__ == "__main__":
    sys.exit(main())
