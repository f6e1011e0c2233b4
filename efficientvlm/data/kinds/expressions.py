"""Referring expressions: phrases, each of which means one box in its picture (the form of RefCOCO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from efficientvlm.data import referring
from efficientvlm.data.batch import Batch, stack
from efficientvlm.data.boxes import PixelBox, box_of, fractions, inside
from efficientvlm.data.cells import MOST_LISTED, check_size, is_missing, listed, number, shown, text_of
from efficientvlm.data.draw import generator
from efficientvlm.data.items import Box, Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.preprocessing import MAX_PIXELS, Preprocessing
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import Augment, augment, names_a_side
from efficientvlm.errors import BadInput

ASPECT = 0.02  # by which the proportions of a picture may differ from those that its row states
LONGEST_PART = 60  # characters


class Meant(NamedTuple):
    """What a row says: phrases that mean the box, the size its box is measured in (None: the picture's own), and boxes to choose from."""

    phrases: list[str]
    box: PixelBox
    size: tuple[int, int] | None = None
    part: str = ""
    candidates: tuple[PixelBox, ...] = ()


class Expression(NamedTuple):
    """A phrase and the box that it means, in pixels of the picture; `candidates` are boxes to choose from, `part` is a part of the data."""

    phrase: str
    box: PixelBox
    part: str = ""
    candidates: tuple[PixelBox, ...] = ()


@dataclass(slots=True)
class ExpressionItem:
    """A picture as it is seen, its width and height before it was prepared and how that was done, and the phrases about it."""

    id: str
    image: Pixels
    expressions: list[Expression]
    size: tuple[int, int]
    how: Preprocessing | int | None = None

    def seen(self, expression: Expression) -> Box | None:
        """Where the model sees the box, as fractions of what it sees; None if that is cut away."""
        box = fractions(expression.box, self.size)
        return self.how.placed(box, *self.size) if isinstance(self.how, Preprocessing) else box


class Expressions(Kind[ExpressionItem, Meant]):
    """Roles image, text (a string or a list), box and, optionally, width, height, detections, part, image_id.

    A box is `[x, y, width, height]` in pixels from the upper left corner of the picture, or of one of the stated width and height that has
    the same proportions. `detections` is a list of such boxes; `part` names a part of the data that is also measured by itself.
    """

    name, holds = "expressions", "phrases with a box"
    roles = {
        "image": IMAGE_NAMES,
        **IMAGE_ID,
        "text": ("text", "texts", "phrase", "phrases", "expression", "caption", "captions", "sentence", "sentences"),
        "box": ("bbox", "box", "bb"),
        "width": ("width", "image_width"),
        "height": ("height", "image_height"),
        "detections": ("detections", "candidates"),
        "part": ("part", "split"),
    }
    required = ("image", "text", "box")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Meant:
        box = box_of(listed(_bracketed(values.get("box")), where, columns["box"]), where, columns["box"])
        size = stated_size(values, where, columns)
        candidates = candidates_of(values, where, columns)
        if size:
            for placed in (box, *candidates):
                inside(placed, size, where)
        part = "" if is_missing(value := values.get("part")) else text_of(value) or ""
        if len(part) > LONGEST_PART:
            fix = f"--column part=none leaves {columns['part']} out"
            raise BadInput(where, f"its {columns['part']} is no name of a part ({shown(value)})", fix)
        return Meant(phrases_of(values, where, columns), box, size, part, candidates)

    def check(self, row: Row[Meant], pictures: Sequence[Picture]) -> None:
        expressions_of(row, pictures[0].size)

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Meant]]) -> ExpressionItem:
        (picture,) = pictures
        found = [expression for row in rows for expression in expressions_of(row, picture.size)]
        item = ExpressionItem(key, picture.pixels, found, picture.size or (1, 1), picture.how)
        if all(item.seen(expression) is None for expression in found):
            why = "its boxes lie outside of what the model sees of the picture, of which it sees the middle"
            raise BadInput(rows[0].where, why, "use a model that reads whole pictures")
        return item

    def texts(self, contents: Sequence[Meant]) -> Iterator[str]:
        for meant in contents:
            yield from meant.phrases

    def longest(self, contents: Sequence[Meant]) -> list[Meant]:
        return [meant._replace(phrases=[max(meant.phrases, key=len)]) for meant in contents]

    def drawn(self, shapes: Shapes[ExpressionItem], index: int, key: str) -> ExpressionItem:
        _, pixels = shapes.picture(index)
        size = (shapes.side, shapes.side)
        meant = [Row(content, key) for content in self.contents_at(shapes, index)]
        return ExpressionItem(key, pixels, [found for row in meant for found in expressions_of(row, size)], size)

    def contents_at(self, shapes: Shapes[ExpressionItem], index: int) -> list[Meant]:
        scene, side = shapes.scene(index)[1], shapes.side
        boxes = tuple(_pixels(thing.box, side) for thing in scene.things)
        said = referring.expressions(scene, shapes.words(index, "expression"))
        return [Meant([region.phrase], _pixels(region.box, side), (side, side), candidates=boxes) for region in said]


EXPRESSIONS = Expressions()


def _pixels(box: Box, side: int) -> PixelBox:
    x, y, width, height = (part * side for part in box)
    return (x - width / 2, y - height / 2, width, height)


def _bracketed(value: Any) -> Any:
    """A text that is a tuple of Python as one that is a list."""
    text = value.strip() if isinstance(value, str) else ""
    return f"[{text[1:-1]}]" if text[:1] == "(" and text[-1:] == ")" else value


