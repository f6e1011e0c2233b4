"""Where the time of a training step goes, before and after a change of the code.

python benchmarks/training_speed.py [--code LABEL=FOLDER ...] [--size NAME] [--stage NAME] [--threads 1]

Every (size, stage) is measured in fresh processes, one for each version of the code, which take turns step by step. A version is a checkout
of this project; by default this one alone, called `after`. Rows of the CSV that are measured again are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from published import ROOT, as_csv, csv_of, rows_of

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.errors import BadInput
from efficientvlm.runtime.hardware import processor

QUICKSTART, WIDE = "quickstart", "width-768"
DISTILL, PRUNE, CACHED = "distill", "prune", "prune, cached teacher"
MATRIX = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "mkldnn_linear")
NORMS = ("softmax", "layer_norm", "norm")
MOVES = ("copy", "cat", "index", "gather", "clone", "scatter", "embedding", "stack", "select_backward", "slice_backward", "fill", "zero")
UPDATE = ("fused_adam", "foreach")
BATCH = {QUICKSTART: 32, WIDE: 4}
ROUNDS = {QUICKSTART: 20, WIDE: 3}
PROFILED = {QUICKSTART: 5, WIDE: 1}
WARMUP = 2  # and as many batches of a cached teacher
SIZES, STAGES = (QUICKSTART, WIDE), (DISTILL, PRUNE, CACHED)
PHASES = ("data_ms", "teacher_ms", "student_forward_ms", "backward_ms", "optimizer_ms", "total_ms")
KINDS = ("matrix", "norm", "elementwise", "moves", "optimizer", "python")


def kind_of(op: str) -> str:
    """The kind of work that a profiled operator does itself."""
    name = op.removeprefix("aten::").lstrip("_")
    if not op.startswith("aten::"):
        return "python"
    if any(part in name for part in UPDATE):
        return "optimizer"
    if name.startswith(MATRIX) or "convolution" in name or "scaled_dot_product" in name:
        return "matrix"
    if any(part in name for part in NORMS):
        return "norm"
    return "moves" if any(part in name for part in MOVES) else "elementwise"


def prepare(size: str, stage: str) -> tuple[Any, Any, Any, Any]:
    """Objective, optimizers, batches by step and configuration of a stage of the quickstart, on random weights of the given size."""
    import torch

    from efficientvlm import recipe
    from efficientvlm.data.kinds.pairs import PAIRS
    from efficientvlm.data.kinds.questions import QUESTIONS
    from efficientvlm.data.opening import open_data
    from efficientvlm.planning.measure import ready
    from efficientvlm.settings.methods import TaskWeights
    from efficientvlm.stages.learning import Learning
    from efficientvlm.tasks.known import learnt_by

    general = stage == DISTILL
    wanted = "distilled" if general else "pruned"
    (step,) = (step for step in recipe.validate(recipe.load_recipe("quickstart"), []) if step.name == wanted)
    changes: dict[str, Any] = {"batch_size": BATCH[size]}
    if stage == CACHED:
        logits = {name: float(name == "logits") for name in TaskWeights.model_fields}
        changes |= {"cache_teacher": True, "augment": "none", "weights": TaskWeights(**logits)}
    changes |= {"limit": 256} if size == WIDE else {}
    config: Any = step.config.model_copy(update=changes)
    student, teacher, new = networks(size, general)
    kind = PAIRS if general else QUESTIONS
    size_of = {"limit": config.limit, "image_size": student.sizes.image_size}
    source = open_data(kind, config.data, "train", val_fraction=config.val_fraction, **size_of)
    return *ready(Learning(config, learnt_by(config), student, teacher, new, {"train": source}), torch.device("cpu")), config


def networks(size: str, general: bool) -> tuple[Any, Any, list[str]]:
    """Student (half the layers), teacher, and the names of the student's new tensors; shapes only."""
    import torch

    from efficientvlm.compression.layers import resolve_layers
    from efficientvlm.loaded import Loaded, load, shapes

    base, tuned = (load(f"bundled:{name}", weights=False) for name in ("easy-vqa-pretrained", "easy-vqa"))
    family, config = base.family, base.model.config
    if size == WIDE:
        config = family.fresh_config("base", {"image_size": 224}, 30522)
    layers = resolve_layers(config, {})
    student = shapes(family, config.with_layers(layers))
    teacher, new = shapes(family, config), []
    if not general:
        with torch.device("meta"):
            teacher = teacher.gain("answer", decoder_init="fusion")[0] if size == WIDE else tuned.model
            student, new = student.gain("answer", teacher)
    ours, theirs = (Loaded(base.path, family, model, base.tokenizer, base.manifest) for model in (student, teacher))
    return ours, theirs, new


