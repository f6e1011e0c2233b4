"""Bad inputs and kills by the thousand: nothing hangs, nothing crashes, nothing beside the output is touched, no half-made output stays.

python benchmarks/hostile.py --inputs 2000 --kills 100 [--seed 1] [--jobs 2] [--publish] [--faults FILE]
python benchmarks/hostile.py --kills 100 --without-pairs [--publish]
python benchmarks/hostile.py --seed 1 --only 1234 --keep FOLDER

Every case is the real command line in a process of its own, forked from one that has imported everything. A bad input follows from the seed
and its number alone, so `--only` runs one again and `--keep` leaves its folder. `--without-pairs` kills what makes a small tower of images
without pairs: embed, select-sentences and distill. `--publish` writes `results/hostile_inputs_<processor>.csv`
and `results/hostile_kills_<processor>.csv`, a row a kind and a row a command. Exit code 1 if there is a fault. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from attack import of_commands, of_data, of_models  # noqa: F401 - each adds its kinds
from attack.case import KINDS, Case
from attack.damage import Draw
from attack.judge import KINDS as FAULTS
from attack.judge import Fault, judged
from attack.kills import COMMANDS, WITHOUT_PAIRS, Job, Killed, Reference, campaign, reference
from attack.process import Ended, Place, Running, preload, seen
from attack.stock import Stock
from published import ROOT, as_csv, code, csv_of

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.runtime.hardware import processor

Report = Callable[[dict[str, Any]], None]
UNPREPARED = "not prepared"
HEAVY = ("export onnx --int8",)


@dataclass
class Tally:
    """What became of the cases of one kind."""

    cases: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    megabytes: float = 0.0


def together(jobs: Iterable[Job], at_once: int) -> None:
    """Let jobs go on side by side; each waits for one command at a time."""
    waiting, busy = iter(jobs), []
    while True:
        while len(busy) < at_once and (job := next(waiting, None)) is not None:
            _advance(job, None, busy)
        if not busy:
            return
        for job, running in list(busy):
            if (ended := running.poll()) is not None:
                busy.remove((job, running))
                _advance(job, ended, busy)
        time.sleep(0.005)


def _advance(job: Job, ended: Ended | None, busy: list[Any]) -> None:
    try:
        busy.append((job, job.send(ended)))  # type: ignore[arg-type]
    except StopIteration:
        pass


def one_input(seed: int, number: int, stock: Stock, root: Path, tallies: dict[str, Tally], report: Report, keep: bool) -> Job:
    """Prepare the case `number`, run it and judge."""
    names = list(KINDS)
    name = names[number % len(names)]
    place = Place(root / f"{number:05}")
    try:
        case = KINDS[name](Draw(f"{seed}/{number}"), stock, place)
        before = seen(place.work)
    except Exception as error:  # noqa: BLE001  a fault of this script, which is to be mended there; the other cases go on
        tallies[name].faults[UNPREPARED] += 1
        report({"number": number, "kind": name, "fault": UNPREPARED, "detail": repr(error)[:300], "what": ""})
        return
    ended = yield Running([word.replace("\0", "") for word in case.argv], place)
    faults = judged(ended, place, before, case.out, case.mutable, [*case.argv, case.printed])
    tally = tallies[name]
    tally.cases += 1
    tally.ends[ended.code] += 1
    tally.seconds, tally.megabytes = max(tally.seconds, ended.seconds), max(tally.megabytes, ended.megabytes)
    if faults:
        tally.faults[faults[0].kind] += 1
        report(told(number, name, case, ended, faults))
    if not keep:
        remove(place.root)


def told(number: int, name: str, case: Case, ended: Ended, faults: list[Fault]) -> dict[str, Any]:
    return {
        "number": number,
        "kind": name,
        "fault": faults[0].kind,
        "detail": "; ".join(fault.detail for fault in faults)[:600],
        "what": case.what,
        "argv": [word[:200] for word in case.argv],
        "code": ended.code,
        "seconds": round(ended.seconds, 1),
        "megabytes": round(ended.megabytes),
    }


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+rwX", str(folder)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def bad_inputs(numbers: Sequence[int], seed: int, stock: Stock, root: Path, jobs: int, report: Report, keep: bool) -> dict[str, Tally]:
    """Run the cases, `jobs` at a time."""
    tallies: dict[str, Tally] = {name: Tally() for name in KINDS}
    together((one_input(seed, number, stock, root, tallies, report, keep) for number in numbers), jobs)
    return tallies


def kills(wanted: int, seed: int, stock: Stock, root: Path, jobs: int, commands: Sequence[str]) -> dict[str, Killed]:
    """Kill every command about equally often, the slow ones seldom."""
    often = [name for name in commands if name not in HEAVY] or list(commands)
    shares = Counter(often[number % len(often)] for number in range(wanted))
    if wanted >= 50:
        shares += Counter(name for name in commands if name in HEAVY for _ in range(2))
    references: dict[str, Reference] = {}
    together((reference(name, stock, root, references) for name in shares), jobs)
    found = {name: Killed() for name in shares}
    together((campaign(name, Draw(f"{seed}/{name}"), shares[name], stock, root, references, found[name]) for name in shares), jobs)
    return found


def rows_of_inputs(tallies: dict[str, Tally], seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, tally in tallies.items():
        if not tally.cases:
            continue
        faults, ends = sum(tally.faults.values()), tally.ends
        refused = ends[2] + ends[3] + ends[4]
        said = {"refused": refused, "accepted": ends[0], "interrupted": ends[75], "faults": faults}
        most = {"max_seconds": tally.seconds, "max_megabytes": tally.megabytes}
        rows.append(
            {"kind": name, "inputs": tally.cases, **said, **{kind.replace(" ", "_"): tally.faults[kind] for kind in FAULTS}, **most}
        )
    return [{**row, **about(seed)} for row in rows]


def rows_of_kills(found: dict[str, Killed], seed: int) -> list[dict[str, Any]]:
    return [
        {
            "command": name,
            "kills": one.kills,
            "kills_at_file_events": one.at_events,
            "runs": one.runs,
            "files_compared": one.compared,
            "faults": len(one.faults),
            **about(seed),
        }
        for name, one in found.items()
    ]


def about(seed: int) -> dict[str, Any]:
    user = "root" if os.geteuid() == 0 else "ordinary"
    return {"seed": seed, "user": user, "commit": code(), "date": time.strftime("%Y-%m-%d", time.gmtime())}


def publish(name: str, records: list[dict[str, Any]]) -> None:
    path = ROOT / csv_of(name, processor())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_csv(records))
    print(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=0, help="how many bad inputs")
    parser.add_argument("--kills", type=int, default=0, help="how many kills")
    parser.add_argument("--first", type=int, default=0, help="number of the first bad input")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only bad inputs of this kind")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="kill only this command")
    parser.add_argument("--without-pairs", action="store_true", help="kill only embed, select-sentences and distill for task embedding")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="run this bad input alone")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--stock", type=Path, help="where sound inputs are made, or lie already")
    parser.add_argument("--faults", type=Path, help="add a JSON line a fault to this file")
    parser.add_argument("--publish", action="store_true", help="write the CSV files")
    options = parser.parse_args(argv)
    root = (options.keep or Path(tempfile.mkdtemp(prefix="hostile-"))).resolve()
    began = time.monotonic()
    preload()
    stock, names = Stock((options.stock or root / "stock").resolve()), list(KINDS)
    numbers = range(options.first, options.first + options.inputs) if options.only is None else [options.only]
    numbers = [number for number in numbers if not options.kind or names[number % len(names)] in options.kind]

    def report(fault: dict[str, Any]) -> None:
        print(f"FAULT {fault['number']} {fault['kind']} [{fault['fault']}] {fault['what']}: {fault['detail']}"[:700], flush=True)
        if options.faults:
            with options.faults.open("a") as file:
                file.write(json.dumps(fault) + "\n")

    try:
        tallies = bad_inputs(numbers, options.seed, stock, root, options.jobs, report, options.keep is not None)
        commands = options.command or (list(WITHOUT_PAIRS) if options.without_pairs else list(COMMANDS))
        killed = kills(options.kills, options.seed, stock, root / "kills", options.jobs, commands)
    finally:
        if not options.keep:
            remove(root)
    faults = conclude(tallies, killed)
    print(f"{time.monotonic() - began:.0f} s")
    for name, rows in (("inputs", rows_of_inputs(tallies, options.seed)), ("kills", rows_of_kills(killed, options.seed))):
        if options.publish and rows:
            publish(f"hostile_{name}{'_without_pairs' * (options.without_pairs and name == 'kills')}", rows)
    return int(bool(faults))


def conclude(tallies: dict[str, Tally], killed: dict[str, Killed]) -> int:
    """Print what was found; how many faults."""
    for name, tally in tallies.items():
        ends = ", ".join(f"{count} exit {code}" for code, count in sorted(tally.ends.items()))
        faults, most = sum(tally.faults.values()), f"at most {tally.seconds:.0f} s and {tally.megabytes:.0f} MB"
        if tally.cases:
            print(f"{name}: {tally.cases} ({ends}), {faults} faults, {most}")
    for name, one in killed.items():
        print(f"{name}: {one.kills} kills in {one.runs} runs, {len(one.faults)} faults", *one.faults, sep="\n    FAULT ")
    kinds = sum((tally.faults for tally in tallies.values()), Counter())
    of_kills = sum(len(one.faults) for one in killed.values())
    print(f"{sum(tally.cases for tally in tallies.values())} bad inputs, {sum(kinds.values())} faults {dict(kinds)}")
    print(f"{sum(one.kills for one in killed.values())} kills, {of_kills} faults")
    return sum(kinds.values()) + of_kills


if __name__ == "__main__":
    sys.exit(main())
