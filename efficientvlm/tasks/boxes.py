"""How good boxes are: accuracy at an overlap of one half, mean overlap, and what a box says that looks at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from efficientvlm.data.boxes import PixelBox, iou
from efficientvlm.tasks.recall import standard_error

ENOUGH = 0.5


class Found(NamedTuple):
    """The box that was said for a phrase, and the one that is meant, in pixels of a picture of `size`; `part` as the data say."""

    said: PixelBox
    meant: PixelBox
    size: tuple[int, int]
    part: str = ""


def scores(found: Sequence[Found], *, inclusive: bool = False) -> dict[str, Any]:
    """Metrics of boxes, JSON-ready.

    `box_accuracy` is the part of the phrases whose box overlaps the one that is meant by one half (intersection over union) or more, with
    its `standard_error`, `mean_iou` the mean overlap. `centre_accuracy` is what a box in the middle of each picture would reach that has
    the median width and height, as fractions, of the boxes that are meant: what can be had without looking. `box_accuracy_of` has the parts
    of the data, where it names some.
    """
    if not found:
        return {"phrases": 0}
    said, meant = (np.array([one[at] for one in found], np.float64) for at in (0, 1))
    overlap = iou(said, meant, inclusive=inclusive)
    hits = overlap >= ENOUGH
    sizes = np.array([one.size for one in found], np.float64)
    sides = np.median(meant[:, 2:] / sizes, axis=0) * sizes
    middle = iou(np.concatenate([(sizes - sides) / 2, sides], 1), meant, inclusive=inclusive) >= ENOUGH
    accuracy = float(hits.mean())
    result: dict[str, Any] = {
        "phrases": len(found),
        "box_accuracy": accuracy,
        "mean_iou": float(overlap.mean()),
        "centre_accuracy": float(middle.mean()),
        "standard_error": standard_error(accuracy, len(found)),
    }
    parts = np.array([one.part for one in found])
    if names := sorted({*parts.tolist()} - {""}):
        result["box_accuracy_of"] = {name: float(hits[parts == name].mean()) for name in names}
    return result
