"""Does a smaller X-VLM-base run as much faster as its multiply-adds promise? Three models in five forms take turns in one process.

python benchmarks/latency.py [--work runs/latency] [--prepare]

Teacher, student (half of every tower) and the student without 40 % of its prunable weights have random weights: their shapes are what is
timed. `--prepare` makes them and their ONNX graphs, and times nothing; what is there already is used. A call goes from image and question
tensors to the answer ranked first. In a round every variant runs once, in shuffled order; speed-ups are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from published import ROOT, as_csv, code, csv_of, published_rows, with_block

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import MANIFEST, now, peak_memory_bytes
from efficientvlm.control import Control
from efficientvlm.families.towers import attention
from efficientvlm.loaded import Loaded, load
from efficientvlm.runtime.hardware import machine_of
from efficientvlm.runtime.progress import Bar
from efficientvlm.script import run_script
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.stages import Bench
from efficientvlm.stages import latency
from efficientvlm.stages.run import module_of
from efficientvlm.tasks.vqa import VQA

PAGE = "docs/export.md"
MODELS = ("teacher", "student", "sliced")
FORMS = {
    "torch eager fp32": ("torch", "fp32"),
    "torch sdpa fp32": ("torch", "fp32"),
    "torch sdpa bf16": ("torch", "bf16"),
    "onnx fp32": ("onnx", "fp32"),
    "onnx int8": ("int8", "fp32"),
}
REFERENCE = ("teacher", "torch eager fp32")
ROUNDS = {1: 15, 8: 6}
WARMUP = 1
TEXT_LENGTH = 12
ANSWERS = ["yes", "no", "black", "gray", "red", "green", "blue", "yellow", "teal", "brown", "circle", "rectangle", "triangle"]
VOCABULARY = 30522  # BERT's
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BASE = {"image_size": 384, "settings": {"decoder_layers": 6, "heads": []}}
CUT = {"task": "none", "method": "magnitude", "sparsity": 0.4, "round_to": 16}

Variant = tuple[str, str]


def prepare(work: Path) -> None:
    """The three checkpoints in `work`, each with a folder of fp32 and one of int8 graphs."""
    vocabulary = work / "bert" / "vocab.txt"
    if not vocabulary.is_file():
        vocabulary.parent.mkdir(parents=True, exist_ok=True)
        words = [*SPECIAL, *ANSWERS]
        write_atomic(
            vocabulary, "".join(f"{word}\n" for word in [*words, *map("unused{}".format, range(VOCABULARY - len(words)))]).encode()
        )
    stage("init", work / "teacher", size="base", tokenizer=str(vocabulary.parent), **BASE)
    stage("shrink", work / "student", model=str(work / "teacher"))
    stage("prune", work / "sliced", model=str(work / "student"), **CUT)
    for name in MODELS:
        for form, int8 in (("onnx", False), ("int8", True)):
            stage("export", work / f"{name}-{form}", model=str(work / name), format="onnx", rounds=0, int8=int8)


def stage(name: str, out: Path, **settings: Any) -> None:
    if not is_complete(out):
        module_of(name).run(stage_settings(name, {"out": str(out), **settings}), Control())


def is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def calls(work: Path) -> dict[Variant, Callable[[int], object]]:
    """Variant → function of the batch size, its inputs prepared."""
    made: dict[Variant, Callable[[int], object]] = {}
    opened: dict[Path, Loaded] = {}
    for name in MODELS:
        for form, (kind, precision) in FORMS.items():
            folder = work / (name if kind == "torch" else f"{name}-{kind}")
            if folder not in opened:  # one copy of a checkpoint for all its forms
                opened[folder] = load(str(folder), exported=True)
            config = Bench(models=[str(folder)], batch_sizes=list(ROUNDS), text_length=TEXT_LENGTH, precision=precision)
            loaded = opened[folder]
            loaded.model.config.answers = loaded.model.config.answers or ANSWERS
            call = VQA().timed(loaded, config, torch.device("cpu"), [loaded], quiet=True)
            made[name, form] = eager(call) if "eager" in form else call
    return made


def eager(call: Callable[[int], object]) -> Callable[[int], object]:
    """`call` with the explicit softmax that is used where maps are kept; they are dropped at once."""

    fused = attention.attend

    def attend(q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, maps: Any = None) -> Any:
        return fused(q, k, v, mask, dropout, [])

    def run(size: int) -> object:
        with mock.patch.object(attention, "attend", attend):
            return call(size)

    return run


def measure(made: dict[Variant, Callable[[int], object]], rounds: dict[int, int]) -> dict[int, dict[Variant, list[float]]]:
    """Seconds by batch size and variant, one a round."""
    draw, done = random.Random(0), 0
    seconds: dict[int, dict[Variant, list[float]]] = {size: {variant: [] for variant in made} for size in rounds}
    with Bar("latency", sum(rounds.values()) + WARMUP * len(rounds)) as bar, torch.inference_mode(), latency.no_garbage_collection():
        for size, count in rounds.items():
            for number in range(-WARMUP, count):
                for variant in draw.sample(list(made), len(made)):
                    began = time.perf_counter()
                    made[variant](size)
                    if number >= 0:
                        seconds[size][variant].append(time.perf_counter() - began)
                bar.update(done := done + 1)
    return seconds


def rows(work: Path, seconds: dict[int, dict[Variant, list[float]]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a batch size and variant."""
    costs = {name: require_complete(work / name).accounting for name in MODELS}
    macs = {name: cost["macs"]["total"] for name, cost in costs.items()}
    records = []
    for size, by_variant in seconds.items():
        for (name, form), own in by_variant.items():
            record: dict[str, Any] = {
                "model": name,
                "form": form,
                "batch": size,
                "parameters": costs[name]["parameters"]["total"],
                "macs": macs[name],
                "median_ms": 1e3 * statistics.median(own),
                "q1_ms": 1e3 * float(np.percentile(own, 25)),
                "q3_ms": 1e3 * float(np.percentile(own, 75)),
                "samples_per_s": size / statistics.median(own),
            }
            low, middle, high = np.percentile(np.array(by_variant[REFERENCE]) / np.array(own), [25, 50, 75])
            record |= {"speedup": float(middle), "speedup_q1": float(low), "speedup_q3": float(high)}
            for other in MODELS[:2]:  # the same form of a larger model
                ratio = float(np.median(np.array(by_variant[other, form]) / np.array(own)))
                promised = macs[other] / macs[name]
                record |= {f"over_{other}": ratio, f"macs_over_{other}": promised, f"over_{other}_of_macs": ratio / promised}
            records.append({**record, "rounds": len(own), **about})
    return records