def phrases_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> list[str]:
    """The phrases in a row given by role, each once; :class:`BadInput` if there is none, or one that is no text."""
    value = listed(values.get("text"), where, columns["text"])
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadInput(where, f"its {columns['text']} is no text ({shown(value)})", "a phrase is a string; several are a list")
    check_size(found, where, columns["text"])
    return list(dict.fromkeys(text.strip() for text in found))


def stated_size(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> tuple[int, int] | None:
    """Width and height in a row; None if it states none; :class:`BadInput` if it states one of them, or no number of pixels."""
    given = [values.get(role) for role in ("width", "height")]
    if all(map(is_missing, given)):
        return None
    width, height = map(number, given)
    if width is None or height is None or width < 1 or height < 1 or width % 1 or height % 1 or width * height > MAX_PIXELS:
        names = " and ".join(columns.get(role, role) for role in ("width", "height"))
        why = f"its {names} are no size of a picture ({shown(given[0])}, {shown(given[1])})"
        raise BadInput(where, why, "give both in pixels, or leave them out with --column width=none --column height=none")
    return int(width), int(height)


def candidates_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> tuple[PixelBox, ...]:
    """The boxes to choose from in a row; :class:`BadInput` for a list of anything else."""
    name = columns.get("detections", "detections")
    value = listed(values.get("detections"), where, name)
    if is_missing(value):
        return ()
    if not isinstance(value, list) or len(value) > MOST_LISTED:
        raise BadInput(where, f"its {name} is no list of at most {MOST_LISTED:,} boxes ({shown(value)})", "give [[x, y, w, h], ...]")
    return tuple(box_of(box, where, name) for box in value)


def expressions_of(row: Row[Meant], size: tuple[int, int] | None) -> list[Expression]:
    """The expressions of a row about a picture of `size` (None for one that was not read, of which they mean the whole); boxes that were
    measured in another size are scaled.

    Raises:
        BadInput: a box that is not inside, or a stated size of other proportions than the picture has.
    """
    meant, where = row
    if size is None:
        return [Expression(phrase, (0.0, 0.0, 1.0, 1.0)) for phrase in meant.phrases]
    stated = meant.size or size
    if abs(stated[0] * size[1] / (stated[1] * size[0]) - 1) > ASPECT:
        why = f"it says that its picture is {stated[0]} x {stated[1]}, and the picture is {size[0]} x {size[1]}"
        raise BadInput(where, why, "correct its box and size, or replace the picture")
    across, down = size[0] / stated[0], size[1] / stated[1]

    def placed(box: PixelBox) -> PixelBox:
        left, top, width, height = inside(box, stated, where)
        return (left * across, top * down, width * across, height * down)

    box, candidates = placed(meant.box), tuple(map(placed, meant.candidates))
    return [Expression(phrase, box, meant.part, candidates) for phrase in meant.phrases]


def expression_batch(
    items: Sequence[ExpressionItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    augment_kind: Augment = "light",
    mirror: bool = True,
    phrases_per_image: int = 4,
    max_tokens: int | None = None,
) -> Batch:
    """Up to `phrases_per_image` phrases of each image, drawn without replacement, which share its vision pass.

    The view holds every box that is meant, whole: a crop around them (`paper`), or a shift that leaves them inside (`light`). Where
    `mirror` allows it, half of the images are mirrored of which no phrase names a side; colours change, and nothing else.

    Returns:
        samples, the number of images;
        pixels uint8 `[I, 3, H, W]`; image_index `[Q]` (phrase → image); question_ids, question_mask `[Q, L]`; boxes float32 `[Q, 4]`
        (centre, width, height as fractions of the view); phrases and item_ids (by phrase), plain lists.
    """
    images: list[Pixels] = []
    phrases: list[str] = []
    owners: list[str] = []
    image_index: list[int] = []
    boxes: list[Any] = []
    for row, item in enumerate(items):
        rng = generator(seed, step, item.id, "expressions")
        placed = [(expression.phrase, box) for expression in item.expressions if (box := item.seen(expression))]
        chosen = [placed[i] for i in sorted(rng.permutation(len(placed))[:phrases_per_image].tolist())]
        corners = np.array([box for _, box in chosen], np.float32)
        sided = any(names_a_side(phrase) for phrase, _ in chosen)
        view = augment(augment_kind, item.image, rng, corners, flip_ok=mirror and not sided, whole=True)
        images.append(view.image)
        boxes.extend(view.boxes)
        phrases.extend(phrase for phrase, _ in chosen)
        owners.extend([item.id] * len(chosen))
        image_index.extend([row] * len(chosen))
    question_ids, question_mask = texts.batch(phrases, max_tokens)
    return {
        "samples": len(items),
        "pixels": stack(images),
        "image_index": torch.tensor(image_index, dtype=torch.int64),
        "question_ids": question_ids,
        "question_mask": question_mask,
        "boxes": torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
        "phrases": phrases,
        "item_ids": owners,
    }


def asking_batch(items: Sequence[ExpressionItem], texts: Texts) -> Batch:
    """Every phrase of every image as it is, in order: what :func:`expression_batch` gives, without boxes."""
    phrases = [(row, expression.phrase) for row, item in enumerate(items) for expression in item.expressions]
    question_ids, question_mask = texts.batch([phrase for _, phrase in phrases])
    return {
        "samples": len(items),
        "pixels": stack([item.image for item in items]),
        "image_index": torch.tensor([row for row, _ in phrases], dtype=torch.int64),
        "question_ids": question_ids,
        "question_mask": question_mask,
    }
