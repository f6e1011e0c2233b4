"""Does a light BLIP keep what its teacher can do, what of DLIP does it, and do the paper's findings hold on made scenes?

python benchmarks/dlip.py [--task retrieval|captions|answers] [--part main|modules|information|start] [--row NAME] [--seed 0]
    [--out runs/dlip-scenes] [--list]

A row is a model of one task and seed. The recipe `dlip/scenes-TASK` says how its teacher and its student are trained; all other rows are
variations of its stages: another shape, without a teacher, with a part of the terms, with a tower drawn at random. There is one teacher, of
seed 0; the seed is that of its students. What variations of one seed share is made once. Students of the parts `information` and `modules`
take a third of the recipe's steps, and so does the one that they are compared with. A row is appended to the CSV as soon as it is measured;
rows that are there are passed over, and a training that was interrupted resumes.

The part `start` trains no task: it says how much a student agrees with its teacher as it was cut, and after some steps, in a CSV of its
own. `publish_dlip.py` makes tables and plots of both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from published import ROOT, append, code, csv_of, lines_of
from scenes import Chain
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints import manifest
from efficientvlm.data.configured import open_split
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load, texts_of
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script

RECIPES = ROOT / "recipes" / "dlip"
SEEDS = (0, 1, 2)
TASKS = {"retrieval": "mean_recall", "captions": "cider_d", "answers": "accuracy"}
"""Task, as the recipes name it → what its models are compared by."""
BESIDE = ("image_to_text_r1", "text_to_image_r1", "bleu_4", "rouge_l")
AXES = ("captions", "retrieval")
TEACHER, STUDENT, ALONE, BLIND = "teacher", "small", "small, no teacher", "text only"
MAIN, MODULES, INFORMATION, START = PARTS = ("main", "modules", "information", "start")
BRIEF, BRIEFER = "small, a third of the steps", 3
DECODER = ("decoder_state", "lm_logits", "decoder_self_attention")
OF_METHOD = ("teacher", "distillation", "kd", "weights", "preset", "temperature", "cache_teacher")
SHORT, COMPARED = 100, 256
"""Steps of the part `start`, and test scenes of which agreement is measured."""


@dataclass(frozen=True)
class Model:
    """What a row is, and how it differs from the recipe's student.

    `shape` changes the settings of shrink, `terms` those of every stage that distils; `taught` is whether a teacher takes part, `hidden`
    whether pictures are painted gray, `pruned` the part that is cut off at last.
    """

    what: str
    part: str = MAIN
    shape: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Any] = field(default_factory=dict)
    taught: bool = True
    hidden: bool = False
    pruned: float | None = None
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0,)


def narrower(name: str, **shape: Any) -> Model:
    """A student of all layers, about 70 % of whose parameters are left."""
    what = f"{name} narrower, all layers, 70 % of the parameters before the task"
    return Model(what, MODULES, {"layers": None, "neurons": None, **shape}, tasks=AXES)


def fused(count: int) -> Model:
    shape = {"layers": {"vision": 2, "text": 3, "decoder": 3}, "fusion_layers": count}
    return Model(f"the small student with all three layers of texts, the last {count} of which look at images", MODULES, shape, tasks=AXES)


MODELS = {
    TEACHER: Model("as the recipe trains it"),
    STUDENT: Model("the student of the recipe, distilled before the task and on it", seeds=SEEDS),
    ALONE: Model("the same shape and as many steps, without a teacher", taught=False, seeds=SEEDS),
    BLIND: Model("the teacher's training on the task (of retrieval: its measurement) while pictures are painted gray", hidden=True),
    "base": Model(
        "two thirds as wide, all layers",
        shape={
            "layers": {"vision": 4, "text": 3, "decoder": 3},
            "width": {"vision": 64, "text": 64},
            "neurons": {"vision": 320, "text": 320},
        },
    ),
    "small, pruned": Model("the small student without 30 % of its prunable weights, pruned beside the teacher", pruned=0.3),
    BRIEF: Model("the small student, distilled before the task and on it for a third of the steps", MODULES, tasks=AXES),
    **{
        f"{preset} alone": Model(f"the small student, terms of the kind {preset} alone", INFORMATION, terms={"preset": preset}, tasks=AXES)
        for preset in ("feature", "logit", "attention")
    },
    "vision narrower": narrower("vision", width={"vision": 64}, neurons={"vision": 168}),
    "text narrower": narrower("text", width={"text": 64}),
    "both narrower": narrower("both", width={"vision": 80, "text": 80}),
    **{f"fusion {count}": fused(count) for count in (1, 2, 3)},
    "no decoder terms": Model("the small student without the terms of the decoder", MODULES, terms={"without": DECODER}, tasks=AXES),
    "vision random": Model("the small student, its vision tower drawn at random", MODULES, {"random": ["vision"]}, tasks=AXES),
    "text random": Model("the small student, its towers of texts drawn at random", MODULES, {"random": ["text", "decoder"]}, tasks=AXES),
    "important channels": Model("columns with the largest squared weights", START, {"channels": "important"}, tasks=(), seeds=SEEDS),
    "leading channels": Model("the first columns", START, {"channels": "leading"}, tasks=(), seeds=SEEDS),
    "nothing kept": Model("everything drawn at random", START, {"random": ["vision", "text", "decoder"]}, tasks=(), seeds=SEEDS),
}


@dataclass(frozen=True)
class Run:
    task: str
    seed: int
    name: str

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, str(self.seed), self.name


def runs(tasks: Sequence[str], seeds: Sequence[int], parts: Sequence[str], names: Sequence[str] = tuple(MODELS)) -> Iterator[Run]:
    """Every row, the most important ones first."""
    for part in parts:
        for seed in seeds:
            for task in tasks if part != START else ("",):
                for name, model in MODELS.items():
                    if model.part == part and seed in model.seeds and name in names and (task in model.tasks or not task):
                        yield Run(task, seed, name)


class Variations:
    """The stages of a task's recipe, and others like them; teachers are those of the first seed."""

    def __init__(self, task: str, seed: int, root: Path) -> None:
        self.task, self.seed = task, seed
        recipe = RECIPES / f"scenes-{task}.yaml"
        self.chain = Chain(recipe, seed, root)
        self.first = self.chain if seed == SEEDS[0] else Chain(recipe, SEEDS[0], root)

    def model(self, name: str) -> str:
        """The checkpoint of a row."""
        model, teacher = MODELS[name], f"{self.task}-teacher"
        if name == TEACHER or (model.hidden and self.task == "retrieval"):
            return self.first.made(teacher)
        if model.hidden:
            general = self.first.made("pretrained")
            return self.like(teacher, f"{self.task}-{slug(name)}", model=general, data=self.data(teacher, name))
        if model.pruned:
            cut = {"model": self.model(STUDENT), "sparsity": model.pruned, "teacher": self.first.made(teacher)}
            return self.like(f"{self.task}-pruned", f"{self.task}-{slug(name)}", **cut)
        return self.taught(f"{self.task}-student", self.distilled(name), teacher, model, f"{self.task}-{slug(name)}")

    def distilled(self, name: str) -> str:
        """The student of a row before the task."""
        out = "distilled" if name == STUDENT else f"general-{slug(name)}"
        return self.taught("distilled", self.student(name), "pretrained", MODELS[name], out)

    def student(self, name: str) -> str:
        """The student of a row as it is cut out of its teacher."""
        shape = MODELS[name].shape
        return self.like("student", f"student-{slug(name)}" if shape else "student", model=self.first.made("pretrained"), **shape)

    def taught(self, stage: str, student: str, teacher: str, model: Model, out: str, **changes: Any) -> str:
        """`student` after the `stage` of the recipe, in which it follows the output `teacher` of the recipe, or nobody."""
        if model.part in (MODULES, INFORMATION):
            changes["max_steps"] = self.chain.settings(stage).max_steps // BRIEFER
        if not model.taught:
            instead = "pretrain" if self.chain.steps[stage].stage == "distill" else None
            return self.like(stage, out, stage=instead, model=student, **dict.fromkeys(OF_METHOD), **changes)
        terms = {key: value for key, value in model.terms.items() if key != "without"}
        if left_out := model.terms.get("without"):
            known = type(self.chain.settings(stage).weights).model_fields
            terms["weights"] = {name: 0.0 for name in left_out if name in known} or None
        return self.like(stage, out, model=student, teacher=self.first.made(teacher), **terms, **changes)

    def like(self, name: str, out: str, *, stage: str | None = None, **changes: Any) -> str:
        """Run the stage `name` of the recipe with other settings, as another stage if that is said; its output."""
        given = self.chain.settings(name).model_dump(exclude_unset=True, exclude={"out"})
        self.chain.run(stage or self.chain.steps[name].stage, out, **{**given, **changes})
        return str(self.chain.root / out)

    def data(self, stage: str, name: str) -> str:
        """The data of a stage of the recipe, as the model of a row sees them."""
        return str(self.chain.settings(stage).data) + ",hide=all" * MODELS[name].hidden

    def tested(self, name: str) -> dict[str, Any]:
        """The metrics of a row's model on the test split, measured once."""
        test, out = f"{self.task}-teacher-test", f"{self.task}-{slug(name)}-test.json"
        return dict(self.chain.like(test, out, model=self.model(name), data=self.data(test, name))["metrics"])

    def speed(self, name: str) -> Mapping[str, Any]:
        """Latency of a row's model and its speed-up over the teacher, both timed in turns."""
        models = {each: self.model(each) for each in dict.fromkeys((TEACHER, name))}
        return self.chain.timed(f"{self.task}-{slug(name)}-speed.json", models)[name]


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def row(run: Run, root: Path) -> dict[str, Any]:
    """Train, measure on the test split, and say what came out."""
    made, began, metric = Variations(run.task, run.seed, root), time.process_time(), TASKS[run.task]
    model, teacher = (checkpoint.require_complete(made.model(name)).accounting for name in (run.name, TEACHER))
    seconds = time.process_time() - began
    metrics, best = made.tested(run.name), made.tested(TEACHER)
    timed = made.speed(run.name) if run.model.part == MAIN and not run.model.hidden else {}
    parameters, whole = model["parameters"], teacher["parameters"]
    return {
        "task": run.task,
        "seed": run.seed,
        "model": run.name,
        "part": run.model.part,
        "metric": metric,
        "value": metrics[metric],
        "standard_error": metrics.get("standard_error", metrics.get("standard_errors", {}).get(metric)),
        "of_teacher": metrics[metric] / best[metric] if best[metric] else None,
        **{name: metrics.get(name) for name in BESIDE},
        "parameters": parameters["total"],
        "parameters_of_teacher": parameters["total"] / whole["total"],
        "without_embeddings_of_teacher": parameters["without_embeddings"] / whole["without_embeddings"],
        "macs": model["macs"]["total"],
        "macs_of_teacher": model["macs"]["total"] / teacher["macs"]["total"],
        "sparsity": model["sparsity"]["achieved"],
        **{f"batch_8_{name}": timed.get(name) for name in ("median_ms", "speedup", "speedup_q1", "speedup_q3")},
        "threads": timed.get("threads"),
        "load": timed.get("load"),
        "cpu_seconds": round(seconds, 1),
        "data": made.data(f"{run.task}-teacher-test", run.name),
        "images": made.chain.settings(f"{run.task}-teacher-test").limit,
        **about(run),
    }


