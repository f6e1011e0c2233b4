"""Statements about two pictures that are true or false (the form of NLVR2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from efficientvlm.data import exact, phrases
from efficientvlm.data.batch import Batch, stack
from efficientvlm.data.cells import check_size, shown, text_of
from efficientvlm.data.draw import generator
from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.nlvr2 import Identifier
from efficientvlm.data.scenes import Scene
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import Augment, augment, names_a_side
from efficientvlm.errors import BadInput

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(slots=True)
class Statement:
    """A text, whether it is true, and a name that it shares with the same text about other pictures."""

    text: str
    label: bool
    group: str


@dataclass(slots=True)
class TwoImageItem:
    """A left and a right image, and statements about both."""

    id: str
    images: tuple[Pixels, Pixels]
    statements: list[Statement]


class Statements(Kind[TwoImageItem, Statement]):
    """Roles image and second_image (left and right), or images, which lists both; statement, label (true or false); and, optionally,
    image_id, of both together, and group: what a statement has in common with itself about other pictures, by default its text.

    A group of the form of an identifier of NLVR2 is read as one: its sentence counts, not its pair of pictures.
    """

    name, holds = "statements", "statements about two pictures"
    pictures, listed = ("image", "second_image"), "images"
    roles = {
        "image": ("left", "left_image", "image_0", *IMAGE_NAMES),
        "second_image": ("right", "right_image", "image_1", "second_image"),
        "images": ("images", "image_paths"),
        **IMAGE_ID,
        "statement": ("statement", "sentence", "question"),
        "label": ("label", "answer"),
        "group": ("group", "sentence_id", "identifier"),
    }
    required = ("image", "second_image", "statement", "label")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Statement:
        text, label = values.get("statement"), TRUTH.get(str(values.get("label")).strip().lower())
        if not isinstance(text, str) or not text.strip():
            raise BadInput(where, f"its {columns['statement']} is no text ({shown(text)})", "write a statement as text, or remove the row")
        if label is None:
            raise BadInput(where, f"its {columns['label']} is neither true nor false ({shown(values.get('label'))})", "write true or false")
        check_size([text], where, columns["statement"])
        return Statement(text.strip(), label, group_of(values.get("group"), text.strip()))

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Statement]]) -> TwoImageItem:
        left, right = pictures
        if left.size is not None and np.array_equal(left.pixels, right.pixels):
            raise BadInput(rows[0].where, "its two pictures are one and the same", "name the picture that is meant, or remove the row")
        return TwoImageItem(key, (left.pixels, right.pixels), [statement for statement, _ in rows])

    def texts(self, contents: Sequence[Statement]) -> Iterator[str]:
        yield from (statement.text for statement in contents)

    def drawn(self, shapes: Shapes[TwoImageItem], index: int, key: str) -> TwoImageItem:
        left, right, statements, rng = about_two(shapes, index)
        return TwoImageItem(key, (shapes.drawn(left, rng, "left"), shapes.drawn(right, rng, "right")), statements)

    def contents_at(self, shapes: Shapes[TwoImageItem], index: int) -> list[Statement]:
        return about_two(shapes, index)[2]


STATEMENTS = Statements()


def group_of(value: Any, text: str) -> str:
    """The group in a cell; of an identifier of NLVR2 the sentence, of an empty cell the text itself."""
    if identifier := Identifier.of(value):
        return identifier.group
    return text_of(value) or text


def statement_batch(
    items: Sequence[TwoImageItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    augment_kind: Augment = "none",
    mirror: bool = True,
    statements_per_pair: int = 4,
    train: bool = True,
    max_tokens: int | None = None,
) -> Batch:
    """Statements that share the vision pass of their two images, each of which is changed by itself.

    `train` draws `statements_per_pair` of each pair without replacement (all if there are fewer); otherwise all are taken, in order.

    Returns:
        samples, the number of pairs;
        pixels and second_pixels uint8 `[P, 3, H, W]`, the left and the right images; pair_index `[S]` (statement → pair); text_ids and
        text_mask `[S, L]`; labels `[S]` (1: true); statements and groups, plain lists; item_ids (by pair).
    """
    images: tuple[list[Pixels], list[Pixels]] = ([], [])
    statements: list[Statement] = []
    pair_index: list[int] = []
    for row, item in enumerate(items):
        rng = generator(seed, step, item.id, "statements")
        chosen = item.statements
        if train and len(chosen) > statements_per_pair:
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:statements_per_pair].tolist())]
        sided = any(names_a_side(statement.text) for statement in chosen)
        for side, image in zip(images, item.images, strict=True):
            side.append(augment(augment_kind, image, rng, flip_ok=mirror and not sided, task=True).image)
        statements += chosen
        pair_index += [row] * len(chosen)
    text_ids, text_mask = texts.batch([statement.text for statement in statements], max_tokens)
    left, right = map(stack, images)
    return {
        "samples": len(items),
        "pixels": left,
        "second_pixels": right,
        "pair_index": torch.tensor(pair_index, dtype=torch.int64),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "labels": torch.tensor([int(statement.label) for statement in statements], dtype=torch.int64),
        "statements": [statement.text for statement in statements],
        "groups": [statement.group for statement in statements],
        "item_ids": [item.id for item in items],
    }


def about_two(shapes: Shapes[Any], index: int) -> tuple[Scene, Scene, list[Statement], np.random.Generator]:
    """Two scenes and what is stated about them: several statements of `exact.about_two`, or one.

    The form and the truth of one are drawn first, so that neither tells the other; the scenes follow.
    """
    settings, level = shapes.settings, shapes.settings.level
    if settings.exact:
        rng = shapes.words(index, "statement")
        left, right, said = exact.about_two(rng, level, settings.counts, settings.alike, settings.exact)
        return left, right, [Statement(text, truth, text) for text, truth in said], rng
    rng, left = shapes.scene(index, "left")
    label = bool(rng.random() < 0.5)
    form, what = phrases.pick(rng, phrases.STATEMENTS), phrases.pick(rng, phrases.NOUNS)
    right = shapes.sampled(rng)
    attempt = 0
    while True:
        statement, truth = phrases.statement(form, phrases.noun_for(what, left, right, rng, level), left, right, rng)
        if truth == label:
            return left, right, [Statement(statement, label, statement)], rng
        attempt += 1
        if attempt % 4 == 0:
            left, right = right, shapes.sampled(rng)
