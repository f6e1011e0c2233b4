"""Does a public file with a Swin tower go all the way at full size, and runs its pruned form as much faster as its multiply-adds promise?

python benchmarks/swin.py --keys keys.json [--work runs/swin] [--tower swin] [--prepare | --publish]

A file of X-VLM-base is made with random values under the names and shapes in `--keys` ({"layout": {name: [dtype, shape]}}), imported at 384
pixels, given an answer decoder, shrunk to half of every tower, pruned for two steps beside its teacher, sliced and exported to ONNX with
int8 weights, each by a command of its own whose peak memory and processor time are written down. The same is done with a CLIP ViT of random
weights. Then teacher, student and sliced student of both take turns. Other work on the machine slows the clock on the wall more than the
processor time of a single thread, so speed-ups are medians of ratios of processor time within a round. What is there is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from latency import ANSWERS, SPECIAL, TEXT_LENGTH, VOCABULARY
from peaks import MIB, planned
from peaks import run as evlm
from published import ROOT, as_csv, code, csv_of, published_rows, rows_of, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import MANIFEST, now
from efficientvlm.compression.accounting import account
from efficientvlm.compression.gates import attach
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script
from efficientvlm.settings.stages import Bench
from efficientvlm.stages import latency
from efficientvlm.tasks.vqa import VQA

PAGE = "docs/own-model.md"
SIDE = 384
TOWERS = ("swin", "vit")
MODELS = ("teacher", "student", "sliced")
FORMS = ("torch fp32", "onnx int8")
OVER = {"torch fp32": "teacher", "onnx int8": "student"}
"""Form → the larger model that the page compares with."""
ROUNDS = {1: 9, 4: 3}
DATA = ("--data", "shapes:size=32", "--set", "eval_limit=0", "--set", "questions_per_image=2")
DECODER = ("--max-steps", "1", "--batch-size", "1", "--set", "freeze=[vision,text,fusion]")
CUT = ("--sparsity", "0.4", "--max-steps", "2", "--batch-size", "2", "--set", "round_to=16", "--set", "keep_dense=false")
GATES = ("--set", "gates={lr: 0.1, multiplier_lr: 0.1, head_init: 2.0}")
TRAINED = ("finetune", "prune")


def commands(tower: str) -> dict[str, list[str]]:
    """Folder → the command that makes it, of the chain of `tower`."""
    base, teacher, student, sliced = (f"{tower}-{name}" for name in ("base", *MODELS))
    start = {
        "swin": ["import", "--model", "swin.th", "--tokenizer", "bert", "--set", f"settings.image_size={SIDE}"],
        "vit": ["init", "--size", "base", "--tokenizer", "bert", "--image-size", str(SIDE)],
    }
    made = {
        base: start[tower],
        teacher: ["finetune", "--model", base, *DATA, *DECODER],
        student: ["shrink", "--model", teacher],
        sliced: ["prune", "--model", student, "--teacher", teacher, *DATA, *CUT, *GATES],
    }
    return made | {f"{tower}-{name}-int8": ["export", "--model", f"{tower}-{name}", *EXPORT] for name in MODELS[1:]}


EXPORT = ("--format", "onnx", "--set", "int8=true", "--set", "rounds=0")


def prepare(work: Path, keys: Path | None, towers: Sequence[str], stages: Path) -> None:
    """Make what is missing in `work`; a row of the CSV `stages` a command."""
    vocabulary = work / "bert" / "vocab.txt"
    if not vocabulary.is_file():
        vocabulary.parent.mkdir(parents=True, exist_ok=True)
        words = [*SPECIAL, *ANSWERS]
        words += [f"unused{number}" for number in range(VOCABULARY - len(words))]
        write_atomic(vocabulary, "".join(f"{word}\n" for word in words).encode())
    for tower in towers:
        for out, command in commands(tower).items():
            if (work / out / MANIFEST).is_file():
                continue
            if command[0] == "import" and not (work / "swin.th").is_file():
                if keys is None:
                    raise BadInput("there are no names and shapes", "a public file is made of them", "give --keys keys.json")
                write_file(keys, work / "swin.th")
            record(stages, out, [*command, "--out", out], work)
            (work / "swin.th").unlink(missing_ok=True)


def write_file(keys: Path, target: Path) -> None:
    """A file as X-VLM publishes its weights, of random values; norms scale by about one, and what is tied is equal."""
    entries: dict[str, tuple[str, list[int]]] = json.loads(keys.read_text("utf-8"))["layout"]
    draw = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, (kind, shape) in entries.items():
        if kind == "int64":
            state[name] = torch.zeros(shape, dtype=torch.long)
        elif name == "temp":
            state[name] = torch.tensor(0.07)
        else:
            scale = name.endswith("weight") and len(shape) == 1
            state[name] = torch.randn(shape, generator=draw) * 0.02 + scale
    head = "text_encoder.cls.predictions"
    state[f"{head}.decoder.weight"] = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    torch.save({"model": state, "config": {"image_res": 224}}, target)  # noqa: TID251  as the published code writes it


def record(stages: Path, out: str, command: list[str], work: Path) -> None:
    """Run a command, and put what it took into the CSV `stages`."""
    print(f"{out}: evlm {' '.join(command)}", flush=True)
    stated = planned(*command, folder=work)["total"] / MIB if command[0] in TRAINED else None
    peak, seconds = evlm(*command, folder=work)
    made = work / out / MANIFEST
    costs = require_complete(work / out).accounting if made.is_file() else {}
    row = {
        "made": out,
        "command": " ".join(command),
        "parameters": costs.get("parameters", {}).get("total"),
        "macs": costs.get("macs", {}).get("total"),
        "planned_mib": stated,
        "peak_mib": peak,
        "cpu_seconds": seconds,
        **dict.fromkeys(("sliced_off", "reloaded_off", "padded_off")),
        **(agreement(work / out, work / "again") if out.endswith("-student") else {}),
        "processor": processor(),
        "commit": code(),
        "date": now()[:10],
    }
    rows = [old for old in rows_of(stages) if old["made"] != out]
    write_atomic(stages, as_csv([*rows, row]))


def agreement(folder: Path, again: Path) -> dict[str, float]:
    """How far a network without a third of its units, drawn at random, differs from the same under gates: sliced, reloaded and zero-padded.

    The largest difference of its logits, relative to the largest logit.
    """
    loaded = load(str(folder))
    model, units = loaded.model, loaded.model.units()
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) > 1 / 3
    batch = model.example(1, TEXT_LENGTH)
    batch["pixels"] = torch.randint(256, batch["pixels"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode():
        with attach(model, units) as hooks:
            hooks.set(keep.float())
            masked = model.run(batch)["logits"]
        sliced = slice_model(model, keep).eval()
        loaded.family.save(sliced, again)
        found = {}
        for form, network in {"sliced": sliced, "reloaded": loaded.family.load(again), "padded": pad_model(sliced).eval()}.items():
            found[f"{form}_off"] = float((masked - network.run(batch)["logits"]).abs().max() / masked.abs().max())
    return found


def calls(work: Path, tower: str) -> tuple[dict[str, Callable[[int], object]], dict[str, dict[str, Any]]]:
    """Model and form → a function of the batch size, its inputs prepared; and model → its accounting."""
    made: dict[str, Callable[[int], object]] = {}
    costs = {}
    for name in MODELS:
        whole = load(str(work / f"{tower}-{name}"))
        costs[name] = account(whole.model, text_length=TEXT_LENGTH)
        made[f"{name}, {FORMS[0]}"] = call(whole)
        if (work / f"{tower}-{name}-int8" / MANIFEST).is_file():
            made[f"{name}, {FORMS[1]}"] = call(load(str(work / f"{tower}-{name}-int8"), exported=True))
    return made, costs


def call(loaded: Loaded) -> Callable[[int], object]:
    loaded.model.config.answers = ANSWERS
    config = Bench(models=[str(loaded.path)], batch_sizes=list(ROUNDS), text_length=TEXT_LENGTH)
    return VQA().timed(loaded, config, torch.device("cpu"), [loaded], quiet=True)


def measure(work: Path, tower: str, path: Path) -> None:
    """Rows of the CSV for `tower`, a batch size at a time; those that are there stay."""
    there = rows_of(path)
    sizes = [size for size in ROUNDS if not any(row["tower"] == tower and int(row["batch"]) == size for row in there)]
    if not sizes:
        return
    made, costs = calls(work, tower)
    for size in sizes:
        seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in made}
        with torch.inference_mode(), latency.no_garbage_collection():
            for number in range(-1, ROUNDS[size]):
                order = sorted(made) if number % 2 else sorted(made, reverse=True)
                for label in order:
                    began = time.process_time(), time.perf_counter()
                    made[label](size)
                    if number >= 0:
                        seconds[label].append((time.process_time() - began[0], time.perf_counter() - began[1]))
        there += records(tower, size, seconds, costs)
        write_atomic(path, as_csv([{**row} for row in there]))


def records(tower: str, size: int, seconds: dict[str, list[tuple[float, float]]], costs: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model and form: medians, and what was gained over the larger models beside what their multiply-adds promise."""
    found = []
    macs = {name: cost["macs"]["total"] for name, cost in costs.items()}
    for label, own in seconds.items():
        name, form = label.split(", ")
        row: dict[str, Any] = {
            "tower": tower,
            "model": name,
            "form": form,
            "batch": size,
            "parameters": costs[name]["parameters"]["total"],
            "macs": macs[name],
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in own),
            "wall_ms": 1e3 * statistics.median(wall for _, wall in own),
        }
        for other in MODELS[:2]:
            if f"{other}, {form}" not in seconds:
                row |= dict.fromkeys((f"over_{other}", f"macs_over_{other}", f"over_{other}_of_macs"))
                continue
            ratios = [theirs / ours for (theirs, _), (ours, _) in zip(seconds[f"{other}, {form}"], own, strict=True)]
            promised = macs[other] / macs[name]
            gained = statistics.median(ratios)
            row |= {f"over_{other}": gained, f"macs_over_{other}": promised, f"over_{other}_of_macs": gained / promised}
        about = {"image_size": SIDE, "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "processor": processor()}
        found.append({**row, "rounds": len(own), **about, "torch": torch.__version__, "commit": code(), "date": now()[:10]})
    return found


def publish(root: Path = ROOT) -> list[Path]:
    """Write the block of the page below `root` from the CSV there; the files written.

    Raises:
        BadInput: no CSV or more than one, or a page without the two markers.
    """
    page, text = root / PAGE, table(*published_rows(root, "swin"))
    write_atomic(page, with_block(page.read_text("utf-8"), "swin", text).encode())
    return [page]


def table(rows: Sequence[dict[str, str]], name: Path) -> str:
    """The largest batch as a table in Markdown."""
    size = max(int(row["batch"]) for row in rows)
    lines = [f"| batch of {size} | parameters | multiply-adds | {' | '.join(FORMS)} |", f"| {' | '.join(['---'] * (3 + len(FORMS)))} |"]
    for tower in TOWERS:
        for model in MODELS:
            own = {row["form"]: row for row in rows if (row["tower"], row["model"], row["batch"]) == (tower, model, str(size))}
            if not own:
                continue
            cells = [cell(own[form], model, OVER[form]) if form in own else "" for form in FORMS]
            first = own[FORMS[0]]
            size_of = f"{int(first['parameters']) / 1e6:.0f} M | {int(first['macs']) / 1e9:.1f} G"
            lines.append(f"| {'Swin' if tower == 'swin' else 'CLIP ViT'}, {model} | {size_of} | {' | '.join(cells)} |")
    last = rows[-1]
    where = f"{last['processor']}, one thread, torch {last['torch']}, on {last['date']}"
    said = f"Processor time on {where}. Beside it the speed over the teacher (int8: the student) in the same form, and in brackets"
    said += " the part of what the multiply-adds promise."
    return "\n".join([*lines, "", f"{said} All figures: [{name.name}](../{name.as_posix()})."])


def cell(row: dict[str, str], model: str, reference: str) -> str:
    """Milliseconds, and how many times as fast as `reference`, which is larger, in the same form."""
    gained = f", {float(row[f'over_{reference}']):.2f}× ({float(row[f'over_{reference}_of_macs']):.0%})" if model != reference else ""
    return f"{float(row['cpu_ms']):,.0f} ms{gained}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=Path, help="names and shapes of a published file, as JSON")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/swin", help="folder of the checkpoints and graphs, 7 GB")
    parser.add_argument("--prepare", action="store_true", help="make the checkpoints and graphs only")
    parser.add_argument("--tower", action="append", choices=TOWERS, help="only this one; it may be given twice")
    parser.add_argument("--publish", action="store_true", help="write the table of the page from the CSV only")
    options = parser.parse_args()
    return run_script(
        lambda: publish() if options.publish else run(options.work, options.keys, options.tower or TOWERS, timed=not options.prepare)
    )


def run(work: Path, keys: Path | None, towers: Sequence[str], timed: bool) -> list[Path]:
    """Make the models of `towers` in `work` and, if `timed`, measure and publish; the files written."""
    work.mkdir(parents=True, exist_ok=True)
    stages = ROOT / csv_of("swin_stages", processor())
    prepare(work, keys, towers, stages)
    if not timed:
        return [stages]
    path = ROOT / csv_of("swin", processor())
    torch.set_num_threads(1)
    for tower in towers:
        measure(work, tower, path)
    return [stages, path, *publish()]


if __name__ == "__main__":
    sys.exit(main())
