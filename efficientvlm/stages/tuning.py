"""What finetune and prune share, whatever the task: student and teacher, training batches, the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from efficientvlm import ranks
from efficientvlm.checkpoint import Output
from efficientvlm.control import Control
from efficientvlm.data.answer_list import as_input
from efficientvlm.data.plan import Plan, plan_for
from efficientvlm.data.texts import Texts
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.objective import Objective
from efficientvlm.progress import say, telling
from efficientvlm.settings.common import Taught
from efficientvlm.stages.common import (
    Loaded,
    data_inputs,
    gather_skipped,
    keep_length,
    keep_skipped,
    learning,
    load,
    texts_of,
    validated,
    write,
)
from efficientvlm.stages.influence import observed
from efficientvlm.stages.reading import Reading, all_read, titled
from efficientvlm.stages.tasks import TASKS, Task
from efficientvlm.stages.teaching import doubt
from efficientvlm.training import Batch, Spent, accelerator, train


@dataclass
class Tuning:
    """One run on a task. `new` names the student's tensors that play a new part (a decoder started from other layers) and learn faster."""

    config: Taught
    student: Loaded
    teacher: Loaded | None
    new: list[str]
    sources: dict[str, Any]
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def open(cls, config: Taught, *, quiet: bool = False) -> Tuning:
        """Load what `config` names; nothing is written.

        Raises:
            BadInput: checkpoints or data that cannot be used together.
        """
        torch.manual_seed(config.seed)
        with telling(f"loading {config.model}{f' and {config.teacher}' if config.teacher else ''}", quiet=quiet):
            student, teacher, new = load_for_task(config)
        keep_length(student, config.max_tokens)
        opened = TASKS[config.task].open
        with telling(f"opening the data {config.data}", quiet=quiet):
            sources = {split: opened(config, split, student.preprocessing) for split in ("train", "val")}
        return cls(config, student, teacher, new, sources)

    @property
    def task(self) -> Task:
        return TASKS[self.config.task]

    @property
    def inputs(self) -> dict[str, str | None]:
        """Role → what is read, for the output's manifest."""
        config = self.config
        return {
            "model": config.model,
            "teacher": config.teacher,
            "answers": as_input(getattr(config, "answers", None)),
            **data_inputs(config, self.sources),
        }

    @cached_property
    def hardware(self) -> Any:
        return accelerator(self.config.device)

    @cached_property
    def plan(self) -> Plan:
        return plan_for(self.sources["train"], self.config.batch_size, self.config.seed, ranks.world(), ranks.rank())

    @property
    def steps(self) -> int:
        return self.config.max_steps or max(1, round(self.config.epochs * self.plan.batches_per_epoch))

    def objective(self, distil: bool = True) -> Any:
        """The task's losses and, if there is a teacher and `distil`, KD on the student, whose configuration learns what the data decide."""
        torch.manual_seed(self.config.seed)
        teacher = self.teacher if distil else None
        for loaded in filter(None, (self.student, teacher)):
            if loaded.model.device != self.hardware.device:
                loaded.model.to(self.hardware.device)
        self.task.configure(self.config, self.student, self.sources["train"])
        return self.task.objective(self.config, self.student, teacher)

    @cached_property
    def feed(self) -> Callable[[int], Sequence[Batch]]:
        return self.task.feed(self.config, self.sources["train"], self.texts, self.plan)

    @cached_property
    def texts(self) -> Texts:
        """The texts of the training data; they count what is unknown among them."""
        return texts_of(self.student)

    def train(self, objective: Objective, output: Output, control: Control) -> Spent:
        """The training loop on this run's batches."""
        if self.teacher:
            doubt(output.stage, self.teacher.manifest, self.student.manifest, self.sources["val"], control.quiet)
        keep_skipped(output, self.sources, control.quiet)
        if ranks.is_main():
            self.reading = self.task.reading(self.config, self.student, self.sources)
            for remark in titled(output.stage, self.reading):
                say(remark, quiet=control.quiet)
        with learning(self.config, output):
            return train(
                objective,
                self.feed,
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
        config, source, quiet = self.config, self.sources["val"], control.quiet
        val = validated(config, lambda: self.task.validate(config, self.student, source, quiet), quiet)
        found = observed(output.stage, config, lambda: self.task.influence(config, self.student, source), quiet)
        student, metrics = self.student, {"train": spent.last, "val": val}
        read = all_read(output.stage, self.texts, self.reading, control.quiet)
        common: dict[str, Any] = {"control": control, "spent": spent, "sources": self.sources, "metrics": metrics}
        common |= {"image_processor": student.image_processor, "extra": {**(extra or {}), "influence": found, "reading": read}}
        return write(output, student.family, student.model, student.tokenizer, **common)


def load_for_task(config: Taught) -> tuple[Loaded, Loaded | None, list[str]]:
    """Student and teacher, and the names of the student's tensors that are new.

    Raises:
        BadInput: a student or teacher that cannot do the task, or a teacher that reads other batches.
    """
    task = TASKS[config.task]
    student = load(config.model)
    teacher = load(config.teacher) if config.teacher else None
    for problem in task.problems(config, student, teacher):
        raise problem
    student.model, new = task.adapt(config, student, teacher)
    return student, teacher, new