class Stepper:
    """Trains a stage step by step, and says how long each phase took."""

    def __init__(self, size: str, stage: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.objective, self.optimizers, self.feed, self.config = prepare(size, stage)
        self.objective.train()
        self.number, self.cycle = 0, WARMUP if stage == CACHED else 1 << 30

    def step(self) -> dict[str, float]:
        """Milliseconds by phase, and the images and texts of the batch."""
        from efficientvlm.runtime.stopwatch import TEACHER
        from efficientvlm.training.loop import update

        number, self.number = self.number % self.cycle, self.number + 1
        marks = [time.perf_counter()]
        (batch,) = self.feed(number)
        marks.append(time.perf_counter())
        TEACHER.take()
        loss = self.objective(batch, number)["loss"]
        marks.append(time.perf_counter())
        teacher = 1e3 * TEACHER.take()
        loss.backward()
        marks.append(time.perf_counter())
        update(self.optimizers, 1e-6, self.config.clip, number)
        marks.append(time.perf_counter())
        data, forward, backward, optimizer = (1e3 * (b - a) for a, b in pairwise(marks))
        texts = len(batch["question_ids" if "question_ids" in batch else "text_ids"])
        phases = (data, teacher, forward - teacher, backward, optimizer, 1e3 * (marks[-1] - marks[0]))
        return {**dict(zip(PHASES, phases, strict=True)), "images": len(batch["pixels"]), "texts": texts}

    def about(self) -> dict[str, str]:
        """What was measured, and on what."""
        import torch

        from efficientvlm.checkpoints.manifest import code

        made = code()
        return {"commit": (made.commit or made.version)[:12] + "+" * bool(made.dirty), "torch": torch.__version__, "processor": processor()}

    def profile(self) -> dict[str, float]:
        """Milliseconds of one step by kind of work; what no operator does itself is Python's, dispatch's and autograd's."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as made:
            began = time.perf_counter()
            self.step()
            whole = 1e3 * (time.perf_counter() - began)
        kinds: dict[str, float] = defaultdict(float)
        for event in made.key_averages():
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3
        kinds["python"] = whole - sum(value for name, value in kinds.items() if name != "python")
        return kinds


def serve(size: str, stage: str, threads: int) -> None:
    """Do what the lines of standard input ask for, an answer a line."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever libraries print is no answer
        stepper = Stepper(size, stage, threads)
        for line in sys.stdin:
            print(json.dumps(getattr(stepper, line.strip())()), file=answers, flush=True)


class Worker:
    """A process that runs the code in folder `code`."""

    def __init__(self, code: Path, size: str, stage: str, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--serve", size, stage, "--threads", str(threads)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BadInput("a measured process has ended", "its error stands above", "measure a checkout whose tests pass")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def compare(codes: dict[str, Path], size: str, stage: str, threads: int) -> dict[str, dict[str, Any]]:
    """What a step takes in each version of the code, in medians; they take turns step by step."""
    with ExitStack() as stack:
        return _compare({label: stack.enter_context(Worker(code, size, stage, threads)) for label, code in codes.items()}, size)


def _compare(workers: dict[str, Worker], size: str) -> dict[str, dict[str, Any]]:
    taken: dict[str, list[dict[str, Any]]] = {label: [] for label in workers}
    for number in range(-WARMUP, ROUNDS[size]):
        for label in sorted(workers, reverse=bool(number % 2)):
            step = workers[label].ask("step")
            if number >= 0:
                taken[label].append(step)
    result: dict[str, dict[str, Any]] = {}
    kinds: dict[str, list[dict[str, float]]] = {label: [] for label in workers}
    for _ in range(PROFILED[size]):
        for label, worker in workers.items():
            kinds[label].append(worker.ask("profile"))
    first = taken[next(iter(workers))]
    for label, worker in workers.items():
        middle = {name: median(step[name] for step in taken[label]) for name in taken[label][0]}
        speedup = median(a["total_ms"] / b["total_ms"] for a, b in zip(first, taken[label], strict=True))
        result[label] = {
            **middle,
            "speedup": speedup,
            "kinds": {kind: median(one.get(kind, 0.0) for one in kinds[label]) for kind in KINDS},
            "about": worker.ask("about"),
        }
    return result


def rows(found: dict[str, dict[str, Any]], size: str, stage: str, threads: int) -> list[dict[str, Any]]:
    """One record a version of the code; the kinds of work are per cent of a profiled step."""
    records = []
    for label, one in found.items():
        whole, second = sum(one["kinds"].values()), one["total_ms"] / 1e3
        records.append(
            {
                "size": size,
                "stage": stage,
                "code": label,
                **{name: one[name] for name in PHASES},
                "speedup": one["speedup"],
                "images": int(one["images"]),
                "texts": int(one["texts"]),
                "images_per_s": one["images"] / second,
                "texts_per_s": one["texts"] / second,
                **{f"{kind}_percent": 100 * one["kinds"].get(kind, 0.0) / whole for kind in KINDS},
                "threads": threads,
                **one["about"],
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
            }
        )
    return records


def keep(path: Path, records: list[dict[str, Any]]) -> None:
    """Put `records` into the CSV in place of those of the same size, stage and threads."""
    key = ("size", "stage", "threads")
    new = {tuple(str(record[name]) for name in key) for record in records}
    old: list[dict[str, Any]] = [row for row in rows_of(path) if tuple(row[name] for name in key) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_csv(sorted([*old, *records], key=lambda row: (int(row["threads"]), SIZES.index(row["size"]), row["stage"]))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", action="append", metavar="LABEL=FOLDER", help="a checkout to measure; the first one is the reference")
    parser.add_argument("--size", choices=SIZES, action="append", help="both by default")
    parser.add_argument("--stage", choices=STAGES, action="append", help="all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads < 1:
        parser.error("argument --threads: 1 or more")
    if options.serve:
        size, stage = options.serve
        serve(size, stage, options.threads)
        return 0
    codes = {label: Path(folder).resolve() for label, _, folder in (text.partition("=") for text in options.code or [f"after={ROOT}"])}
    from efficientvlm.script import run_script  # not in every checkout that is measured

    return run_script(lambda: measure(codes, options.size or SIZES, options.stage or STAGES, options.threads))


def measure(codes: dict[str, Path], sizes: Sequence[str], stages: Sequence[str], threads: int) -> list[Path]:
    """Write the CSV, stage by stage; the file written."""
    for label, folder in codes.items():
        if not (folder / "efficientvlm").is_dir():
            raise BadInput(
                f"no checkout in {folder}", f"--code {label}=… names a folder that holds efficientvlm/", "git worktree add makes one"
            )
    path = ROOT / csv_of("training_speed", processor())
    for size in sizes:
        for stage in stages:
            records = rows(compare(codes, size, stage, threads), size, stage, threads)
            keep(path, records)
            for row in records:
                said = f"{row['total_ms']:.0f} ms, {row['images_per_s']:.1f} images/s, {row['matrix_percent']:.0f} % matrix products"
                print(f"{size} {stage} {row['code']}: {said}, {row['speedup']:.2f}x", file=sys.stderr, flush=True)
    return [path]


if __name__ == "__main__":
    sys.exit(main())
