"""Is a latency budget kept? A table of X-VLM-base is measured, networks are cut to it, and each is timed beside what was asked.

python benchmarks/latency_budget.py [--work runs/latency-budget] [--targets 0.8 0.6 sparsity=0.5] [--threads 1] [--cpu-clock]

Weights are random: shapes are what is timed. A target is the part of the whole request that is asked for (by `prune --to`), or a sparsity;
units go by magnitude. Whole and cut networks take turns, the order rotating; medians of the rounds are compared with what was asked, and
with what the table says of the cut. On a machine that does other things at the same time, `--cpu-clock` has table and requests count the
seconds of the processor in place of those of the wall, which with one thread is the same on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from published import ROOT, append, code, csv_of

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import fingerprint, require_complete
from efficientvlm.checkpoints.manifest import MANIFEST, now
from efficientvlm.compression.latency import LatencyTable
from efficientvlm.control import Control
from efficientvlm.loaded import load
from efficientvlm.runtime.hardware import machine_of
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.script import run_script
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.stages import Bench
from efficientvlm.stages import bench, budgeting, latency, tabling
from efficientvlm.stages.run import module_of

ANSWERS = ["yes", "no", "black", "gray", "red", "green", "blue", "yellow", "teal", "brown", "circle", "rectangle", "triangle"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 30522  # BERT's
SHAPES = {"image_size": 224, "settings": {"decoder_layers": 6, "heads": [], "answers": ANSWERS}}
ROUND_TO = 16
CUT = {"task": "none", "method": "magnitude", "budget": "latency", "round_to": ROUND_TO}
TARGETS = ("0.8", "0.6", "sparsity=0.5")
BATCH, TEXT_LENGTH, WARMUP = 8, 12, 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """How it is measured: `rounds` of the comparison, `table_rounds` of the table, by which clock."""

    rounds: int = 7
    table_rounds: int = 7
    threads: int = 1
    cpu_clock: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_clock else time.perf_counter

    def folder(self, work: Path, size: str) -> Path:
        """Where network, table and cuts lie: what is measured in another way is not theirs."""
        return work / f"{size}-{self.threads}-threads-{self.table_rounds}-rounds-{'processor' if self.cpu_clock else 'wall'}"


def make(work: Path, size: str) -> Path:
    """The whole network in `work`, with random weights."""
    vocabulary = work / "bert" / "vocab.txt"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *ANSWERS]
    write_atomic(vocabulary, "".join(f"{word}\n" for word in [*words, *map("unused{}".format, range(VOCABULARY - len(words)))]).encode())
    stage("init", work / "whole", size=size, tokenizer=str(vocabulary.parent), **SHAPES)
    return work / "whole"


def stage(name: str, out: Path, **settings: Any) -> None:
    if not (out / MANIFEST).is_file():
        module_of(name).run(stage_settings(name, {"out": str(out), **settings}), Control())


def call_of(loaded: Any) -> Callable[[int], object]:
    """The request that evlm bench times of a checkpoint."""
    config = Bench(models=[str(loaded.path)], batch_sizes=[BATCH], text_length=TEXT_LENGTH)
    return bench.calls_of({"": loaded}, bench.timed_of([loaded]), config, CPU, quiet=True)[""]


def table_of(folder: Path, way: Way) -> LatencyTable:
    """As evlm bench --table measures it, by the clock of `way`."""
    loaded = load(str(folder))
    task = bench.timed_of([loaded])
    with Bar("latency table", tabling.ROUND * (way.table_rounds + WARMUP)) as bar:
        return tabling.measure(
            loaded,
            call_of,
            BATCH,
            rounds=way.table_rounds,
            warmup_rounds=WARMUP,
            round_to=ROUND_TO,
            clock=way.clock,
            progress=bar.update,
            timed=task.timed_as if task else bench.FORWARD,
            model=fingerprint(folder),
            machine={**machine_of(CPU), "threads": way.threads},
            precision="fp32",
            text_length=TEXT_LENGTH,
            image_size=loaded.sizes.image_size,
        )


def asked(target: str, table: LatencyTable) -> dict[str, Any]:
    """Settings of prune for a target."""
    name, _, value = target.rpartition("=")
    return {name: float(value)} if name else {"to": f"{float(value) * table.whole_ms:.3f}ms"}


def timed(folders: dict[str, Path], way: Way) -> dict[str, list[float]]:
    """Milliseconds by network, one a round."""
    calls = {name: call_of(load(str(folder))) for name, folder in folders.items()}
    names, clock = list(calls), way.clock
    found: dict[str, list[float]] = {name: [] for name in names}
    with Bar("requests", way.rounds + WARMUP) as bar, torch.inference_mode(), latency.no_garbage_collection():
        for number in range(-WARMUP, way.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = clock()
                calls[name](BATCH)
                if number >= 0:
                    found[name].append(1e3 * (clock() - began))
            bar.update(number + WARMUP + 1)
    return found


def run(work: Path, targets: Sequence[str], size: str, way: Way, root: Path = ROOT) -> list[Path]:
    """Measure, cut, measure; the file with a row a target below `root`."""
    work = way.folder(work, size)
    with latency.threads(way.threads):
        whole = make(work, size)
        file = work / "table.json"
        if not file.is_file():
            write_atomic(file, budgeting.as_json(table_of(whole, way)))
        table = budgeting.read_table(file)
        folders = {"whole": whole}
        for target in targets:
            folders[target] = work / f"cut-{target.replace('=', '-')}"
            stage("prune", folders[target], model=str(whole), table=str(file), **CUT, **asked(target, table))
        found = timed(folders, way)
    machine = machine_of(CPU)
    path = root / csv_of("budget_latency", machine["name"])
    for name, folder in folders.items():
        manifest = require_complete(folder)
        cost, of_the_budget = manifest.extra.get("cost", {}), manifest.extra.get("budget", {}).get("all", {})
        by_table = cost["after"] / 1e6 if cost else table.whole_ms
        wanted = cost["to"] / 1e6 if cost.get("to") else by_table
        record = {
            "target": name,
            "size": size,
            "asked_ms": wanted,
            "table_ms": by_table,
            "median_ms": median(found[name]),
            "measured_over_asked": median(found[name]) / wanted,
            "rest_ms": table.rest_ms,
            "sparsity_of_ms": of_the_budget.get("achieved", 0.0),
            "parameters": manifest.accounting["parameters"]["total"],
            "macs": manifest.accounting["macs"]["total"],
            "batch": BATCH,
            "text_length": TEXT_LENGTH,
            "image_size": table.image_size,
            "rounds": way.rounds,
            "table_rounds": table.rounds,
            "clock": "processor" if way.cpu_clock else "wall",
            "threads": way.threads,
            "processor": machine["name"],
            "torch": machine["torch"],
            "commit": code(),
            "date": now()[:10],
        }
        append(path, record)
        say(f"{name}: {wanted:.1f} ms asked, {by_table:.1f} by the table, {record['median_ms']:.1f} measured")
    return [path]


def main() -> int:
    parser = argparse.ArgumentParser(description="Milliseconds asked for and measured, of X-VLM-base by a latency budget.")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/latency-budget",
        help="folder of checkpoints and table, 4 GB a way",
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="parts of the whole request, or sparsity=0.5")
    parser.add_argument("--size", default="base", help="tiny, small or base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="of the comparison")
    parser.add_argument("--table-rounds", type=int, default=7, help="of the table")
    parser.add_argument("--cpu-clock", action="store_true", help="count seconds of the processor, with one thread")
    options = parser.parse_args()
    way = Way(options.rounds, options.table_rounds, options.threads, options.cpu_clock)
    return run_script(lambda: run(options.work, options.targets, options.size, way))


if __name__ == "__main__":
    sys.exit(main())
