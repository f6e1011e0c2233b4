"""Does each part of the method earn its place? Every arm trained to the same deployed size, compared on accuracy.

python benchmarks/vqa_ablation.py [--data easy-vqa|shapes] [--out runs/ablation] [--list | --latency]

A row is appended to the CSV as soon as a run ends; runs that have a row are passed over, and a run that was interrupted resumes. All arms
have the same number of task steps; arms without distillation get nothing in place of the steps of the general stage. `--latency` times the
finished models of all runs in turns, in one process, and replaces the latency CSV; `publish_ablation.py` makes tables and plots of both.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from published import ROOT, append, as_csv, code, csv_of, rows_of

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.compression.surgery import mask_vector, slice_model
from efficientvlm.control import Control
from efficientvlm.loaded import load
from efficientvlm.runtime.hardware import processor
from efficientvlm.settings.base import Strict
from efficientvlm.settings.compose import of, stage_settings
from efficientvlm.settings.methods import DistillWeights, TaskWeights
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.run import module_of

PRETRAINED = "bundled:easy-vqa-pretrained"
PAIRS = "shapes:difficulty=2,size=100000"
DISTILL_STEPS, PRUNE_STEPS, FINETUNE_STEPS = 200, 600, 600
TRAINING = {"batch_size": 16, "lr": 1e-3, "schedule": "cosine", "warmup": 0.05, "eval_limit": 200, "save_every": 100}
LEARNT = {"sparsity_hold": 0.0, "sparsity_warmup": 0.5, "gates": {"lr": 0.05, "multiplier_lr": 0.05, "head_init": 2.0}}
TIMED: dict[str, Any] = {"batch_sizes": [1, 8], "rounds": 40, "text_length": 12}
EVERY = "every"  # quirk that a stage knows

LOGITS = ("logits", "itm_logits", "mlm_logits")
HIDDEN = ("text_hidden", "vision_hidden", "fusion_hidden", "decoder_hidden")
SELF = ("text_self_attention", "vision_self_attention", "fusion_self_attention", "decoder_self_attention")
CROSS = ("fusion_cross_attention", "decoder_cross_attention")


@dataclass(frozen=True)
class Data:
    """A task: its questions, its teacher, and how many test images are read.

    `teacher` is tuned on the questions for `teacher_steps` steps first.
    """

    name: str
    questions: str
    teacher: str
    teacher_steps: int = 0
    tested: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way to a small model.

    `start`: distilled, student (shrunk only), tuned (one of these, trained on the task), sliced (the method's structure cut out of the
    student) or random. `settings` are those of every stage that trains, `gates` of the one whose gates are learnt,
    which with `one` takes all steps on the task.
    """

    name: str
    what: str
    start: str = "distilled"
    kd: bool = True
    method: str = "l0"
    settings: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    one: bool = False
    without: tuple[str, ...] = ()


DATA = {
    data.name: data
    for data in (
        Data("easy-vqa", "easy-vqa", "bundled:easy-vqa"),
        Data("shapes", "shapes:difficulty=3,objects=1,size=20000", "bundled:easy-vqa", teacher_steps=1000, tested=1000),
    )
}
METHOD = Arm("method", "shrink, distill, prune with learnt gates and KD, finetune with KD")
MAIN = (
    METHOD,
    Arm("scratch", "the same architecture, random weights, task loss", start="random", kd=False, method="none"),
    Arm("no-kd", "the same architecture cut out of the shrunk teacher, task loss", start="sliced", kd=False, method="none"),
    Arm("magnitude", "shrink, task loss, Torch-Pruning magnitude to the same sparsity, task loss", "tuned", kd=False, method="magnitude"),
)
SINGLE = (
    Arm("magnitude-kd", "the method with Torch-Pruning magnitude in place of learnt gates", "tuned", method="magnitude"),
    Arm("tower-budgets", "the method with a budget of its own for each tower"),
    Arm("quirks", "the method with every published quirk on", settings={"quirks": EVERY, "allow_blind": True}),
    Arm("no-distill", "the method without the general distillation stage", start="student"),
    Arm("no-logits", "the method without logit terms", without=LOGITS),
    Arm("no-hidden", "the method without hidden-state terms", without=HIDDEN),
    Arm("no-attention", "the method without self-attention terms", without=SELF),
    Arm("no-cross-attention", "the method without cross-attention terms", without=CROSS),
    Arm("taylor", "as magnitude, by Taylor importance", "tuned", kd=False, method="taylor"),
)
ARMS = {arm.name: arm for arm in (*MAIN, *SINGLE)}


@dataclass(frozen=True)
class Run:
    data: Data
    arm: Arm
    sparsity: float
    seed: int
    times: int = 1
    """How many times the usual steps on the task are taken."""

    @property
    def longer(self) -> str:
        """What is added to the names of folders in which models trained for longer lie."""
        return f"-x{self.times}" if self.times > 1 else ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.data.name, self.arm.name, f"{self.sparsity:g}", str(self.seed)


