"""What the cells of a row must hold to be a question or a caption with regions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from efficientvlm.data.items import Box, Question, Region
from efficientvlm.errors import BadInput


def question_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Question:
    """The question in a row given by role.

    Raises:
        BadInput: no question, or no answer; names `where`.
    """
    text, answer = values.get("question"), values.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise BadInput(where, f"its {columns['question']} is no text ({_shown(text)})", "write a question as text, or remove the row")
    answers = weighted_answers(answer, values.get("weight"))
    if answers is None:
        raise BadInput(
            where,
            f"its {columns['answer']} is no answer ({_shown(answer)})",
            "an answer is a string, a list of strings, or a list of {answer: ...}",
        )
    return Question(text.strip(), answers, annotators=len(_listed(answer)) if isinstance(answer, list | dict) else 0)


def captions_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> list[str]:
    """The captions in a row given by role.

    Raises:
        BadInput: none, or one that is no text; names `where`.
    """
    value = values.get("caption")
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadInput(where, f"its {columns['caption']} is no text ({_shown(value)})", "a caption is a string or a list of strings")
    return [text.strip() for text in found]


def places_of(values: Mapping[str, Any], where: str) -> list[Any]:
    """The entries of a row's regions, their phrases checked; their boxes need the picture's size, see :func:`regions_of`.

    Raises:
        BadInput: not a list, or an entry without a phrase; names `where`.
    """
    value = values.get("regions")
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadInput(where, f"its regions are no list ({_shown(value)})", "a region is {caption: ..., bb: [x, y, w, h]}")
    for place in value:
        regions_of(place, None, where)
    return value


def regions_of(place: Any, size: tuple[int, int] | None, where: str) -> list[Region]:
    """The regions of one entry: its phrase, or each of its phrases, with its box as fractions of an image of `size` (None: the whole)."""
    fields = place if isinstance(place, dict) else {}
    said = fields.get("caption") or fields.get("phrase") or fields.get("text")
    phrases = [said] if isinstance(said, str) else said
    box = fields.get("bb") or fields.get("box") or fields.get("bbox")
    if not isinstance(phrases, list) or not all(isinstance(text, str) and text.strip() for text in phrases):
        raise BadInput(where, f"a region has no caption ({_shown(place)})", "a region is {caption: ..., bb: [x, y, w, h]}")
    placed = (0.5, 0.5, 1.0, 1.0) if size is None else _fractions(box, *size, where)
    return [Region(text.strip(), placed) for text in phrases]


def weighted_answers(value: Any, weight: Any = None) -> list[tuple[str, float]] | None:
    """Distinct answers with weights: frequencies, multiplied by `weight` (a number, or one a answer); None if there is no answer.

    VQAv2's ten answers a question so get the weights of the published method, frequency / 10.
    """
    answers = [_answer(entry.get("answer") if isinstance(entry, dict) else entry) for entry in _listed(value)]
    if not answers or any(answer is None for answer in answers):
        return None
    if isinstance(weight, list):
        factors = [_number(factor) for factor in weight]
        if len(weight) != len(answers):
            return None
    else:
        factor = 1.0 if weight is None else _number(weight)
        factors = [None if factor is None else factor / len(answers)] * len(answers)
    total: Counter[str] = Counter()
    for answer, share in zip(answers, factors, strict=True):
        if share is None or share < 0:
            return None
        total[str(answer)] += share  # type: ignore[assignment]
    return [(answer, float(share)) for answer, share in total.items()]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):  # a list of records as `datasets` may store it
        value = value.get("answer")
    return value if isinstance(value, list) else [value]


def _answer(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = _number(value)
        return None if number is None else str(value) if isinstance(value, int) else f"{number:g}"
    return value.strip() or None if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    """A finite number, also one written as text (all that a CSV file has)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _fractions(box: Any, width: int, height: int, where: str) -> Box:
    numbers = [_number(value) for value in box] if isinstance(box, list | tuple) and len(box) == 4 else []
    if numbers and None not in numbers and not any(isinstance(value, str) for value in box):
        x, y, w, h = (float(value) for value in box)
        left, top, right, bottom = max(0.0, x / width), max(0.0, y / height), min(1.0, (x + w) / width), min(1.0, (y + h) / height)
        if right > left and bottom > top:
            return ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    raise BadInput(where, f"a region's box {_shown(box)} is not inside the image of {width} x {height}", "a box is [x, y, w, h] in pixels")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
