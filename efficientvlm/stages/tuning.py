"""What finetune and prune share: student and teacher, questions, training batches, the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from efficientvlm import ranks
from efficientvlm.checkpoint import Output
from efficientvlm.config import TaskStage
from efficientvlm.control import Control
from efficientvlm.data.collate import Texts, vqa_batch
from efficientvlm.data.plan import Plan, plan_for
from efficientvlm.errors import BadInput
from efficientvlm.files import resolve
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.task import VQA
from efficientvlm.stages.answering import Answerer, evaluate_on, open_task, read_answers
from efficientvlm.stages.common import (
    Loaded,
    data_inputs,
    gather_skipped,
    keep_skipped,
    load,
    no_answers,
    pair_problems,
    settings_of,
    texts_of,
    write,
)
from efficientvlm.training import Batch, Optimizer, Spent, accelerator, train


@dataclass
class Tuning:
    """One run on a task. `new` names the student's tensors that play a new part (a decoder started from other layers) and learn faster."""

    config: TaskStage
    student: Loaded
    teacher: Loaded | None
    new: list[str]
    sources: dict[str, Any]

    @classmethod
    def open(cls, config: TaskStage) -> Tuning:
        """Load what `config` names; nothing is written.

        Raises:
            BadInput: checkpoints or data that cannot be used together.
        """
        torch.manual_seed(config.seed)
        student, teacher, new = load_for_task(config)
        return cls(config, student, teacher, new, {split: open_task(config, split, student.sizes.image_size) for split in ("train", "val")})

    @property
    def inputs(self) -> dict[str, str | None]:
        """Role → what is read, for the output's manifest."""
        config = self.config
        return {"model": config.model, "teacher": config.teacher, "answers": config.answers, **data_inputs(config, self.sources)}

    @cached_property
    def hardware(self) -> Any:
        return accelerator(self.config.device)

    @cached_property
    def plan(self) -> Plan:
        return plan_for(self.sources["train"], self.config.batch_size, self.config.seed, ranks.world(), ranks.rank())

    @property
    def steps(self) -> int:
        return self.config.max_steps or max(1, round(self.config.epochs * self.plan.batches_per_epoch))

    def objective(self, distil: bool = True) -> VQA:
        """Task loss and, if there is a teacher and `distil`, KD on the student, whose configuration gets its closed list of answers."""
        torch.manual_seed(self.config.seed)
        model = self.student.model.to(self.hardware.device)
        model.config.answers, model.config.rank_top = answer_list(self.config, self.sources["train"]), self.config.rank_top
        teacher = self.teacher.model.to(self.hardware.device) if self.teacher and distil else None
        kd = settings_of(self.config, "kd", "weights", "quirks", "temperature")
        return VQA(self.student.family, model, teacher, **kd, scale=self.config.scale_by_temperature)

    @cached_property
    def feed(self) -> Callable[[int], Sequence[Batch]]:
        return task_feed(self.config, self.sources["train"], texts_of(self.student, self.config.max_tokens), self.plan)

    def train(self, objective: nn.Module, optimizers: Sequence[Optimizer], output: Output, control: Control, **hooks: Any) -> Spent:
        """The training loop on this run's batches."""
        keep_skipped(output, self.sources, control.quiet)
        return train(
            objective,
            self.feed,
            optimizers,
            steps=self.steps,
            options=self.config,
            output=output,
            hardware=self.hardware,
            title=output.stage,
            quiet=control.quiet,
            before_save=lambda: gather_skipped(self.sources),
            **hooks,
        )

    def finish(self, output: Output, control: Control, spent: Spent, **fields: Any) -> Manifest:
        """Validate the student and write it, on the main process."""
        return ranks.on_main(lambda: self._finish(output, control, spent, **fields), Manifest.model_validate)

    def _finish(self, output: Output, control: Control, spent: Spent, **fields: Any) -> Manifest:
        answer = Answerer(self.student, twice=self.config.quirks.first_token_twice)
        val = evaluate_on(answer, self.sources["val"], limit=self.config.eval_limit, title="validate", quiet=control.quiet)
        student, metrics = self.student, {"train": spent.last, "val": val}
        common: dict[str, Any] = {"control": control, "spent": spent, "sources": self.sources, "metrics": metrics}
        return write(output, student.family, student.model, student.tokenizer, image_processor=student.image_processor, **common, **fields)


def load_for_task(config: TaskStage) -> tuple[Loaded, Loaded | None, list[str]]:
    """Student and teacher, and the names of the student's tensors that are new.

    A student without an answer decoder gets one: from the teacher's decoder by the layer map, or else from its own fusion layers.

    Raises:
        BadInput: a teacher that is not tuned for the task or reads other batches.
    """
    student = load(config.model)
    teacher = load(config.teacher) if config.teacher else None
    for problem in teacher_problems(student, teacher) if teacher else ():
        raise problem
    student.model, new = student.family.for_vqa(student.model, teacher.model if teacher else None, config.decoder_init)
    return student, teacher, new


def teacher_problems(student: Loaded, teacher: Loaded) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student` to answer questions."""
    yield from pair_problems(student, teacher)
    if "vqa" not in teacher.tasks:
        yield no_answers(teacher, "teacher")


def answer_list(config: TaskStage, source: Any) -> list[str]:
    """The closed list of answers: the file `answers`, or every answer of the training data, most frequent first (ties by name).

    Raises:
        BadInput: no answer is accepted by `min_answer_count` questions.
    """
    if config.answers:
        return read_answers(resolve(config.answers))
    counts: dict[str, float] = {}
    questions: dict[str, int] = {}
    for answer, weight in source.answers():
        counts[answer] = counts.get(answer, 0.0) + weight
        questions[answer] = questions.get(answer, 0) + 1
    listed = [answer for answer in counts if questions[answer] >= config.min_answer_count]
    if not listed:
        most = max(questions.values(), default=0)
        raise BadInput(f"min_answer_count {config.min_answer_count} leaves no answer", f"the most frequent one has {most}", "lower it")
    return sorted(listed, key=lambda answer: (-counts[answer], answer))


def task_feed(config: TaskStage, source: Any, texts: Texts, plan: Plan) -> Callable[[int], Sequence[Batch]]:
    """Training batches by step."""

    def feed(step: int) -> list[Batch]:
        return [
            vqa_batch(
                ranks.together(lambda: [source[index] for index in plan.batch(step)]),
                texts,
                seed=config.seed,
                step=step,
                augment_kind=config.augment,
                train=True,
                double_sep=config.quirks.double_sep,
                **settings_of(config, "questions_per_image", "max_answer_tokens"),
            )
        ]

    return feed
