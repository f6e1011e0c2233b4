"""Does the method keep what the teacher can do, on every task of X-VLM? On made scenes whose pictures have to be looked at.

python benchmarks/scenes.py [--task retrieval|captions|statements|boxes] [--seed 0] [--out runs/scenes] [--list]

Every row is a model of one task and seed: the teacher and the pruned model of the recipe `scenes-TASK`, a student without a teacher (the
same layers, cut to the same sparsity by magnitude, as many steps), and models to which pictures are hidden. A row is appended to the CSV as
soon as it is measured; rows that are there are passed over, and a training that was interrupted resumes. `publish_scenes.py` makes a table
and a plot of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from published import ROOT, append, code, csv_of, lines_of

from efficientvlm import recipe as recipes
from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints import manifest
from efficientvlm.control import Control
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages.run import run_stage

RECIPES = ROOT / "recipes" / "efficientvlm"
SEEDS = (0, 1, 2)
TIMED: dict[str, Any] = {"batch_sizes": [8], "rounds": 40, "text_length": 16}
READ = ("model", "teacher", "image_store", "sentence_store", "sentences", "images", "sentence_vectors")
"""Settings by which a stage names what another one made."""
TEACHER, METHOD, PLAIN = "teacher", "method", "no-kd"
WHAT = {
    TEACHER: "as the recipe trains it",
    METHOD: "shrink, distill, prune with learnt gates and KD, finetune with KD",
    PLAIN: "the shrunk teacher cut by magnitude to the same sparsity, then as many steps without a teacher",
}
BLIND = {True: "trained and measured while pictures are painted gray", False: "the teacher, measured while pictures are painted gray"}
"""What a model without pictures is, by whether it was trained so."""


@dataclass(frozen=True)
class Task:
    """`metric` is what models are compared by, `beside` is written down too; `hidden`: model → pictures that it does not see."""

    name: str
    metric: str
    beside: tuple[str, ...] = ()
    hidden: dict[str, str] = field(default_factory=lambda: {"text only": "all"})
    learnt: bool = True
    """Whether a model without pictures learns anything; else the teacher is measured without them."""
    other: dict[str, str] = field(default_factory=dict)
    """Model → stage of the recipe that measures it, beyond the usual ones."""
    student: str = "student"
    """The stage of the recipe that shrinks."""
    general: tuple[str, ...] = ("distilled",)
    """Stages of the recipe that distil before the task."""

    @property
    def models(self) -> list[str]:
        return [TEACHER, METHOD, PLAIN, *self.hidden, *self.other]


TASKS = {
    task.name: task
    for task in (
        Task("retrieval", "mean_recall", ("image_to_text_r1", "text_to_image_r1"), learnt=False),
        Task("captions", "cider_d", ("bleu_4", "rouge_l"), student="captions-student", general=()),
        Task(
            "statements",
            "statement_accuracy",
            ("consistency",),
            hidden={"text only": "all", "one image only": "right"},
            student="statements-student",
            general=(),
        ),
        Task(
            "boxes",
            "box_accuracy",
            ("mean_iou", "centre_accuracy"),
            other={"Grad-CAM": "boxes-gradcam-test"},
            student="boxes-student",
            general=(),
        ),
    )
}
BESIDE = [name for task in TASKS.values() for name in task.beside]


@dataclass(frozen=True)
class Run:
    task: Task
    seed: int
    model: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task.name, str(self.seed), self.model


def runs(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Every row, one seed after the other."""
    for seed in seeds:
        for task in map(TASKS.__getitem__, tasks):
            yield from (Run(task, seed, model) for model in task.models)


class Chain:
    """The stages of a recipe with one seed, and others like them. What recipes of one seed share is made once."""

    def __init__(self, recipe: Path, seed: int, root: Path, overrides: Sequence[str] = ()) -> None:
        self.seed, self.root = seed, root / str(seed)
        loaded = recipes.load_recipe(str(recipe))
        self.steps = {step.name: step for step in recipes.validate(loaded, [f"seed={seed}", *overrides], out=str(self.root))}

    def settings(self, name: str) -> Any:
        """Those of a stage of the recipe."""
        return self.steps[name].config

    def run(self, stage: str, out: str, **settings: Any) -> Any:
        """Run a stage that writes `out`; a setting of None is left out."""
        given = {key: value for key, value in {"out": str(self.root / out), **settings}.items() if value is not None}
        return run_stage(stage, stage_settings(stage, given), Control())

    def like(self, name: str, out: str, **changes: Any) -> Any:
        """Run the stage `name` of the recipe with other settings, into another place."""
        return self.run(self.steps[name].stage, out, **{**self.settings(name).model_dump(exclude_unset=True, exclude={"out"}), **changes})

    def made(self, name: str) -> str:
        """The output of a stage of the recipe, after all that it reads."""
        config = self.settings(name)
        read = [getattr(config, role, None) for role in READ]
        for other, step in self.steps.items():
            if other != name and str(getattr(step.config, "out", "")) in read:
                self.made(other)
        run_stage(self.steps[name].stage, config, Control())
        return str(config.out)

    def timed(self, out: str, models: dict[str, str], **changes: Any) -> dict[str, dict[str, Any]]:
        """Latency of `models` and their speed-up over the first, timed in turns; with the load before that."""
        load, note = round(os.getloadavg()[0], 1), (self.root / out).with_suffix(".load")
        if not (self.root / out).exists() or not note.exists():
            note.write_text(str(load), "utf-8")
        result = self.run("bench", out, models=list(models.values()), **{**TIMED, **changes})
        about = {"threads": result["machine"]["threads"], "load": note.read_text("utf-8")}
        by_folder = {row["model"]: row for row in result["latency"]}
        return {name: {**by_folder[folder], **about} for name, folder in models.items()}


