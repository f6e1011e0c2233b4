"""pretrain, distill and finetune: a task is learnt, with or without a teacher. prune does the same under gates (`prune.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch

from efficientvlm.checkpoints.folder import Output
from efficientvlm.checkpoints.influence import MEASURING
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.control import Control
from efficientvlm.data.ahead import how_many, wanted, workers_of
from efficientvlm.data.draw import seed_of
from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.plan import Plan, plan_for
from efficientvlm.data.reading import Reading, all_read, titled
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, keep_length, load, resized, texts_of
from efficientvlm.objectives.methods import METHODS, Method
from efficientvlm.objectives.objective import Objective
from efficientvlm.runtime import ranks
from efficientvlm.runtime.progress import say, telling
from efficientvlm.settings import common as settings
from efficientvlm.settings.stages import Distill, Finetune, Pretrain
from efficientvlm.stages.common import (
    finished,
    gather_skipped,
    keep_skipped,
    learning,
    making,
    observed,
    open_output,
    validated,
    write,
)
from efficientvlm.stages.teaching import doubt
from efficientvlm.stages.workspace import Job, Workspace, inputs_of
from efficientvlm.tasks.known import learnt_by
from efficientvlm.tasks.task import Learnt
from efficientvlm.training.feed import Feed
from efficientvlm.training.feed import Job as Step
from efficientvlm.training.loop import Batch, Spent, accelerator, train


def run(config: Pretrain | Distill | Finetune, control: Control) -> Manifest:
    """Train on the task and write the trained checkpoint, with its metrics on validation data in the manifest."""
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, config.stage, control, inputs_of(job))
    if output.up_to_date:
        return finished(output)
    with making(output):
        job = job.loaded(control.quiet)
        spent = job.train(job.objective(), output, control)
        return job.finish(output, control, spent)


def prepare(config: settings.Learning, workspace: Workspace) -> Learning:
    """What a training stage is about to do; nothing is written, and networks are shapes.

    Raises:
        BadInput: checkpoints or data that cannot be used together.
    """
    task, spec = learnt_by(config), teacher_of(config)
    student = resized(workspace.checkpoint(config.model), config.image_size)
    teacher = workspace.checkpoint(spec) if spec else None
    workspace.check(problems(config, task, student, teacher))
    sources = {split: workspace.data(config, task.kind, split, student.preprocessing) for split in ("train", "val")}
    beside = {role: workspace.data(other.config, other.kind, "train", None) for role, other in task.beside(config).items()}
    stores = {role: workspace.store(folder) for role, folder in task.stores(config).items()}
    if stores:
        digest = workspace.digest(spec) if spec else None
        read = task.fitting(config, student, teacher, digest, stores, sources | beside, workspace.note)
        sources, beside = ({role: read[role] for role in some} for some in (sources, beside))
    with torch.device("meta"):
        model, new = task.adapt(config, student, teacher)
    student.model = model.eval()
    keep_length(student, config.max_tokens)
    data = {"data": sources["train"], **({"val": sources["val"]} if config.val else {}), **beside}
    inputs = {"model": config.model, "teacher": spec, **task.files(config)}
    return Learning(config, task, student, teacher, new, sources | beside, stores, inputs=inputs, data=data)


@dataclass(frozen=True)
class Learning(Job):
    """One run on a task. `new` names the student's tensors that play a new part (a decoder started from other layers) and learn faster.

    `sources` are the samples that are read, by split; what is learnt from beside them, by role. `stores` hold what a teacher says, by role.
    """

    config: settings.Learning
    task: Learnt
    student: Loaded
    teacher: Loaded | None
    new: list[str]
    sources: dict[str, Any]
    stores: dict[str, Any] = field(default_factory=dict)

    def loaded(self, quiet: bool = False) -> Self:
        """The same with the weights of student and teacher, in the place of shapes.

        Raises:
            BadInput: damaged weights.
        """
        torch.manual_seed(self.config.seed)
        spec = teacher_of(self.config)
        with telling(f"loading {self.config.model}{f' and {spec}' if spec else ''}", quiet=quiet):
            student, teacher = resized(load(self.config.model), self.config.image_size), load(spec) if spec else None
            student.model, new = self.task.adapt(self.config, student, teacher)
        keep_length(student, self.config.max_tokens)
        return replace(self, student=student, teacher=teacher, new=new)

    @cached_property
    def hardware(self) -> Any:
        return accelerator(self.config.device)

    @cached_property
    def plan(self) -> Plan:
        return plan_for(self.sources["train"], self.config.batch_size, self.config.seed, ranks.world(), ranks.rank())

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """Of what is read beside the samples: each has an order of its own."""
        places, seed = (ranks.world(), ranks.rank()), self.config.seed
        beside = self.task.beside(self.config)
        return {role: plan_for(self.sources[role], other.batch_size, seed_of(seed, role), *places) for role, other in beside.items()}

    @property
    def steps(self) -> int:
        return self.config.steps(self.plan.batches_per_epoch)

    def objective(self, distil: bool = True) -> Objective:
        """The task's losses and, if there is a teacher and `distil`, KD on the student, whose configuration learns what the data decide.

        What the task takes out of training is frozen.
        """
        torch.manual_seed(self.config.seed)
        teacher = self.teacher if distil else None
        taught = distil and isinstance(self.config, settings.Taught) and self.config.taught
        for loaded in filter(None, (self.student, teacher)):
            if loaded.model.device != self.hardware.device:
                loaded.model.to(self.hardware.device)
        self.task.freeze(self.config, self.student)
        self.task.configure(self.config, self.student, self.sources["train"])
        hard = self.task.objective_on(self.config, self.student, self.sources["train"])
        if not taught:
            return hard
        says = self.task.taught_by(self.config, teacher.model if teacher else None, self.stores)
        return method_of(self.config).distilled(hard, says, self.config)

    def trial(self) -> Objective:
        """The objective as it is once training is under way, for a plan that runs some steps."""
        return self.objective()

    def feed(self, step: int) -> Sequence[Batch]:
        """Training batches by step, made by this process."""
        return self.task.settled(ranks.together(lambda: self.made((step, self.indices(step)))), step)

    def indices(self, step: int) -> dict[str, list[int]]:
        """Role → what this process reads of that source at a step."""
        return {role: plan.batch(step) for role, plan in {"train": self.plan, **self.plans}.items()}

    def made(self, step: Step) -> list[Batch]:
        """Training batches of a step with its indices, as far as one process makes them by itself: a worker may."""
        number, indices = step
        items = {role: [self.sources[role][index] for index in wanted(some)] for role, some in indices.items()}
        batches = self.task.batches(self.config, self.student, items.pop("train"), self.texts, number)
        return self.task.completed(self.config, self.student, batches, items, self.texts, number) if items else batches

    def fed(self) -> Feed:
        """Training batches step after step, made by so many workers as the settings say; validation data will be read by as many."""
        workers, read = how_many(self.config.workers, self.hardware.device), ("train", *self.plans)
        for source in self.sources.values():
            source.workers = workers
        assert self.texts  # a worker counts for what is there before it
        least, pin = min(workers_of(self.sources[role]) for role in read), self.hardware.device.type == "cuda"
        return Feed(self.indices, self.made, self.task.settled, workers=least, pin=pin)

    @cached_property
    def reading(self) -> Reading:
        """What the tokenizer makes of the texts."""
        return self.task.reading(self.config, self.student, self.sources)

    @cached_property
    def texts(self) -> Texts:
        """The texts of the training data; they count what is unknown among them."""
        return texts_of(self.student, self.config.max_tokens)

    def train(self, objective: Objective, output: Output, control: Control) -> Spent:
        """The training loop on this run's batches."""
        if self.teacher:
            doubt(
                output.stage,
                self.teacher.manifest,
                self.student.manifest,
                self.sources["val"],
                control.quiet,
                asked=self.task.kind is QUESTIONS,
            )
        self.task.begin(self.config, self.student, self.teacher, self.sources)
        keep_skipped(output, self.sources, control.quiet)
        if ranks.is_main():
            for remark in titled(output.stage, self.reading):
                say(remark, quiet=control.quiet)
        with learning(self.config, output, self.task.grows):
            return train(
                objective,
                self.fed(),
                objective.optimizers(self.config, self.new),
                steps=self.steps,
                options=self.config,
                output=output,
                hardware=self.hardware,
                title=output.stage,
                quiet=control.quiet,
                before_save=lambda: gather_skipped(self.sources),
            )

    def finish(self, output: Output, control: Control, spent: Spent, **fields: Any) -> Manifest:
        """Validate the student and write it, on the main process."""
        return ranks.on_main(lambda: self._finish(output, control, spent, **fields), Manifest.model_validate)

    def _finish(self, output: Output, control: Control, spent: Spent, *, extra: dict[str, Any] | None = None) -> Manifest:
        config, source, quiet, student = self.config, self.sources["val"], control.quiet, self.student
        val = validated(config, lambda: self.task.validate_on(config, student, self.teacher, self.sources, quiet), quiet)
        extra = dict(extra or {})
        if output.stage in MEASURING:
            extra["influence"] = observed(output.stage, config, lambda: self.task.influence(config, student, source), quiet)
        extra |= self.task.notes(config, student, self.sources["train"])
        extra["reading"] = all_read(output.stage, self.texts, self.reading, quiet, spent.begun)
        common: dict[str, Any] = {"control": control, "spent": spent, "sources": self.sources, "extra": extra}
        common |= {"image_processor": student.image_processor, "metrics": {"train": spent.last, "val": val}}
        return write(output, student.family, student.model, student.tokenizer, **common)


def teacher_of(config: settings.Learning) -> str | None:
    """The checkpoint that teaches, if one does."""
    return config.teacher if isinstance(config, settings.Taught) else None


def method_of(config: settings.Learning) -> Method:
    """How a teacher teaches."""
    assert isinstance(config, settings.Taught)
    return METHODS[config.distillation]


def problems(config: settings.Learning, task: Learnt, student: Loaded, teacher: Loaded | None) -> Iterator[BadInput]:
    """Every reason why `student` cannot learn `task` as `config` says, from `teacher` if there is one."""
    yield from task.problems(config, student)
    yield from unknown_towers(student, config.freeze)
    if teacher:
        yield from method_of(config).needs(student, teacher, config)
        yield from task.teacher_problems(config, teacher)


def unknown_towers(student: Loaded, towers: Sequence[str]) -> Iterator[BadInput]:
    """Towers that are to be frozen and are not there."""
    if missing := [tower for tower in towers if tower not in student.model.config.layers()]:
        why = f"{student.path} has {', '.join(student.model.config.layers())}"
        yield BadInput(f"freeze names {', '.join(missing)}", why, "name towers that it has")
