"""What the cells of a row must hold to be a question or a caption with regions."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise
from typing import Any

from efficientvlm.data.items import Box, Question, Region
from efficientvlm.errors import BadInput, shorten

MOST_LISTED = 1000  # answers, captions or regions of a row
LONGEST_TEXT = 100_000  # characters
MOST_IN_A_CELL = 1_000_000  # characters of all texts in a cell together
LONGEST_LIST = 10_000_000  # characters of a list that is written as text
PLAIN_LIST = re.compile(r"""\[\s*(?:[bru]?['"{\[(]|\]$|array\()|\[[\d\s.,eE+-]*\]$|(?:np\.|numpy\.)?array\(\s*\[""")
PLAIN_GROUP = re.compile(r"""[({]\s*[bru]?['"]""")
OPENS = tuple("[({an")  # a list, or array( and np.array(
LARGEST_NUMBER = 10**100
LEFT_OUT = ("", "none")
"""Names that a role's column is given to leave the role out."""


def question_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Question:
    """The question in a row given by role.

    Raises:
        BadInput: no question, no answer, or a weight that is none; names `where`.
    """
    text, answer, weight = (listed(values.get(role), where, columns.get(role, role)) for role in ("question", "answer", "weight"))
    if not isinstance(text, str) or not text.strip():
        raise BadInput(where, f"its {columns['question']} is no text ({_shown(text)})", "write a question as text, or remove the row")
    _check_size([text], where, columns["question"])
    answers = answers_of(answer)
    if answers is None:
        raise BadInput(
            where,
            f"its {columns['answer']} is no answer ({_shown(answer)})",
            "an answer is a string, a list of strings, or a list of {answer: ...}",
        )
    _check_size(answers, where, columns["answer"])
    shares = shares_of(weight, len(answers))
    if shares is None:
        name = columns.get("weight", "weight")
        fix = "a weight is a number from 0 up, or a list of one an answer; --column weight=none leaves the column out"
        raise BadInput(where, f"its {name} is no weight ({_shown(weight)})", fix)
    return Question(text.strip(), _summed(answers, shares), annotators=len(answers) if isinstance(answer, list | dict) else 0)


def captions_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> list[str]:
    """The captions in a row given by role.

    Raises:
        BadInput: none, or one that is no text; names `where`.
    """
    value = listed(values.get("caption"), where, columns["caption"])
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadInput(where, f"its {columns['caption']} is no text ({_shown(value)})", "a caption is a string or a list of strings")
    _check_size(found, where, columns["caption"])
    return [text.strip() for text in found]


def places_of(values: Mapping[str, Any], where: str) -> list[Any]:
    """The entries of a row's regions, their phrases checked; their boxes need the picture's size, see :func:`regions_of`.

    Raises:
        BadInput: not a list, or an entry without a phrase; names `where`.
    """
    value = listed(values.get("regions"), where, "regions")
    if is_missing(value):
        return []
    if not isinstance(value, list):
        raise BadInput(where, f"its regions are no list ({_shown(value)})", "a region is {caption: ..., bb: [x, y, w, h]}")
    if len(value) > MOST_LISTED:
        raise BadInput(where, f"it has {len(value):,} regions, at most {MOST_LISTED:,} are read", "spread them over several rows")
    _check_length([region.phrase for place in value for region in regions_of(place, None, where)], where, "regions")
    return value


def listed(value: Any, where: str, column: str) -> Any:
    """`value`, or the list that its text plainly is: in JSON, or as Python prints one, which is what `to_csv` of pandas writes.

    Raises:
        BadInput: the text is plainly a list and can be read as none; names `where` and `column`.
    """
    if not isinstance(value, str) or len(value) > LONGEST_LIST or (text := value.strip())[:1] not in OPENS:
        return value
    plain = PLAIN_LIST.match(text) is not None
    if not plain and not (text[0] == "[" and text[-1] == "]") and not PLAIN_GROUP.match(text):
        return value
    for read in (json.loads, _literal):
        try:
            found = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(found, list | tuple | set | dict):
            if not _is_unicode(found):
                break
            return found if isinstance(found, list | dict) else sorted(found, key=str) if isinstance(found, set) else list(found)
    if plain:
        why = f"its {column} looks like a list and is none that can be read ({_shown(value)})"
        raise BadInput(where, why, 'write it as JSON: ["one", "two"]')
    return value


def _literal(text: str) -> Any:
    """A Python literal. Strings side by side, as NumPy prints an array, would be one string to Python: they are refused."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    if any(first == second == tokenize.STRING for first, second in pairwise(kinds)):
        raise ValueError("no comma between two strings")
    return ast.literal_eval(text)


def _is_unicode(found: Any) -> bool:
    try:
        repr(found).encode()
        return not re.search(r"\\ud[89a-f]", repr(found))
    except UnicodeEncodeError:
        return False


def _check_size(texts: list[str], where: str, column: str) -> None:
    if len(texts) > MOST_LISTED:
        raise BadInput(where, f"its {column} lists {len(texts):,}, at most {MOST_LISTED:,} are read", "spread them over several rows")
    _check_length(texts, where, column)


def _check_length(texts: list[str], where: str, column: str) -> None:
    if (size := sum(map(len, texts))) > MOST_IN_A_CELL:
        raise BadInput(where, f"its {column} has {size:,} characters in all, at most {MOST_IN_A_CELL:,} are read", "shorten it")
    longest = max(map(len, texts), default=0)
    if longest > LONGEST_TEXT:
        raise BadInput(
            where, f"its {column} has {longest:,} characters, at most {LONGEST_TEXT:,} are read", "shorten it, or remove the row"
        )


def is_missing(value: Any) -> bool:
    """Whether an optional cell is empty: null, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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
    answers = answers_of(value)
    shares = shares_of(weight, len(answers)) if answers else None
    return None if answers is None or shares is None else _summed(answers, shares)


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
    factors = [_number(factor) for factor in ([weight] if whole else weight)]
    if len(factors) != (1 if whole else count) or any(factor is None or factor < 0 for factor in factors):
        return None
    numbers = [float(factor or 0) for factor in factors]
    return [numbers[0] / count] * count if whole else numbers


def _summed(answers: list[str], shares: list[float]) -> list[tuple[str, float]]:
    total: dict[str, float] = {}
    for answer, share in zip(answers, shares, strict=True):
        total[answer] = total.get(answer, 0.0) + share
    return list(total.items())


def text_of(value: Any) -> str | None:
    """A cell as text: a text without spaces around it, true as yes, a number with all its digits; None if it is empty or something else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < LARGEST_NUMBER else None
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)
    if isinstance(value, Decimal):
        return f"{value.normalize():f}" if value.is_finite() else None
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
    return shorten(repr(value), 80)