def about(run: Run) -> dict[str, Any]:
    return {"what": run.model.what, "commit": code(), "torch": manifest.environment()["torch"], "date": manifest.now()[:10]}


def start(run: Run, root: Path) -> Iterator[dict[str, Any]]:
    """How much a student agrees with its teacher as it was cut, and after a short distillation."""
    made = Variations(next(iter(TASKS)), run.seed, root)
    teacher, student = load(made.first.made("pretrained")), made.student(run.name)
    trained = made.taught("distilled", student, "pretrained", run.model, f"start-{slug(run.name)}", max_steps=SHORT, eval_limit=0)
    for steps, folder in ((0, student), (SHORT, trained)):
        found = agreement(teacher, load(folder), made.chain.settings("distilled"))
        yield {"seed": run.seed, "model": run.name, "steps": steps, **found, "scenes": COMPARED, **about(run)}


@torch.inference_mode()
def agreement(teacher: Loaded, student: Loaded, config: Any) -> dict[str, float]:
    """How alike what two networks say of test scenes is: `words`, the part of the words of captions, each behind those before it, that both
    hold for the most probable ones; `image` and `text`, the mean cosines of the features that are compared in retrieval; `loss`, by which
    the student says the true words."""
    source = open_split(config, PAIRS, "test", student.preprocessing)
    batch = pair_batch([source[index] for index in range(COMPARED)], texts_of(student), seed=0, step=0, augment_kind="none", masks=False)
    ids, mask = batch["text_ids"], batch["text_mask"]
    said = mask[:, 1:].bool()

    def of(model: Any) -> tuple[Tensor, Tensor, Tensor]:
        image, text = model.encode_image(batch["pixels"]).states, model.encode_text(ids, mask).states
        logits, _ = model.follow(ids, mask, model.attended(image))
        return model.image_feature(image), model.text_feature(text, mask), logits[:, :-1][said]

    (image, text, words), (own_image, own_text, own_words) = of(teacher.model.eval()), of(student.model.eval())
    return {
        "words": float((words.argmax(-1) == own_words.argmax(-1)).float().mean()),
        "image": float(F.cosine_similarity(image, own_image).mean()),
        "text": float(F.cosine_similarity(text, own_text).mean()),
        "loss": float(F.cross_entropy(own_words, ids[:, 1:][said])),
        "teacher_loss": float(F.cross_entropy(words, ids[:, 1:][said])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="all by default")
    parser.add_argument("--row", action="append", help="name of a model; all by default")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="all by default")
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/dlip-scenes"))
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    options = parser.parse_args(arguments)
    return run_script(lambda: [*work(options)])


def work(options: argparse.Namespace) -> dict[Path, None]:
    """Add every row that is not there yet; the CSVs.

    Raises:
        BadInput: a row of no such name.
    """
    if unknown := set(options.row or ()) - {*MODELS}:
        raise BadInput(f"no row {', '.join(sorted(unknown))}", f"there are {'; '.join(MODELS)}", "use one of these")
    paths = {}
    parts = options.part or [part for part in PARTS if part != START or not options.task]
    for run in runs(options.task or [*TASKS], options.seed or SEEDS, parts, options.row or [*MODELS]):
        own = run.model.part == START
        name = "dlip_start" if own else "dlip"
        path = ROOT / csv_of(name, processor())
        paths[path] = None
        if run.key in {(line.get("task", ""), line["seed"], line["model"]) for line in lines_of(name, ROOT)}:
            continue
        print(" · ".join(filter(None, run.key)), file=sys.stderr, flush=True)
        if not options.list:
            for record in start(run, options.out) if own else [row(run, options.out)]:
                append(path, record)
    return paths


if __name__ == "__main__":
    sys.exit(main())
