"""Boxes in pictures: read from cells, as fractions of what a model sees and in pixels of the picture, and how far two of them overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientvlm.data.cells import number, shown
from efficientvlm.data.items import Box
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput

SLACK = 1.0  # pixels that a box may reach beyond its picture: annotations are rounded
FORM = "a box is [x, y, width, height] in pixels, from the upper left corner of the picture"
PixelBox = tuple[float, float, float, float]
"""Left, top, width, height in pixels."""
PixelBoxes = NDArray[np.float64]
"""The same of several boxes, `[n, 4]`."""


def four_numbers(value: Any) -> PixelBox | None:
    """The four numbers in a list; None if it is anything else."""
    if not isinstance(value, list | tuple) or len(value) != 4 or any(isinstance(part, str) for part in value):
        return None
    left, top, width, height = map(number, value)
    return None if left is None or top is None or width is None or height is None else (left, top, width, height)


def box_of(value: Any, where: str, column: str) -> PixelBox:
    """The box in a cell, of a picture whose size is not known yet.

    Raises:
        BadInput: it is none, has no area or not more than a pixel, or begins outside; names `where` and `column`.
    """
    box = four_numbers(value)
    if box is None:
        raise BadInput(where, f"its {column} is no box ({shown(value)})", FORM)
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise BadInput(where, f"its {column} {shown(list(box))} has no area: width and height are more than 0", FORM)
    if max(width, height) <= 1:
        raise BadInput(where, f"its {column} {shown(list(box))} is not larger than a pixel, like fractions of a picture", FORM)
    if left < -SLACK or top < -SLACK:
        raise BadInput(where, f"its {column} {shown(list(box))} begins outside the picture", FORM)
    return box


def inside(box: PixelBox, size: tuple[int, int], where: str) -> PixelBox:
    """`box` cut to a picture of `size` (width, height), which it may leave by a rounded pixel.

    Raises:
        BadInput: it reaches further outside, as corners do where a size is expected; names `where`.
    """
    (left, top, width, height), (across, down) = box, size
    if left + width > across + SLACK or top + height > down + SLACK:
        fix = f"{FORM}; one of two corners has to be rewritten"
        raise BadInput(where, f"the box {shown(list(box))} reaches outside its picture of {across} x {down}", fix)
    right, bottom = min(left + width, float(across)), min(top + height, float(down))
    left, top = max(left, 0.0), max(top, 0.0)
    if right <= left or bottom <= top:
        raise BadInput(where, f"the box {shown(list(box))} is not inside its picture of {across} x {down}", FORM)
    return (left, top, right - left, bottom - top)


def fractions(box: PixelBox, size: tuple[int, int]) -> Box:
    """Centre, width and height of a box in a picture of `size`, as fractions of it."""
    (left, top, width, height), (across, down) = box, size
    return ((left + width / 2) / across, (top + height / 2) / down, width / across, height / down)


def in_pixels(box: Sequence[float], size: tuple[int, int], how: Preprocessing | int | None, *, cut: bool = True) -> PixelBox:
    """Where in a picture of `size` lies what a model sees at `box` (centre, width, height as fractions of what it sees).

    What it says beyond the picture is `cut` off; the published code leaves it, which only makes boxes worse.
    """
    x, y, across, down = box
    ends = [(x - across / 2, y - down / 2), (x + across / 2, y + down / 2)]
    placed = [how.unplaced(end, *size) if isinstance(how, Preprocessing) else end for end in ends]
    limited = [[min(max(part, 0.0), 1.0) if cut else part for part in end] for end in placed]
    (left, top), (right, bottom) = ([part * whole for part, whole in zip(end, size, strict=True)] for end in limited)
    return (left, top, right - left, bottom - top)


def iou(first: PixelBoxes, second: PixelBoxes, *, inclusive: bool = False) -> NDArray[np.float64]:
    """Intersection over union `[n]` of boxes `[n, 4]` (left, top, width, height in pixels).

    With `inclusive` as the published code has it: the last pixel of a box is one less than its end, so that boxes which share at most one
    column or row of pixels do not meet; everything else is the same.
    """
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    sides = (high - low).clip(min=0)
    met = (sides > 1).all(1) if inclusive else (sides > 0).all(1)
    overlap = np.where(met, sides.prod(1), 0.0)
    union = first[:, 2:].prod(1) + second[:, 2:].prod(1) - overlap
    return np.asarray(np.where(union > 0, overlap / np.where(union > 0, union, 1.0), 0.0))
