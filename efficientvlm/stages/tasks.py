"""What a training stage does differently for each task; everything else is the same for all (`tuning.py`, `prune.py`, `recut.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from efficientvlm import ranks
from efficientvlm.data.kinds.pairs import pair_batch
from efficientvlm.data.kinds.questions import answers, vqa_batch
from efficientvlm.data.plan import Plan
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.objectives.efficientvlm import distilled
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.settings.tasks import RetrievalSettings, VQASettings
from efficientvlm.stages import influence
from efficientvlm.stages.answering import EVAL_BATCH as QUESTIONS_BATCH
from efficientvlm.stages.answering import Answerer, evaluate_on, listed_answers, open_task
from efficientvlm.stages.common import Loaded, augmentation, no_answers, pair_problems, settings_of, texts_of
from efficientvlm.stages.influence import Influence
from efficientvlm.stages.pretrain import open_split
from efficientvlm.stages.reading import Reading, of_answers, of_questions, of_texts
from efficientvlm.stages.retrieving import EVAL_BATCH as PAIRS_BATCH
from efficientvlm.stages.retrieving import check_able, evaluate_pairs, no_retrieval
from efficientvlm.training import Batch


class Task(Protocol):
    """A task as `finetune` and `prune` learn it."""

    name: str
    data: str
    """What a sample is, as opened by :meth:`open`: equal for tasks that read the same."""

    def open(self, config: Any, split: str, image_size: Preprocessing | None) -> Any:
        """The data of `split`."""

    def problems(self, config: Any, student: Loaded, teacher: Loaded | None) -> Iterator[BadInput]:
        """Every reason why `student` cannot be trained on the task, by `teacher` if there is one."""

    def adapt(self, config: Any, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """The student's model with what the task needs, and the names of its tensors that are new; :class:`BadInput` if it cannot be."""

    def configure(self, config: Any, student: Loaded, source: Any) -> None:
        """Note in the student's configuration what its training data decide."""

    def reading(self, config: Any, student: Loaded, sources: dict[str, Any]) -> Reading:
        """What the tokenizer makes of the texts, once the student is configured."""

    def objective(self, config: Any, student: Loaded, teacher: Loaded | None) -> Objective:
        """What is minimised: the task's own losses, with `teacher` mixed with L_KD. It holds the student as `model`."""

    def feed(self, config: Any, source: Any, texts: Texts, plan: Plan) -> Callable[[int], Sequence[Batch]]:
        """Training batches by step."""

    def validate(self, config: Any, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        """Metrics on held-out data; :class:`BadInput` for a model of another task."""

    def influence(self, config: Any, student: Loaded, source: Any) -> Influence:
        """What the inputs of some of the held-out samples do to the outputs."""


class Answering:
    """Visual question answering: a weighted loss over the accepted answers (X-VLM), an answer decoder, a closed list of answers."""

    name, data = "vqa", "questions"

    def open(self, config: Any, split: str, image_size: Preprocessing | None) -> Any:
        return open_task(config, split, image_size)

    def problems(self, config: VQASettings, student: Loaded, teacher: Loaded | None) -> Iterator[BadInput]:
        if teacher:
            yield from pair_problems(student, teacher)
            if "vqa" not in teacher.tasks:
                yield no_answers(teacher, "teacher")

    def adapt(self, config: VQASettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """A student without an answer decoder gets one: from the teacher's decoder by the layer map, or else from its own fusion layers."""
        able = teacher is not None and "vqa" in teacher.tasks and teacher.family.name == student.family.name
        tuned: tuple[Any, list[str]] = student.family.for_vqa(
            student.model, teacher.model if teacher and able else None, config.decoder_init
        )
        return tuned

    def configure(self, config: VQASettings, student: Loaded, source: Any) -> None:
        student.model.config.answers, student.model.config.rank_top = answer_list(config, source), config.rank_top

    def reading(self, config: VQASettings, student: Loaded, sources: dict[str, Any]) -> Reading:
        texts, answers = texts_of(student, config.max_tokens), student.model.config.answers
        room = texts.room(config.max_answer_tokens, double_sep=config.quirks.double_sep)
        of_list = of_answers(texts, answers, room)
        return of_texts(texts, sources["train"]) + of_list + of_questions(texts, answers, sources["val"])

    def objective(self, config: Any, student: Loaded, teacher: Loaded | None) -> Objective:
        hard = Generation(student.family, student.model)
        return distilled(hard, teacher.model, config) if teacher else hard

    def feed(self, config: VQASettings, source: Any, texts: Texts, plan: Plan) -> Callable[[int], Sequence[Batch]]:
        def feed(step: int) -> list[Batch]:
            return [
                vqa_batch(
                    ranks.together(lambda: [source[index] for index in plan.batch(step)]),
                    texts,
                    seed=config.seed,
                    step=step,
                    **augmentation(config),
                    train=True,
                    double_sep=config.quirks.double_sep,
                    **settings_of(config, "questions_per_image", "max_answer_tokens"),
                )
            ]

        return feed

    def validate(self, config: VQASettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        answer = Answerer(student, twice=config.quirks.first_token_twice)
        size = config.eval_batch_size or QUESTIONS_BATCH
        return evaluate_on(answer, source, limit=config.eval_limit, title="validate", quiet=quiet, batch_size=size)

    def influence(self, config: VQASettings, student: Loaded, source: Any) -> Influence:
        return influence.of_answers(Answerer(student, twice=config.quirks.first_token_twice), source, config.eval_batch_size)


class Retrieval:
    """Image-text retrieval: contrast and matching, by default with hard negatives (X-VLM), on one caption an image and step."""

    name, data = "retrieval", "pairs"

    def open(self, config: Any, split: str, image_size: Preprocessing | None) -> Any:
        return open_split(config, split, image_size)

    def problems(self, config: RetrievalSettings, student: Loaded, teacher: Loaded | None) -> Iterator[BadInput]:
        if config.batch_size < 2:
            yield BadInput("batch_size 1", "matching needs another pair as negative", "use 2 or more")
        if teacher:
            yield from pair_problems(student, teacher)
            if "retrieval" not in teacher.tasks:
                yield no_retrieval(teacher, "teacher")

    def adapt(self, config: RetrievalSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Heads of other tasks are left behind."""
        if "retrieval" not in student.tasks:
            raise no_retrieval(student)
        return student.family.for_retrieval(student.model), []

    def configure(self, config: RetrievalSettings, student: Loaded, source: Any) -> None:
        pass

    def reading(self, config: RetrievalSettings, student: Loaded, sources: dict[str, Any]) -> Reading:
        return of_texts(texts_of(student, config.max_tokens), sources["train"])

    def objective(self, config: Any, student: Loaded, teacher: Loaded | None) -> Objective:
        losses, hard_negatives = student.family.retrieval, config.hard_negatives
        hard = XvlmPretraining(student.family, student.model, losses=losses, seed=config.seed, hard_negatives=hard_negatives)
        return distilled(hard, teacher.model, config) if teacher else hard

    def feed(self, config: RetrievalSettings, source: Any, texts: Texts, plan: Plan) -> Callable[[int], Sequence[Batch]]:
        def feed(step: int) -> list[Batch]:
            items = ranks.together(lambda: [source[index] for index in plan.batch(step)])
            return [pair_batch(items, texts, seed=config.seed, step=step, **augmentation(config), task=True)]

        return feed

    def validate(self, config: RetrievalSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        check_able(student)
        limit = config.eval_limit
        size = config.eval_batch_size or PAIRS_BATCH
        return evaluate_pairs(student, source, limit=limit, title="validate", quiet=quiet, batch_size=size)

    def influence(self, config: RetrievalSettings, student: Loaded, source: Any) -> Influence:
        return influence.of_pairs(student, source, config.eval_batch_size)


TASKS: dict[str, Task] = {task.name: task for task in (Answering(), Retrieval())}


def answer_list(config: VQASettings, source: Any) -> list[str]:
    """The closed list of answers: the file `answers`, or every answer of the training data, most frequent first (ties by name).

    Raises:
        BadInput: no answer is accepted by `min_answer_count` questions.
    """
    if listed := listed_answers(config):
        return listed
    counts: dict[str, float] = {}
    questions: dict[str, int] = {}
    for answer, weight in answers(source):
        counts[answer] = counts.get(answer, 0.0) + weight
        questions[answer] = questions.get(answer, 0) + 1
    listed = [answer for answer in counts if questions[answer] >= config.min_answer_count]
    if not listed:
        most = max(questions.values(), default=0)
        raise BadInput(f"min_answer_count {config.min_answer_count} leaves no answer", f"the most frequent one has {most}", "lower it")
    return sorted(listed, key=lambda answer: (-counts[answer], answer))
