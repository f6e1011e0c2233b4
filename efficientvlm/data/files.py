"""A user's own questions and image-text pairs, from any table of `data.tables`, grouped by image."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from efficientvlm.data.draw import generator, seed_of
from efficientvlm.data.images import open_sized
from efficientvlm.data.items import Box, PairItem, Pixels, Question, Region, VQAItem
from efficientvlm.data.tables import Table, open_table
from efficientvlm.errors import BadInput

T = TypeVar("T", VQAItem, PairItem)
SPLIT_SEED = 20190719  # fixed, so that an image is held out in every stage or in none

# role → names that are recognised without `--column`
IMAGE = {"image": ("image", "image_path", "img", "binary"), "image_id": ("image_id", "img_id")}
VQA_ROLES = IMAGE | {"question": ("question",), "answer": ("answer", "answers", "multiple_choice_answer"), "weight": ("weight", "weights")}
PAIR_ROLES = IMAGE | {"caption": ("caption", "captions", "text", "texts", "sentence", "sentences"), "regions": ("regions", "elems")}


class _Files(Generic[T]):
    """What both kinds of source share: columns, grouping by image, the held-out part."""

    required: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]

    def __init__(
        self,
        spec: str,
        split: str,
        *,
        columns: Mapping[str, str] | None = None,
        val_fraction: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
        image_size: int | None = None,
    ) -> None:
        self.name, self.size = spec, image_size
        self.table, hold_out = open_table(spec, split)
        if not len(self.table):
            raise BadInput(f"data {spec}", f"its split {split} has no rows")
        self.columns = find_columns(self.table, self.roles, self.required, columns or {}, spec)
        groups = self._groups()
        keys = [key for key in groups if not hold_out or (seed_of(SPLIT_SEED, key) < val_fraction * 2**63) == (split == "val")]
        if limit is not None and limit < len(keys):
            keys = [keys[i] for i in sorted(generator(seed, "limit").permutation(len(keys))[:limit].tolist())]
        self._keys, self._rows = keys, [groups[key] for key in keys]
        self._texts = {role: self.table.column(name) for role, name in self.columns.items() if role not in IMAGE}
        self._check()

    @property
    def licence(self) -> str:
        return self.table.licence

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the data files and, in order, every picture file the rows point to."""
        digest = hashlib.sha256(self.table.digest.encode())
        for rows in self._rows:
            where = self.table.image(rows[0], self.columns["image"])
            if isinstance(where, Path):
                digest.update(hashlib.sha256(where.read_bytes()).digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def _groups(self) -> dict[str, list[int]]:
        """Rows by image: by the image_id column, else by the path of the image or the hash of its bytes."""
        groups: dict[str, list[int]] = {}
        if "image_id" in self.columns:
            for row, key in enumerate(self.table.column(self.columns["image_id"])):
                if key is None:
                    raise BadInput(self.table.where(row), f"it has no {self.columns['image_id']}")
                groups.setdefault(str(key), []).append(row)
            return groups
        for row in range(len(self.table)):
            image = self.table.image(row, self.columns["image"])
            if isinstance(image, bytes):
                key = hashlib.sha256(image).hexdigest()[:16]
            else:
                key = Path(os.path.relpath(image, self.table.base)).as_posix()
            groups.setdefault(key, []).append(row)
        return groups

    def _image(self, index: int) -> tuple[Pixels, tuple[int, int]]:
        row = self._rows[index][0]
        return open_sized(self.table.image(row, self.columns["image"]), self.size, self.table.where(row))

    def _value(self, role: str, row: int) -> Any:
        return self._texts[role][row] if role in self._texts else None

    def _check(self) -> None:
        """Every text of every row, so that a bad one is known before training starts."""
        raise TypeError("a subclass says what a row must hold")


class FileVQA(_Files[VQAItem]):
    """Questions and answers: roles image, question, answer and, optionally, weight, image_id.

    An answer is a string, a list of strings (weight = frequency), or a list of `{answer: ...}` as in VQAv2.
    """

    required = ("image", "question", "answer")
    roles = VQA_ROLES

    def __getitem__(self, index: int) -> VQAItem:
        return VQAItem(self._keys[index], self._image(index)[0], self._questions[index])

    def texts(self) -> Iterator[str]:
        for questions in self._questions:
            for question in questions:
                yield question.text
                yield from (answer for answer, _ in question.answers)

    def answers(self) -> Iterator[tuple[str, float]]:
        """Every accepted answer with its weight, without decoding an image."""
        for questions in self._questions:
            for question in questions:
                yield from question.answers

    def _check(self) -> None:
        self._questions = [[self._question(row) for row in rows] for rows in self._rows]

    def _question(self, row: int) -> Question:
        text = self._value("question", row)
        if not isinstance(text, str) or not text.strip():
            raise BadInput(self.table.where(row), f"its {self.columns['question']} is no text ({text!r})")
        answers = weighted_answers(self._value("answer", row), self._value("weight", row))
        if answers is None:
            raise BadInput(
                self.table.where(row),
                f"its {self.columns['answer']} is no answer ({self._value('answer', row)!r})",
                "an answer is a string, a list of strings, or a list of {answer: ...}",
            )
        return Question(text.strip(), answers)


class FilePairs(_Files[PairItem]):
    """Image-text pairs: roles image, caption (a string or a list) and, optionally, regions, image_id.

    A region is `{caption or phrase, bb or box: [x, y, w, h]}`, in pixels of the image from its upper left corner; `caption` may be a list.
    """

    required = ("image", "caption")
    roles = PAIR_ROLES

    def __getitem__(self, index: int) -> PairItem:
        image, (width, height) = self._image(index)
        regions = []
        for row in self._rows[index]:
            for place in self._value("regions", row) or []:
                regions.extend(_regions(place, width, height, self.table.where(row)))
        return PairItem(self._keys[index], image, self._captions[index], regions)

    def texts(self) -> Iterator[str]:
        for captions, rows in zip(self._captions, self._rows, strict=True):
            yield from captions
            for row in rows:
                for place in self._value("regions", row) or []:
                    yield from (region.phrase for region in _regions(place, 1, 1, "", placed=False))

    def _check(self) -> None:
        self._captions = [list(dict.fromkeys(text for row in rows for text in self._texts_of(row))) for rows in self._rows]

    def _texts_of(self, row: int) -> list[str]:
        value = self._value("caption", row)
        found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            raise BadInput(self.table.where(row), f"its {self.columns['caption']} is no text ({value!r})")
        return [text.strip() for text in found]


def find_columns(
    table: Table, roles: Mapping[str, tuple[str, ...]], required: Sequence[str], columns: Mapping[str, str], spec: str
) -> dict[str, str]:
    """role → column, by `columns` or by the usual names.

    Raises:
        BadInput: an unknown role, a column that is not there, or a required role without one; lists the columns found.
    """
    have = f"columns found: {', '.join(table.columns) or 'none'}"
    unknown = [role for role in columns if role not in roles]
    if unknown:
        raise BadInput(f"--column {unknown[0]}={columns[unknown[0]]}", f"there is no role {unknown[0]}", f"roles are {', '.join(roles)}")
    found: dict[str, str] = {}
    for role, names in roles.items():
        if role in columns:
            if columns[role] not in table.columns:
                raise BadInput(f"data {spec} has no column {columns[role]}", have, f"--column {role}=<name>")
            found[role] = columns[role]
        else:
            usual = next((name for name in names if name in table.columns), None)
            if usual is not None:
                found[role] = usual
    missing = [role for role in required if role not in found]
    if missing:
        raise BadInput(
            f"data {spec} has no column for {' and '.join(missing)}",
            have,
            "say which: " + " ".join(f"--column {role}=<name>" for role in missing),
        )
    return found


def weighted_answers(value: Any, weight: Any = None) -> list[tuple[str, float]] | None:
    """Distinct answers with weights: frequencies, multiplied by `weight` (a number, or one a answer); None if there is no answer.

    VQAv2's ten answers a question so get the weights of the published method, frequency / 10.
    """
    if isinstance(value, dict):  # a list of records as `datasets` may store it
        value = value.get("answer")
    values = value if isinstance(value, list) else [value]
    answers = [_answer(entry.get("answer") if isinstance(entry, dict) else entry) for entry in values]
    if not answers or any(answer is None for answer in answers):
        return None
    if isinstance(weight, list):
        if len(weight) != len(answers) or not all(map(_is_weight, weight)):
            return None
        shares = [float(share) for share in weight]
    elif weight is None or _is_weight(weight):
        shares = [(1.0 if weight is None else float(weight)) / len(answers)] * len(answers)
    else:
        return None
    total: Counter[str] = Counter()
    for answer, share in zip(answers, shares, strict=True):
        total[str(answer)] += share  # type: ignore[assignment]
    return [(answer, float(share)) for answer, share in total.items()]


def _answer(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}" if math.isfinite(value) else None
    return value.strip() or None if isinstance(value, str) else None


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _regions(place: Any, width: int, height: int, where: str, *, placed: bool = True) -> list[Region]:
    """The regions of one entry: its phrase, or each of its phrases, with its box as fractions of the image."""
    fields = place if isinstance(place, dict) else {}
    said = fields.get("caption") or fields.get("phrase") or fields.get("text")
    phrases = [said] if isinstance(said, str) else said
    box = fields.get("bb") or fields.get("box") or fields.get("bbox")
    if not isinstance(phrases, list) or not all(isinstance(text, str) and text.strip() for text in phrases):
        raise BadInput(where, f"a region has no caption ({place!r})", "a region is {caption: ..., bb: [x, y, w, h]}")
    if not placed:
        return [Region(text.strip(), (0.5, 0.5, 1.0, 1.0)) for text in phrases]
    return [Region(text.strip(), _fractions(box, width, height, where)) for text in phrases]


def _fractions(box: Any, width: int, height: int, where: str) -> Box:
    usable = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    if usable:
        left, top = max(0.0, box[0] / width), max(0.0, box[1] / height)
        right, bottom = min(1.0, (box[0] + box[2]) / width), min(1.0, (box[1] + box[3]) / height)
        if right > left and bottom > top:
            return ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    raise BadInput(where, f"a region's box {box!r} is not inside the image of {width} x {height}", "a box is [x, y, w, h] in pixels")
