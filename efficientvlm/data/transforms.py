"""Augmentation of uint8 images, with boxes that follow: `light` for small pictures, `paper` as X-VLM trains, `crop` as CLIP does."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from efficientvlm.data.items import Pixels
from efficientvlm.data.preprocessing import MARGIN
from efficientvlm.errors import BadInput

Boxes = NDArray[np.float32]
SIDE_WORDS = (
    *("left", "right", "leftmost", "rightmost", "leftward", "rightward", "leftwards", "rightwards"),
    *("clockwise", "counterclockwise", "anticlockwise"),
)
SIDES = re.compile(rf"\b({'|'.join(SIDE_WORDS)})\b", re.IGNORECASE)
MAX_SHIFT = 0.1
PRETRAIN_SCALE, TASK_SCALE = (0.2, 1.0), (0.5, 1.0)
CROP_SCALE = (0.08, 1.0)
ASPECTS = 3 / 4, 4 / 3
COLOUR_OPERATIONS = ("identity", "autocontrast", "equalize", "brightness", "sharpness")
GEOMETRIC_OPERATIONS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS, MAGNITUDE = 2, 0.7  # 7 of 10
ENHANCE, SHEAR, ROTATE = 0.1 + 1.8 * MAGNITUDE, 0.3 * MAGNITUDE, 30 * MAGNITUDE
TRANSLATE = 10 / 224 * MAGNITUDE  # of the side; 7 pixels at 224
FILL = (128, 128, 128)


class Crop(NamedTuple):
    """Random crops of `scale` of the area, and nothing else but mirroring."""

    scale: tuple[float, float] = CROP_SCALE


Augment = Literal["none", "light", "paper"] | Crop


class Augmented(NamedTuple):
    """`image` `[H, W, 3]`; `boxes` `[n, 4]` (centre, size; clipped to the image); `visible` `[n]`, the part of each box still inside."""

    image: Pixels
    boxes: Boxes
    visible: NDArray[np.float32]


@lru_cache(maxsize=65536)
def names_a_side(text: str) -> bool:
    """Whether `text` holds one of `SIDE_WORDS`, so that its image must not be mirrored: in English only."""
    return SIDES.search(text) is not None


def augment(
    kind: Augment,
    image: Pixels,
    rng: np.random.Generator,
    boxes: Boxes | None = None,
    *,
    flip_ok: bool = True,
    task: bool = True,
    whole: bool = False,
) -> Augmented:
    """`image` augmented as `kind` says; `task` selects the milder crop of `paper`. With `whole`, every box stays inside, all of it.

    :class:`Crop` takes a picture as `Preprocessing.for_training` makes it, larger than what comes out.

    Raises:
        BadInput: an unknown `kind`.
    """
    if kind == "none":
        return _moved(image, _as_boxes(boxes))
    if kind == "light":
        return light(image, rng, boxes, flip_ok, whole=whole)
    if kind == "paper":
        return paper(image, rng, boxes, flip_ok, scale=TASK_SCALE if task else PRETRAIN_SCALE, whole=whole)
    if isinstance(kind, Crop):
        return crop(image, rng, boxes, flip_ok, scale=kind.scale, whole=whole)
    raise BadInput(f"augmentation {kind}", "", "use none, light, paper or crop")


def light(image: Pixels, rng: np.random.Generator, boxes: Boxes | None = None, flip_ok: bool = True, *, whole: bool = False) -> Augmented:
    """A mirror image half of the time and a shift of up to 10 % by whole pixels, borders repeated (ours)."""
    height, width = image.shape[:2]
    flip = bool(rng.random() < 0.5) and flip_ok
    reach = np.array([int(MAX_SHIFT * width), int(MAX_SHIFT * height)])
    back, on = reach, reach
    if whole:
        left, top, *ends = _around(_as_boxes(boxes))
        before, behind = np.array([left, top]) * (width, height), (1 - np.array(ends)) * (width, height)
        back = np.where(behind < 1, 0, np.minimum(reach, before.astype(int)))  # a border that repeats would make a box on it longer
        on = np.where(before < 1, 0, np.minimum(reach, behind.astype(int)))
    right, down = (int(rng.integers(-low, high + 1)) for low, high in zip(back, on, strict=True))
    rows = (np.arange(height) - down).clip(0, height - 1)
    columns = (np.arange(width) - right).clip(0, width - 1)
    if flip:
        columns = columns[::-1]
    moved = _as_boxes(boxes)
    if len(moved):
        moved = moved + np.array([right / width, down / height, 0, 0], np.float32)
        if flip:
            moved[:, 0] = 1 - moved[:, 0]
    return _moved(image.take(rows, 0).take(columns, 1), moved)


def paper(
    image: Pixels,
    rng: np.random.Generator,
    boxes: Boxes | None = None,
    flip_ok: bool = True,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    whole: bool = False,
) -> Augmented:
    """Crop, resize to the size it had, mirror, RandAugment (X-VLM).

    Without boxes a random crop of `scale` of the area; with boxes (region batches) a random crop that contains one of them, or with
    `whole` all of them, and no geometric operation in RandAugment, so that the boxes stay true.
    """
    height, width = image.shape[:2]
    picture, placed = _cropped(image, rng, boxes, flip_ok, scale, whole, (width, height), Image.Resampling.BICUBIC)
    return _moved(np.array(rand_augment(picture, rng, geometric=not len(placed))), placed)


def crop(
    image: Pixels,
    rng: np.random.Generator,
    boxes: Boxes | None = None,
    flip_ok: bool = True,
    *,
    scale: tuple[float, float] = CROP_SCALE,
    whole: bool = False,
) -> Augmented:
    """A random crop of `scale` of the area, with boxes as :func:`paper`, resized to a square of 7/8 of the shortest edge; half mirrored.

    As published for CLIP and DIME-FM (Resize 256, RandomResizedCrop 224, flip), on pictures whose shortest edge is 256 for a model that
    reads 224; edges of the crop need not lie between pixels here.
    """
    side = round(min(image.shape[:2]) * MARGIN[0] / MARGIN[1])
    picture, placed = _cropped(image, rng, boxes, flip_ok, scale, whole, (side, side), Image.Resampling.BILINEAR)
    return _moved(np.array(picture), placed)


def _cropped(
    image: Pixels,
    rng: np.random.Generator,
    boxes: Boxes | None,
    flip_ok: bool,
    scale: tuple[float, float],
    whole: bool,
    size: tuple[int, int],
    resample: Image.Resampling,
) -> tuple[Image.Image, Boxes]:
    """A part of `image` as a picture of `size`, maybe mirrored, and where the boxes are in it."""
    height, width = image.shape[:2]
    placed = _as_boxes(boxes)
    if len(placed):
        kept = placed if whole else placed[int(rng.integers(len(placed)))][None]
        left, top, right, bottom = _crop_around(rng, _around(kept))
    else:
        left, top, right, bottom = _crop(rng, scale, width / height)
    picture = Image.fromarray(image).resize(size, resample, box=(left * width, top * height, right * width, bottom * height))
    if len(placed):
        span = np.array([right - left, bottom - top], np.float32)
        placed = np.concatenate([(placed[:, :2] - np.array([left, top], np.float32)) / span, placed[:, 2:] / span], 1)
    if flip_ok and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        placed[:, 0] = 1 - placed[:, 0]
    return picture, placed


def rand_augment(picture: Image.Image, rng: np.random.Generator, *, geometric: bool = True) -> Image.Image:
    """Two operations of magnitude 7 of 10, each applied with probability 0.5."""
    names = COLOUR_OPERATIONS + (GEOMETRIC_OPERATIONS if geometric else ())
    for _ in range(OPERATIONS):
        name, applied, sign = names[int(rng.integers(len(names)))], rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        if applied:
            picture = _operate(picture, name, sign)
    return picture


def _operate(picture: Image.Image, name: str, sign: int) -> Image.Image:
    if name == "autocontrast":
        return ImageOps.autocontrast(picture)
    if name == "equalize":
        return ImageOps.equalize(picture)
    if name == "brightness":
        return ImageEnhance.Brightness(picture).enhance(ENHANCE)
    if name == "sharpness":
        return ImageEnhance.Sharpness(picture).enhance(ENHANCE)
    width, height = picture.size
    if name == "rotate":
        return picture.rotate(sign * ROTATE, Image.Resampling.BILINEAR, fillcolor=FILL)
    if name == "identity":
        return picture
    move = {
        "shear_x": (1, sign * SHEAR, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * SHEAR, 1, 0),
        "translate_x": (1, 0, sign * TRANSLATE * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * TRANSLATE * height),
    }[name]
    return picture.transform(picture.size, Image.Transform.AFFINE, move, Image.Resampling.BILINEAR, fillcolor=FILL)


def _crop(rng: np.random.Generator, scale: tuple[float, float], aspect: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as fractions: `scale` of the area, sides in a ratio of 3:4 to 4:3; the most of the middle that has such a
    ratio if ten draws do not fit."""
    for _ in range(10):
        area, ratio = rng.uniform(*scale), np.exp(rng.uniform(np.log(ASPECTS[0]), np.log(ASPECTS[1])))
        width, height = float(np.sqrt(area * ratio / aspect)), float(np.sqrt(area / ratio * aspect))
        if width <= 1 and height <= 1:
            left, top = float(rng.random()) * (1 - width), float(rng.random()) * (1 - height)
            return left, top, left + width, top + height
    width, height = min(1.0, ASPECTS[1] / aspect), min(1.0, aspect / ASPECTS[0])
    return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


