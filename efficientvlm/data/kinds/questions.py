"""Questions about a picture, with their accepted answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from efficientvlm.data import phrases
from efficientvlm.data.batch import Batch, stack
from efficientvlm.data.cells import check_size, is_missing, listed, number, shown, text_of
from efficientvlm.data.draw import generator
from efficientvlm.data.items import Pixels, Question, Source
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.shapes import QUESTIONS as DRAWN
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import Augment, augment, names_a_side
from efficientvlm.errors import BadInput


@dataclass(slots=True)
class VQAItem:
    """An image and all the questions asked about it."""

    id: str
    image: Pixels
    questions: list[Question]


class Questions(Kind[VQAItem, Question]):
    """Roles image, question, answer and, optionally, weight, image_id.

    An answer is a string, a list of strings (weight = frequency), or a list of `{answer: ...}` as in VQAv2.
    """

    name, holds = "questions", "questions"
    roles = {
        "image": IMAGE_NAMES,
        **IMAGE_ID,
        "question": ("question",),
        "answer": ("answer", "answers", "multiple_choice_answer"),
        "weight": ("weight", "weights"),
    }
    required = ("image", "question", "answer")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Question:
        return question_of(values, where, columns)

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Question]]) -> VQAItem:
        (picture,) = pictures
        return VQAItem(key, picture.pixels, [question for question, _ in rows])

    def texts(self, contents: Sequence[Question]) -> Iterator[str]:
        for question in contents:
            yield question.text
            yield from (answer for answer, _ in question.answers)

    def drawn(self, shapes: Shapes[VQAItem], index: int, key: str) -> VQAItem:
        return VQAItem(key, shapes.picture(index)[1], self.contents_at(shapes, index))

    def contents_at(self, shapes: Shapes[VQAItem], index: int) -> list[Question]:
        return phrases.questions(shapes.scene(index)[1], shapes.words(index, "vqa"), shapes.settings.level, DRAWN)


QUESTIONS = Questions()


def asked(source: Source[VQAItem]) -> Iterator[Question]:
    """Every question of `source` (of up to 5,000 scenes of `shapes`), without decoding an image."""
    for questions in source.contents():
        yield from questions


def answers(source: Source[VQAItem]) -> Iterator[tuple[str, float]]:
    """Every accepted answer of every question with its weight, without decoding an image.

    Raises:
        BadInput: for a stream; it takes a file of answers.
    """
    if getattr(source, "endless", False):
        raise BadInput(f"data {source.name}", "the answers of a stream are not known in advance", "give --answers FILE")
    for question in asked(source):
        yield from question.answers


def question_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Question:
    """The question in a row given by role. Answers weigh by how often they are given: of the ten of VQAv2 frequency / 10, as published.

    Raises:
        BadInput: no question, no answer, or a weight that is none; names `where`.
    """
    text, answer, weight = (listed(values.get(role), where, columns.get(role, role)) for role in ("question", "answer", "weight"))
    if not isinstance(text, str) or not text.strip():
        raise BadInput(where, f"its {columns['question']} is no text ({shown(text)})", "write a question as text, or remove the row")
    check_size([text], where, columns["question"])
    answers = answers_of(answer)
    if answers is None:
        raise BadInput(
            where,
            f"its {columns['answer']} is no answer ({shown(answer)})",
            "an answer is a string, a list of strings, or a list of {answer: ...}",
        )
    check_size(answers, where, columns["answer"])
    shares = shares_of(weight, len(answers))
    if shares is None:
        name = columns.get("weight", "weight")
        fix = "a weight is a number from 0 up, or a list of one an answer; --column weight=none leaves the column out"
        raise BadInput(where, f"its {name} is no weight ({shown(weight)})", fix)
    return Question(text.strip(), _summed(answers, shares), annotators=len(answers) if isinstance(answer, list | dict) else 0)


def answers_of(value: Any) -> list[str] | None:
    """The answers in a cell as text, repeated ones too; None if it holds none, or something else beside."""
    if isinstance(value, dict):  # a list of records as `datasets` may store it
        value = value.get("answer")
    entries = value if isinstance(value, list) else [value]
    answers = [text_of(entry.get("answer") if isinstance(entry, dict) else entry) for entry in entries]
    found = [answer for answer in answers if answer is not None]
    return found if found and len(found) == len(answers) else None


def shares_of(weight: Any, count: int) -> list[float] | None:
    """The part of a question's weight that each of `count` answers has; None if `weight` is no weight."""
    if is_missing(weight):
        weight = 1.0
    whole = not isinstance(weight, list)
    factors = [number(factor) for factor in ([weight] if whole else weight)]
    if len(factors) != (1 if whole else count) or any(factor is None or factor < 0 for factor in factors):
        return None
    numbers = [float(factor or 0) for factor in factors]
    return [numbers[0] / count] * count if whole else numbers