class Scenes(Chain):
    """The rows of one task and seed."""

    def __init__(self, task: Task, seed: int, root: Path) -> None:
        super().__init__(RECIPES / f"scenes-{task.name}.yaml", seed, root)
        self.task = task

    @property
    def steps_taught(self) -> int:
        """Training steps that the method's student takes under a teacher."""
        own = [self.settings(name) for name in self.steps if name.startswith(f"{self.task.name}-")]
        taught = [config.max_steps for config in own if getattr(config, "teacher", None)]
        return sum(taught) + sum(self.settings(name).max_steps for name in self.task.general)

    def model(self, name: str) -> str:
        """The checkpoint of a row."""
        own = self.task.name
        if name in self.task.other:
            self.made(self.task.other[name])
            return str(self.settings(self.task.other[name]).model)
        if name == METHOD:
            return self.made(f"{own}-final")
        teacher = self.made(f"{own}-teacher")
        if name == PLAIN:
            pruned = self.settings(f"{own}-pruned")
            cut = {"method": "magnitude", "sparsity": pruned.sparsity, "round_to": pruned.round_to, "keep_dense": False}
            model = self.root / self.task.student.replace("student", "cut")
            self.run("prune", model.name, task="none", model=self.made(self.task.student), seed=self.seed, **cut)
            out = f"{own}-{PLAIN}"
            self.like(f"{own}-final", out, model=str(model), teacher=None, weights=None, kd=None, max_steps=self.steps_taught)
            return str(self.root / out)
        if name == TEACHER or not self.task.learnt:
            return teacher
        out = f"{own}-{name.replace(' ', '-')}"
        self.like(f"{own}-teacher", out, data=self.data(f"{own}-teacher", name))
        return str(self.root / out)

    def data(self, stage: str, name: str) -> str:
        """The data of a stage of the recipe, as the model of a row sees them."""
        hidden = self.task.hidden.get(name)
        return self.settings(stage).data + (f",hide={hidden}" if hidden else "")

    def tested(self, name: str) -> dict[str, Any]:
        """The metrics of a row's model on the test split, measured once."""
        if name in self.task.other:
            return dict(run_stage("eval", self.settings(self.task.other[name]), Control())["metrics"])
        test, out = f"{self.task.name}-teacher-test", f"{self.task.name}-{name.replace(' ', '-')}-test.json"
        return dict(self.like(test, out, model=self.model(name), data=self.data(test, name))["metrics"])

    def speed(self, name: str) -> dict[str, Any]:
        """Latency of a model that sees its pictures, and its speed-up over the teacher, both timed in turns; the load before that."""
        return self.timed(f"{self.task.name}-speed.json", {name: self.model(name) for name in WHAT})[name]


def described(run: Run) -> str:
    """What the model of a row is."""
    if run.model in run.task.hidden:
        return BLIND[run.task.learnt]
    return WHAT.get(run.model) or f"{run.task.other[run.model]} of the recipe"


def row(run: Run, root: Path) -> dict[str, Any]:
    """Train, measure on the test split, and say what came out."""
    chain, began = Scenes(run.task, run.seed, root), time.process_time()
    model, teacher = (checkpoint.require_complete(chain.model(name)).accounting for name in (run.model, TEACHER))
    seconds = time.process_time() - began
    metrics, best, metric = chain.tested(run.model), chain.tested(TEACHER), run.task.metric
    timed = chain.speed(run.model) if run.model in WHAT else {}
    return {
        "task": run.task.name,
        "seed": run.seed,
        "model": run.model,
        "metric": metric,
        "value": metrics[metric],
        "standard_error": metrics.get("standard_error", metrics.get("standard_errors", {}).get(metric)),
        "of_teacher": metrics[metric] / best[metric] if best[metric] else None,
        **{name: metrics[name] if name in run.task.beside else None for name in BESIDE},
        "parameters": model["parameters"]["total"],
        "parameters_of_teacher": model["parameters"]["total"] / teacher["parameters"]["total"],
        "macs": model["macs"]["total"],
        "macs_of_teacher": model["macs"]["total"] / teacher["macs"]["total"],
        "sparsity": model["sparsity"]["achieved"],
        **{f"batch_8_{name}": timed.get(name) for name in ("median_ms", "speedup", "speedup_q1", "speedup_q3")},
        "threads": timed.get("threads"),
        "load": timed.get("load"),
        "cpu_seconds": round(seconds, 1),
        "data": chain.data(f"{run.task.name}-teacher-test", run.model),
        "images": chain.settings(f"{run.task.name}-teacher-test").limit,
        "what": described(run),
        "commit": code(),
        "torch": manifest.environment()["torch"],
        "date": manifest.now()[:10],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="all by default")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    options = parser.parse_args(arguments)
    return run_script(lambda: [work(options.task or list(TASKS), options.seed or SEEDS, options.out, only_said=options.list)])


def work(tasks: Sequence[str], seeds: Sequence[int], root: Path, *, only_said: bool) -> Path:
    """Add every row that is not there yet, in this machine's CSV or in another's; this one's."""
    path = ROOT / csv_of("scenes", processor())
    for run in runs(tasks, seeds):
        if run.key in {(line["task"], line["seed"], line["model"]) for line in lines_of("scenes", ROOT)}:
            continue
        print(" ".join(run.key), file=sys.stderr, flush=True)
        if not only_said:
            append(path, row(run, root))
    return path


if __name__ == "__main__":
    sys.exit(main())