def _crop_around(rng: np.random.Generator, inner: NDArray[np.float32]) -> tuple[float, float, float, float]:
    low, high = inner[:2], inner[2:]
    (left, top), (right, bottom) = rng.random(2) * low, high + rng.random(2) * (1 - high)
    return float(left), float(top), float(right), float(bottom)


def _around(boxes: Boxes) -> NDArray[np.float32]:
    """Left, top, right, bottom of all boxes together, inside the image; its middle where there are none."""
    if not len(boxes):
        return np.full(4, 0.5, np.float32)
    low, high = (boxes[:, :2] - boxes[:, 2:] / 2).clip(0, 1), (boxes[:, :2] + boxes[:, 2:] / 2).clip(0, 1)
    return np.concatenate([low.min(0), high.max(0)])


def _as_boxes(boxes: Boxes | None) -> Boxes:
    return np.zeros((0, 4), np.float32) if boxes is None else np.asarray(boxes, np.float32).reshape(-1, 4)


def _moved(image: Pixels, boxes: Boxes) -> Augmented:
    """Clip `boxes` to the image and measure how much of each is left."""
    if not len(boxes):
        return Augmented(image, boxes, np.zeros(0, np.float32))
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    inside_low, inside_high = low.clip(0, 1), high.clip(0, 1)
    size = inside_high - inside_low
    area = (high - low).prod(1)
    visible = np.where(area > 0, size.prod(1) / np.maximum(area, 1e-12), 0).astype(np.float32)
    return Augmented(image, np.concatenate([(inside_low + inside_high) / 2, size], 1).astype(np.float32), visible)
