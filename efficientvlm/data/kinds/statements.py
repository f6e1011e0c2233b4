"""Statements about two pictures that are true or false (the form of NLVR2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efficientvlm.data import exact, phrases
from efficientvlm.data.cells import check_size, shown
from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.scenes import Scene
from efficientvlm.data.shapes import Shapes
from efficientvlm.errors import BadInput

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(slots=True)
class Statement:
    text: str
    label: bool


@dataclass(slots=True)
class TwoImageItem:
    """A left and a right image, and statements about both."""

    id: str
    images: tuple[Pixels, Pixels]
    statements: list[Statement]


class Statements(Kind[TwoImageItem, Statement]):
    """Roles image and second_image (left and right), statement, label (true or false) and, optionally, image_id, of both together."""

    name, holds = "statements", "statements about two pictures"
    pictures = ("image", "second_image")
    roles = {
        "image": ("left", "left_image", "image_0", *IMAGE_NAMES),
        "second_image": ("right", "right_image", "image_1", "second_image"),
        **IMAGE_ID,
        "statement": ("statement", "sentence"),
        "label": ("label",),
    }
    required = ("image", "second_image", "statement", "label")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Statement:
        text, label = values.get("statement"), TRUTH.get(str(values.get("label")).strip().lower())
        if not isinstance(text, str) or not text.strip():
            raise BadInput(where, f"its {columns['statement']} is no text ({shown(text)})", "write a statement as text, or remove the row")
        if label is None:
            raise BadInput(where, f"its {columns['label']} is neither true nor false ({shown(values.get('label'))})", "write true or false")
        check_size([text], where, columns["statement"])
        return Statement(text.strip(), label)

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Statement]]) -> TwoImageItem:
        left, right = pictures
        return TwoImageItem(key, (left.pixels, right.pixels), [statement for statement, _ in rows])

    def texts(self, contents: Sequence[Statement]) -> Iterator[str]:
        yield from (statement.text for statement in contents)

    def drawn(self, shapes: Shapes[TwoImageItem], index: int, key: str) -> TwoImageItem:
        left, right, statement, rng = about_two(shapes, index)
        return TwoImageItem(key, (shapes.drawn(left, rng, "left"), shapes.drawn(right, rng, "right")), [statement])

    def contents_at(self, shapes: Shapes[TwoImageItem], index: int) -> list[Statement]:
        return [about_two(shapes, index)[2]]


STATEMENTS = Statements()


def about_two(shapes: Shapes[Any], index: int) -> tuple[Scene, Scene, Statement, np.random.Generator]:
    """Two scenes and a statement. Its form and its truth are drawn first, so that neither tells the other; the scenes follow."""
    level = shapes.settings.level
    if shapes.settings.exact:
        rng = shapes.words(index, "statement")
        left, right, text, truth = exact.about_two(rng, level, shapes.settings.counts, lambda objects: shapes.sampled(rng, objects))
        return left, right, Statement(text, truth), rng
    rng, left = shapes.scene(index, "left")
    label = bool(rng.random() < 0.5)
    form, what = phrases.pick(rng, phrases.STATEMENTS), phrases.pick(rng, phrases.NOUNS)
    right = shapes.sampled(rng)
    attempt = 0
    while True:
        statement, truth = phrases.statement(form, phrases.noun_for(what, left, right, rng, level), left, right, rng)
        if truth == label:
            return left, right, Statement(statement, label), rng
        attempt += 1
        if attempt % 4 == 0:
            left, right = right, shapes.sampled(rng)
