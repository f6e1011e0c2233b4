"""At equal milliseconds, does a budget in milliseconds keep more than one in parameters?

python benchmarks/equal_time.py [--sparsity 0.8|0.6] [--seed 0] [--out runs/ablation]

On easy-VQA, the arm `tuned first` of `gates.py` says how many milliseconds, by a latency table, a network takes whose gates were learnt
under a budget of parameters. Under a budget of so many milliseconds gates are then learnt of the same network, with the same steps, floors
and teacher. Both are timed in turns beside the network before its gates. A pair of rows is appended to the CSV as soon as it is there;
pairs that are there are passed over, and a run that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from gates import CHOICES, DEFAULTS, SEEDS, USUAL
from published import ROOT, append, code, csv_of, rows_of
from vqa_ablation import DATA, FINETUNE_STEPS, LEARNT, TRAINING, Chain, Run

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints import manifest
from efficientvlm.compression.latency import NANOSECONDS, Milliseconds
from efficientvlm.control import Control
from efficientvlm.loaded import load
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages.budgeting import read_table
from efficientvlm.stages.run import module_of

TASK, BATCH = "easy-vqa", 8
REQUEST: dict[str, Any] = {"batch_sizes": [BATCH], "text_length": 12}
PARAMETERS, LATENCY = "parameters", "latency"


class Pair(Chain):
    """What comes of one network under either budget."""

    def __init__(self, sparsity: float, seed: int, root: Path) -> None:
        super().__init__(Run(DATA[TASK], CHOICES["tuned first"], sparsity, seed), root)

    @property
    def tuned(self) -> str:
        """The network that knows the task, before its gates."""
        return str(self.root / f"tuned-kd-{self.run.seed}")

    def table(self) -> Path:
        """Of the shapes of that network, which are those of all seeds: the first that is asked for is timed."""
        out = self.root / "latency-table.json"
        if not out.exists():
            self.stage("bench", out, models=[self.tuned], table=True, **REQUEST)
        return out

    def models(self) -> dict[str, Path]:
        """Both networks, by budget."""
        by_parameters, by_time = self.final(), self.root / f"equal-time-{self.run.sparsity:g}-{self.run.seed}"
        asked: dict[str, Any] = {"budget": LATENCY, "table": str(self.table()), "to": f"{self.milliseconds(by_parameters):.6f}ms"}
        common = {"data": self.run.data.questions, "seed": self.run.seed, "teacher": self.teacher(), "keep_dense": False}
        self.stage("prune", by_time, model=self.tuned, max_steps=FINETUNE_STEPS, **TRAINING, **common, **LEARNT | DEFAULTS, **asked)
        return {PARAMETERS: by_parameters, LATENCY: by_time}

    def milliseconds(self, folder: Path) -> float:
        """Of a request to a network, by the table."""
        return Milliseconds(load(str(folder)).model, read_table(self.table())).now / NANOSECONDS

    def rows(self) -> list[dict[str, Any]]:
        """One a budget, timed in turns."""
        models = self.models()
        given = {"models": [self.tuned, *map(str, models.values())], "rounds": 40, **REQUEST}
        timed = {line["model"]: line for line in module_of("bench").run(stage_settings("bench", given), Control())["latency"]}
        of = self.accuracy(self.teacher(), self.root / "teacher-test.json")["accuracy"]
        found = []
        for budget, folder in models.items():
            done = checkpoint.require_complete(str(folder))
            out = self.folder / "test.json" if budget == PARAMETERS else folder.with_name(f"{folder.name}-test.json")
            accuracy, line = self.accuracy(str(folder), out)["accuracy"], timed[str(folder)]
            found.append(
                {
                    "task": TASK,
                    "sparsity": self.run.sparsity,
                    "seed": self.run.seed,
                    "budget": budget,
                    "accuracy": accuracy,
                    "accuracy_of_teacher": accuracy / of,
                    "table_ms": self.milliseconds(folder),
                    "median_ms": line["median_ms"],
                    "speedup": line["speedup"],
                    "whole_ms": timed[self.tuned]["median_ms"],
                    "parameters": done.accounting["parameters"]["total"],
                    "macs": done.accounting["macs"]["total"],
                    "batch": BATCH,
                    "commit": code(),
                    "torch": manifest.environment()["torch"],
                    "date": manifest.now()[:10],
                }
            )
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, choices=USUAL, action="append", help="of the budget in parameters; both by default")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="where models are kept, those of gates.py")
    options = parser.parse_args(arguments)
    return run_script(lambda: [work(options.sparsity or USUAL, options.seed or SEEDS, options.out)])


def work(sparsities: Sequence[float], seeds: Sequence[int], root: Path) -> Path:
    """The CSV of this machine, to which pairs were added."""
    path = ROOT / csv_of("equal_time", processor())
    for sparsity, seed in product(sparsities, seeds):
        if (f"{sparsity:g}", str(seed)) not in {(line["sparsity"], line["seed"]) for line in rows_of(path)}:
            print(TASK, sparsity, seed, file=sys.stderr, flush=True)
            for record in Pair(sparsity, seed, root).rows():
                append(path, record)
    return path


if __name__ == "__main__":
    sys.exit(main())
