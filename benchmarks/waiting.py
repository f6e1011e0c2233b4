"""How two threads of a training run should wait for one another: by spinning, as OpenMP does by itself, or asleep.

python benchmarks/waiting.py [--rounds 2] [--steps 40]

The same few training steps on two processors, alone and beside two processes that are always busy. The load of the machine before every run
is part of the CSV: above 0 where it should be alone, something else was at work. Rows of the same processor are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median

from published import ROOT, as_csv, csv_of

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.runtime.hardware import processor
from efficientvlm.runtime.waiting import VARIABLES

WAITING = {
    "spinning, as OpenMP does by itself": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "as evlm chooses": {},
}
BATCH = 16


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps_per_s(variables: dict[str, str], steps: int) -> float:
    """Median over the metrics lines of a short run, without the first two."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "2"} | variables
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--model",
            "bundled:easy-vqa-pretrained",
            "--data",
            "shapes:difficulty=2,size=400",
            "--out",
            f"{folder}/out",
            "--device",
            "cpu",
        ]
        words += ["--max-steps", str(steps), "--batch-size", str(BATCH), "--set", "log_every=4", "--set", "eval_limit=0", "-q"]
        subprocess.run(
            [sys.executable, "-P", "-m", "efficientvlm.cli.main", "finetune", *words],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]
    return median(line["samples_per_s"] / BATCH for line in lines[2:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--csv", type=Path, help="by default in benchmarks/results")
    given = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # and with it all that is started here
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(given.rounds):
        for others in (0, 2):
            for name, variables in WAITING.items():
                load = os.getloadavg()[0]
                with busy(others):
                    found[name, others].append((steps_per_s(variables, given.steps), load))
                print(f"{name}, {others} busy: {found[name, others][-1][0]:.2f} steps/s, load {load:.1f}", file=sys.stderr, flush=True)
    rows = [
        {
            "waiting": name,
            "busy_processes": others,
            "steps_per_s": median(speed for speed, _ in runs),
            "rounds": len(runs),
            "load_before": max(load for _, load in runs),
            "threads": 2,
            "batch": BATCH,
            "torch": version("torch"),
            "processor": processor(),
            "date": time.strftime("%Y-%m-%d"),
        }
        for (name, others), runs in found.items()
    ]
    write_atomic(given.csv or ROOT / csv_of("waiting", processor()), as_csv(rows))


if __name__ == "__main__":
    main()