def runs(names: list[str]) -> Iterator[Run]:
    """Every run in the order in which its result matters most."""
    for sparsity in (0.6, 0.4):
        for seed in (0, 1, 2):
            for data in (DATA[name] for name in names):
                yield from (Run(data, arm, sparsity, seed) for arm in MAIN)
    for data in (DATA[name] for name in names):
        yield from (Run(data, arm, 0.6, 0) for arm in SINGLE)
        yield Run(data, METHOD, 0.8, 0)
        yield from (Run(data, METHOD, 0.2, seed) for seed in (0, 1, 2))  # about the part of the parameters that the paper keeps


class Chain:
    """The stages of one run, below `root`. Stages that runs share are made once; those before the task serve both tasks."""

    def __init__(self, run: Run, root: Path) -> None:
        self.run, self.root, self.general = run, root / run.data.name, root / "general"
        self.folder = self.root / f"{run.arm.name}-{run.sparsity:g}-{run.seed}{run.longer}"

    def stage(self, name: str, out: Path, **settings: Any) -> Any:
        if settings.get("quirks") == EVERY:
            known = of(name, settings).model_fields["quirks"].annotation
            settings["quirks"] = dict.fromkeys(known.model_fields, True)  # type: ignore[union-attr]
        config = stage_settings(name, {"out": str(out), **settings})
        return module_of(name).run(config, Control())

    def teacher(self) -> str:
        data = self.run.data
        if not data.teacher_steps:
            return data.teacher
        out = self.root / "teacher"
        self.stage("finetune", out, model=data.teacher, data=data.questions, max_steps=data.teacher_steps, **TRAINING)
        return str(out)

    def student(self) -> str:
        self.stage("shrink", self.general / "student", model=PRETRAINED)
        return str(self.general / "student")

    def distilled(self) -> str:
        arm, seed = self.run.arm, self.run.seed
        left_out = {name: 0.0 for name in arm.without if name in DistillWeights.model_fields}
        name = arm.name if left_out or "quirks" in arm.settings else "method"
        out = self.general / f"distilled-{name}-{seed}"
        more = {**({"weights": left_out} if left_out else {}), **arm.settings}
        steps = {"max_steps": DISTILL_STEPS, "region_probability": 0, "augment": "none", "seed": seed}
        self.stage("distill", out, model=self.student(), teacher=PRETRAINED, data=PAIRS, **TRAINING, **steps, **more)
        return str(out)

    def start(self) -> str:
        """What is pruned on the task. A process that makes it for the other task as well is waited for."""
        self.general.mkdir(parents=True, exist_ok=True)
        with (self.general / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            arm = self.run.arm
            return self.distilled() if arm.start == "distilled" or (arm.start == "tuned" and arm.kd) else self.student()

    def final(self) -> Path:
        """The finished model of this run."""
        run, arm, out = self.run, self.run.arm, self.folder / "final"
        first, second = run.times * PRUNE_STEPS, run.times * FINETUNE_STEPS
        common: dict[str, Any] = {"data": run.data.questions, "seed": run.seed, "teacher": self.teacher(), **TRAINING, **arm.settings}
        if arm.kd:
            common["weights"] = {name: 0.0 for name in arm.without if name in TaskWeights.model_fields}
        else:
            common["kd"] = 0.0
        if arm.method == "none":
            start = self.folder / "start"
            structured(self.structure(), self.start() if arm.start == "sliced" else None, self.teacher(), start, run.seed)
            self.stage("finetune", out, model=str(start), max_steps=first + second, **common)
            return out
        cut: dict[str, Any] = {"sparsity": run.sparsity, "method": arm.method, "keep_dense": False, **common}
        if arm.start == "tuned":
            tuned = self.root / f"tuned{'-kd' * arm.kd}-{run.seed}{run.longer}"
            self.stage("finetune", tuned, model=self.start(), max_steps=first, **common)
            learnt = LEARNT | arm.gates if arm.method == "l0" else {}
            self.stage("prune", out, model=str(tuned), max_steps=second, **cut | learnt)
            return out
        if arm.name == "tower-budgets":
            cut["tower_sparsity"] = dict.fromkeys(("vision", "text", "fusion", "decoder"), run.sparsity)
        pruned, cut = self.folder / "pruned", cut | LEARNT | arm.gates
        if arm.one:
            self.stage("prune", out, model=self.start(), max_steps=first + second, **cut)
            return out
        self.stage("prune", pruned, model=self.start(), max_steps=first, **cut)
        self.stage("finetune", out, model=str(pruned), max_steps=second, **common)
        return out

    def structure(self) -> Path:
        """A model of the method's architecture at this sparsity and seed."""
        return Chain(replace(self.run, arm=METHOD), self.root.parent).final()

    def accuracy(self, model: str, out: Path) -> dict[str, Any]:
        """Metrics on the test split, measured once."""
        given = {"model": model, "data": self.run.data.questions, "split": "test", "limit": self.run.data.tested, "out": str(out)}
        config = stage_settings("eval", given)
        metrics: dict[str, Any] = module_of("eval").run(config, Control())["metrics"]
        return metrics


def structured(like: Path, source: str | None, teacher: str, out: Path, seed: int) -> None:
    """A checkpoint of the architecture of `like`: random weights, or those that `source` (with the teacher's decoder layers) has there."""

    class Structured(Strict):
        out: str
        seed: int
        like: str
        source: str | None

    config = Structured(out=str(out), seed=seed, like=str(like), source=source)
    inputs = {"model": source, "teacher": teacher} if source else {"teacher": teacher}
    output = open_output(config, "init", Control(quiet=True), {**inputs, "like": str(like)})
    if output.up_to_date:
        return
    with making(output):
        wanted = load(str(like))
        family, model = wanted.family, wanted.model
        torch.manual_seed(seed)
        if source is None:
            new = family.build(model.config)
        else:
            donor, _ = load(source).model.gain("answer", load(teacher).model)
            new = slice_model(donor, mask_vector(donor.units(), model.config.kept_indices()))
        new.config.answers, new.config.rank_top = model.config.answers, model.config.rank_top
        write(output, family, new, wanted.tokenizer, control=Control(quiet=True), **({} if source else {"origin": "random"}))


def row(run: Run, root: Path) -> dict[str, Any]:
    """Train, evaluate on the test split, and say what came out."""
    chain, began = Chain(run, root), time.process_time()
    final = chain.final()
    seconds = time.process_time() - began
    done, teacher = checkpoint.require_complete(str(final)), checkpoint.require_complete(chain.teacher())
    measured = chain.accuracy(str(final), chain.folder / "test.json")
    reference = chain.accuracy(chain.teacher(), chain.root / "teacher-test.json")
    parameters, of = done.accounting["parameters"]["total"], teacher.accounting["parameters"]["total"]
    return {
        "data": run.data.questions,
        "task": run.data.name,
        "arm": run.arm.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "achieved_sparsity": done.accounting["sparsity"]["achieved"],
        "parameters": parameters,
        "parameters_of_teacher": parameters / of,
        "macs": done.accounting["macs"]["total"],
        "macs_of_teacher": done.accounting["macs"]["total"] / teacher.accounting["macs"]["total"],
        "accuracy": measured["accuracy"],
        "teacher_accuracy": reference["accuracy"],
        "accuracy_of_teacher": measured["accuracy"] / reference["accuracy"],
        "questions": measured["questions"],
        "distill_steps": DISTILL_STEPS if run.arm.kd and run.arm.start != "student" else 0,
        "task_steps": run.times * (PRUNE_STEPS + FINETUNE_STEPS),
        "cpu_seconds": round(seconds, 1),
        "what": run.arm.what,
        "commit": code(),
        "torch": manifest.environment()["torch"],
        "date": manifest.now()[:10],
    }


def key(line: dict[str, str]) -> tuple[str, str, str, str]:
    """The run of a line of the CSV."""
    return line["task"], line["arm"], line["sparsity"], line["seed"]


def latencies(done: list[Run], root: Path) -> list[dict[str, Any]]:
    """Median latency of the finished model of every run, and its speed-up over the teacher of its task in the same round."""
    records = []
    for task in dict.fromkeys(run.data.name for run in done):
        mine = [run for run in done if run.data.name == task]
        models = [Chain(mine[0], root).teacher(), *(str(Chain(run, root).folder / "final") for run in mine)]
        result = module_of("bench").run(stage_settings("bench", {"models": models, **TIMED}), Control())
        for run, model in zip(mine, models[1:], strict=True):
            for timed in (row for row in result["latency"] if row["model"] == model):
                what = {"task": task, "arm": run.arm.name, "sparsity": run.sparsity, "seed": run.seed}
                timing = {name: timed[name] for name in ("batch", "median_ms", "p10_ms", "p90_ms", "speedup", "speedup_q1", "speedup_q3")}
                about = {"threads": result["machine"]["threads"], "torch": result["machine"]["torch"], "date": manifest.now()[:10]}
                records.append({**what, **timing, "rounds": result["rounds"], **about})
    return records


def fill(path: Path, wanted: Iterable[Run], root: Path, *, only_said: bool = False) -> None:
    """Add the rows of `wanted` that are not in the CSV `path` yet; only name them if `only_said`."""
    for run in wanted:
        if run.key in {key(line) for line in rows_of(path)}:
            continue
        print(" ".join(run.key), file=sys.stderr, flush=True)
        if not only_said:
            append(path, row(run, root))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, action="append", help="both by default; two processes may take one each")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    parser.add_argument("--latency", action="store_true", help="time the models of the runs that have a row")
    options = parser.parse_args(arguments)
    path = ROOT / csv_of("vqa_ablation", processor())
    wanted = list(runs(options.data or list(DATA)))
    if options.latency:
        finished = {key(line) for line in rows_of(path)}
        path = ROOT / csv_of("vqa_ablation_latency", processor())
        write_atomic(path, as_csv(latencies([run for run in wanted if run.key in finished], options.out)))
        print(path)
        return 0
    fill(path, wanted, options.out, only_said=options.list)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
