"""Do gates that are learnt choose better than a score does, where little may stay? Every arm with the same teacher, floors and steps.

python benchmarks/gates.py [--data easy-vqa|shapes] [--sparsity 0.4|0.6|0.8] [--seed 0] [--arm NAME] [--times 1]
    [--out runs/ablation] [--list]

Chains and rows are those of `vqa_ablation.py`, and so are models that both need. With `--times 2` all arms take twice the steps on the
task, and a CSV of its own has the rows. A row is appended to the CSV as soon as a run ends; runs that have a row are passed over, and a run
that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from published import ROOT, csv_of
from vqa_ablation import ARMS, DATA, Arm, Run, fill

from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script

SPARSITIES = (0.8, 0.6, 0.4)
USUAL = SPARSITIES[:2]
"""What all arms are run at."""
SEEDS = (0, 1, 2)
CSVS = {1: "gates", 2: "gates_x2"}
"""How many times the usual steps → the name of the CSV of such rows."""
DEFAULTS: dict[str, Any] = {"sparsity_hold": 0.3, "gates": {}}
CHOICES = {
    arm.name: arm
    for arm in (
        Arm("multipliers", "gates learnt from the start, under multipliers and a target that grows linearly (as published)"),
        Arm("held", "the same, but the target begins to rise after 0.3 of the gate phase", gates={"sparsity_hold": 0.3}),
        Arm("held, one stage", "the same, and both stages in one of their length", gates={"sparsity_hold": 0.3}, one=True),
        Arm("defaults", "the same, with rates by the steps and heads that begin open (the defaults)", gates=DEFAULTS, one=True),
        Arm("tuned first", "trained on the task, then gates learnt under the defaults, and both in as many steps", "tuned", gates=DEFAULTS),
        ARMS["magnitude-kd"],
        Arm("taylor-kd", "the method with Torch-Pruning Taylor importance in place of learnt gates", "tuned", method="taylor"),
    )
}


def runs(data: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int], arms: Sequence[str], times: int = 1) -> list[Run]:
    """All arms of one task, sparsity and seed one after the other."""
    return [Run(DATA[task], CHOICES[arm], part, seed, times) for part, seed, task, arm in product(sparsities, seeds, data, arms)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (("data", list(DATA)), ("sparsity", SPARSITIES), ("seed", SEEDS), ("arm", list(CHOICES))):
        parser.add_argument(
            f"--{option}",
            type=type(known[0]),
            choices=known,
            action="append",
            default=None,
            help="all by default, of sparsities 0.8 and 0.6",
        )
    parser.add_argument("--times", type=int, choices=list(CSVS), default=1, help="how many times the usual steps on the task")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="where models are kept")
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    options = parser.parse_args(arguments)
    arms = options.arm or list(CHOICES)
    chosen = runs(options.data or list(DATA), options.sparsity or USUAL, options.seed or SEEDS, arms, options.times)
    return run_script(lambda: [work(chosen, options.out, CSVS[options.times], only_said=options.list)])


def work(chosen: list[Run], root: Path, name: str, *, only_said: bool) -> Path:
    """The CSV `name` of this machine, to which the rows of `chosen` were added."""
    path = ROOT / csv_of(name, processor())
    fill(path, chosen, root, only_said=only_said)
    return path


if __name__ == "__main__":
    sys.exit(main())