def _summed(answers: list[str], shares: list[float]) -> list[tuple[str, float]]:
    total: dict[str, float] = {}
    for answer, share in zip(answers, shares, strict=True):
        total[answer] = total.get(answer, 0.0) + share
    return list(total.items())


def vqa_batch(
    items: Sequence[VQAItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    augment_kind: Augment = "none",
    mirror: bool = True,
    questions_per_image: int = 6,
    train: bool = True,
    max_answer_tokens: int = 10,
    max_tokens: int | None = None,
    double_sep: bool = False,
) -> Batch:
    """Questions that share the vision pass of their image.

    `train` draws `questions_per_image` of each image without replacement (all if there are fewer); otherwise all are taken, in order.

    Returns:
        samples, the number of images;
        pixels uint8 `[I, 3, H, W]`; image_index `[Q]` (question → image); question_ids, question_mask `[Q, L]`; answer_ids, answer_mask
        `[A, La]`; answer_index `[A]` (answer → question); answer_weights float32 `[A]`; distinct_questions `[D]` (rows of question_ids
        without repetition) and distinct_index `[Q]` (question → entry of those); question_texts and answer_texts (by question, the
        accepted answers with weights), plain lists; annotators (by question, 0 where not known); item_ids (by image).
    """
    images: list[Pixels] = []
    questions: list[str] = []
    answers: list[list[tuple[str, float]]] = []
    annotators: list[int] = []
    image_index: list[int] = []
    for row, item in enumerate(items):
        rng = generator(seed, step, item.id, "vqa")
        chosen = item.questions
        if train and len(chosen) > questions_per_image:
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:questions_per_image].tolist())]
        sided = any(names_a_side(q.text) or any(names_a_side(answer) for answer, _ in q.answers) for q in chosen)
        images.append(augment(augment_kind, item.image, rng, flip_ok=mirror and not sided, task=True).image)
        questions.extend(question.text for question in chosen)
        answers.extend(question.answers for question in chosen)
        annotators.extend(question.annotators for question in chosen)
        image_index.extend([row] * len(chosen))
    first = {text: row for row, text in reversed(list(enumerate(questions)))}
    entry = {text: number for number, text in enumerate(dict.fromkeys(questions))}
    flat = [(index, answer, weight) for index, accepted in enumerate(answers) for answer, weight in accepted]
    question_ids, question_mask = texts.batch(questions, max_tokens)
    answer_ids, answer_mask = texts.batch([answer for _, answer, _ in flat], max_answer_tokens, double_sep=double_sep)
    return {
        "samples": len(items),
        "pixels": stack(images),
        "image_index": torch.tensor(image_index),
        "question_ids": question_ids,
        "question_mask": question_mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_index": torch.tensor([index for index, _, _ in flat], dtype=torch.int64),
        "answer_weights": torch.tensor([weight for _, _, weight in flat], dtype=torch.float32),
        "distinct_questions": torch.tensor([first[text] for text in entry], dtype=torch.int64),
        "distinct_index": torch.tensor([entry[text] for text in questions], dtype=torch.int64),
        "question_texts": questions,
        "answer_texts": answers,
        "annotators": annotators,
        "item_ids": [item.id for item in items],
    }