def publish(root: Path = ROOT) -> list[Path]:
    """Write the blocks of the page and the README below `root` from the CSV there; the files written.

    Raises:
        BadInput: no CSV or more than one, or a page without the two markers.
    """
    records, name = published_rows(root, "latency")
    blocks = {PAGE: table(records, name), "README.md": summary(records, name)}
    pages = {root / page: with_block((root / page).read_text("utf-8"), "latency", text) for page, text in blocks.items()}
    for path, text in pages.items():
        write_atomic(path, text.encode())
    return list(pages)


def summary(records: list[dict[str, str]], name: Path) -> str:
    """The block of the README: what the largest batch gains, in words."""
    batch = max(int(record["batch"]) for record in records)
    by_name = {(record["model"], record["form"]): record for record in records if int(record["batch"]) == batch}
    teacher, same, int8 = (by_name[variant] for variant in (REFERENCE, ("sliced", "torch sdpa fp32"), ("sliced", "onnx int8")))
    before, after = (f"{int(record['parameters']) / 1e6:.0f} M" for record in (teacher, same))
    gained, promised = (f"{float(same[column]):.2f}" for column in ("over_teacher", "macs_over_teacher"))
    source = f"Random weights, {same['processor']}: [{name.name}]({name.as_posix()}), [all forms](docs/export.md)."
    return "\n".join(
        [
            f"X-VLM-base at {same['image_size']} pixels, {before} parameters with its answer decoder, becomes a student of {after}.",
            f"At a batch of {batch} on {same['threads']} cores it answers {gained} times as fast as the teacher in the same form, where",
            f"the multiply-adds promise {promised}, and in int8 {float(int8['speedup']):.1f} times as fast as the teacher with plain",
            f"attention in fp32. {source}",
        ]
    )


def table(records: list[dict[str, str]], name: Path) -> str:
    """The largest batch as a table in Markdown: milliseconds, speed-up over the reference, part of what the multiply-adds promise."""
    size = max(int(record["batch"]) for record in records)
    timed = {(record["model"], record["form"]): record for record in records if int(record["batch"]) == size}
    lines = [f"| batch of {size} | parameters | multiply-adds | {' | '.join(FORMS)} |", f"| {' | '.join(['---'] * (3 + len(FORMS)))} |"]
    for model in MODELS:
        own = timed[model, REFERENCE[1]]
        part = {form: "" if model == "teacher" else f" ({float(timed[model, form]['over_teacher_of_macs']):.0%})" for form in FORMS}
        cells = [
            f"{float(timed[model, form]['median_ms']):.0f} ms, {float(timed[model, form]['speedup']):.1f}×{part[form]}" for form in FORMS
        ]
        lines.append(f"| {model} | {int(own['parameters']) / 1e6:.0f} M | {int(own['macs']) / 1e9:.1f} G | {' | '.join(cells)} |")
    where = f"{own['processor']}, {own['threads']} threads, torch {own['torch']}, ONNX Runtime {own['onnxruntime']}, on {own['date']}"
    return "\n".join([*lines, "", f"Measured on {where}. The same figures, and those of one image: [{name.name}](../{name.as_posix()})."])


def surroundings(threads: int) -> dict[str, Any]:
    """What the figures hold for."""
    import onnxruntime

    machine = machine_of(torch.device("cpu"))
    return {
        "image_size": BASE["image_size"],
        "text_length": TEXT_LENGTH,
        "answers": len(ANSWERS),
        "processor": machine["name"],
        "cpus": machine["cpus"],
        "threads": threads,
        "peak_memory_gib": peak_memory_bytes() / 2**30,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "commit": code(),
        "date": now()[:10],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of X-VLM-base, its student and the pruned student, in five forms.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/latency", help="folder of the checkpoints and graphs, 6 GB")
    parser.add_argument("--prepare", action="store_true", help="make the checkpoints and graphs only")
    options = parser.parse_args()
    return run_script(lambda: run(options.work, timed=not options.prepare))


def run(work: Path, timed: bool) -> list[Path]:
    """Make the models in `work` and, if `timed`, measure and publish; the files written."""
    prepare(work)
    if not timed:
        return [work]
    with latency.threads(None) as threads:
        seconds = measure(calls(work), ROUNDS)
    about = surroundings(threads)
    name = ROOT / csv_of("latency", about["processor"])
    name.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(name, as_csv(rows(work, seconds, about)))
    return [name, *publish()]


if __name__ == "__main__":
    sys.exit(main())
