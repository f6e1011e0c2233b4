"""Question answering shared by finetune, prune and eval: data, feed, answers, prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoint import resolve
from efficientvlm.config import TaskStage
from efficientvlm.data.collate import Texts, vqa_batch
from efficientvlm.data.plan import IndexPlan
from efficientvlm.data.sources import open_vqa
from efficientvlm.errors import BadInput
from efficientvlm.progress import Bar, say
from efficientvlm.stages.common import Loaded, check_pair, load, settings_of, which
from efficientvlm.tasks.vqa import evaluate, generate, rank
from efficientvlm.training import Batch

EVAL_BATCH = 100


def open_task(config: Any, split: str, image_size: int) -> Any:
    """The questions of `split`; `val` names a validation file of its own."""
    return open_vqa(**which(config, split), **settings_of(config, "columns", "limit"), image_size=image_size)


def load_for_task(config: TaskStage) -> tuple[Loaded, Loaded | None, list[str]]:
    """Student and teacher, and the names of the student's tensors that are new.

    A student without an answer decoder gets one: from the teacher's decoder by the layer map, or else from its own fusion layers.

    Raises:
        BadInput: a teacher that is not tuned for the task or reads other batches.
    """
    student = load(config.model)
    teacher = load(config.teacher) if config.teacher else None
    if teacher is not None:
        check_pair(student, teacher)
        if not teacher.model.config.decoder_layers:
            raise BadInput(f"teacher {teacher.path} answers no questions", "it has no answer decoder", "finetune it with --task vqa first")
    if student.model.config.decoder_layers:
        return student, teacher, []
    donor = teacher if config.decoder_init in ("auto", "teacher") else None
    if donor is None and config.decoder_init == "teacher":
        raise BadInput("decoder_init is teacher", "there is no --teacher", "give one, or decoder_init=fusion")
    if donor is None and "mlm" not in student.model.config.heads:
        raise BadInput(f"{student.path} has no MLM head", "a decoder cannot be started from it", "use a pre-trained model, or a teacher")
    layers = student.model.config.fusion_layers
    before = set(student.model.state_dict())
    student.model = student.family.with_decoder(student.model, layers, donor.model if donor else None)
    new = [] if donor else sorted(set(student.model.state_dict()) - before)
    return student, teacher, new


def answer_list(config: TaskStage, source: Any) -> list[str]:
    """The closed list of answers: the file `answers`, or every answer of the training data, most frequent first (ties by name)."""
    if config.answers:
        return read_answers(resolve(config.answers))
    counts: dict[str, float] = {}
    for answer, weight in source.answers():
        counts[answer] = counts.get(answer, 0.0) + weight
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def read_answers(path: Path) -> list[str]:
    """One answer a line; :class:`BadInput` if there is none or the file is not UTF-8 text."""
    try:
        answers = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the answers in {path}", str(error), "write one answer a line, in UTF-8") from None
    if not answers:
        raise BadInput(f"{path} holds no answers", "", "write one answer a line")
    return list(dict.fromkeys(answers))


def task_feed(config: TaskStage, source: Any, texts: Texts, plan: IndexPlan) -> Callable[[int], Sequence[Batch]]:
    """Training batches by step."""

    def feed(step: int) -> list[Batch]:
        return [
            vqa_batch(
                [source[index] for index in plan.batch(step)],
                texts,
                seed=config.seed,
                step=step,
                augment_kind=config.augment,
                train=True,
                double_sep=config.quirks.double_sep,
                **settings_of(config, "questions_per_image", "max_answer_tokens", "max_tokens"),
            )
        ]

    return feed


def evaluation_batches(source: Any, texts: Texts, count: int, batch_size: int = EVAL_BATCH) -> Iterator[Batch]:
    """All questions of the first `count` images, in order."""
    for start in range(0, count, batch_size):
        yield vqa_batch([source[i] for i in range(start, min(count, start + batch_size))], texts, seed=0, step=0, train=False)


class Answerer:
    """Answers as text: `rank` among the closed list in the configuration, or `generate` freely."""

    def __init__(
        self, loaded: Loaded, *, mode: str = "rank", answers: list[str] | None = None, top: int | None = None, twice: bool = False
    ) -> None:
        self.loaded, self.mode, self.twice = loaded, mode, twice
        config = loaded.model.config
        self.texts = Texts(loaded.tokenizer)
        self.answers = list(answers or config.answers or [])
        self.top = top or config.rank_top
        self.device = next(loaded.model.parameters()).device
        if not config.decoder_layers:
            raise BadInput(f"{loaded.path} answers no questions", "it has no answer decoder", "finetune it with --task vqa first")
        if mode == "rank":
            if not self.answers:
                raise BadInput(f"{loaded.path} has no list of answers", "", "give --answers FILE, or use generation")
            ids, mask = self.texts.batch(self.answers)
            self.candidates = ids.to(self.device), mask.to(self.device)

    def on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def scored(self, batch: Batch) -> list[list[tuple[str, float]]]:
        """Ranked answers with probabilities, best first, for each question."""
        chosen, probabilities = rank(
            self.loaded.family, self.loaded.model, self.on_device(batch), self.candidates, top=self.top, first_token_twice=self.twice
        )
        return [
            [(self.answers[i], p) for i, p in zip(row, row_p, strict=True)]
            for row, row_p in zip(chosen.tolist(), probabilities.tolist(), strict=True)
        ]

    def __call__(self, batch: Batch) -> list[str]:
        """One answer a question."""
        if self.mode == "rank":
            return [row[0][0] for row in self.scored(batch)]
        texts = self.texts
        ids = generate(self.loaded.family, self.loaded.model, self.on_device(batch), cls_id=texts.cls, sep_id=texts.sep, max_tokens=10)
        return [self.loaded.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]


def evaluate_on(
    answer: Answerer, source: Any, *, limit: int | None, title: str, quiet: bool, batch_size: int = EVAL_BATCH
) -> dict[str, Any]:
    """Accuracy of `answer` over `source`, with progress."""
    count = min(len(source), limit or len(source))
    if not count:
        say(f"{title}: no images are held out, so nothing was measured; raise val_fraction or give --val", quiet=quiet)
        return {"images": 0}
    answer.loaded.model.eval()
    with Bar(title, count, quiet=quiet) as bar:
        done = 0

        def batches() -> Iterator[Batch]:
            nonlocal done
            for batch in evaluation_batches(source, answer.texts, count, batch_size):
                yield batch
                done += len(batch["pixels"])
                bar.update(done)

        result = evaluate(answer, batches())
    return {"images": count, **result}
