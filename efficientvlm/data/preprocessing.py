"""How a picture becomes the pixels that a model reads: what `preprocessor_config.json` says, as transformers does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from efficientvlm.data.items import Box, Pixels, Region
from efficientvlm.errors import BadInput

FILE = "preprocessor_config.json"
MAX_PIXELS = 89_478_485  # Pillow's own warning threshold, here an error: such a file is a mistake or an attack
MAX_SIDE = 16_384
BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)
MARGIN = 7, 8
"""A picture that is to be cropped is larger than what the model reads in this proportion, as published: 256 for 224."""
SHARP = 2
"""Sides of a JPEG that is decoded at a reduced size are so many times those that it is scaled down to, at least."""

_SQUARE = {"height": 224, "width": 224}
_COMMON = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CLIP = {
    **_COMMON,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_SIGLIP = {**_COMMON, "size": _SQUARE, "default_to_square": False, "resample": BICUBIC, "image_mean": HALVES, "image_std": HALVES}
_BLIP = {**_SIGLIP, "size": {"height": 384, "width": 384}, "default_to_square": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_VIT = {**_SIGLIP, "default_to_square": True, "resample": BILINEAR}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "BlipImageProcessor": _BLIP,
    "BitImageProcessor": _CLIP,
    "ViTImageProcessor": _VIT,
}
"""Class of transformers → what holds where a file does not say it (or says null)."""

NAMES = ("image_processor_type", "feature_extractor_type")
SILENT = {*NAMES, *_CLIP, "processor_class", "do_convert_rgb", "do_pad", "pad_size", "data_format", "input_data_format", "return_tensors"}
SILENT |= {"device", "disable_grouping", "_valid_processor_keys"}


@dataclass(frozen=True)
class Preprocessing:
    """Picture to uint8 `[side, side, 3]`: resized, then cut out of the middle.

    `resize` is (height, width), the length of the shortest edge, or None; without `crop` what was resized has the `side` already.
    Training may ask for another form of the same, see :meth:`for_training`.
    """

    side: int
    resize: tuple[int, int] | int | None = None
    crop: bool = False
    resample: int = BICUBIC
    whole: bool = field(default=False, kw_only=True)
    """The picture keeps its aspect: its shortest edge has the `side`, and nothing is cut off."""
    reduced: bool = field(default=False, kw_only=True)
    """A large JPEG is decoded at a half, a quarter or an eighth of its size, still at least twice as large as it is to be."""

    @classmethod
    def squash(cls, side: int) -> Preprocessing:
        """To a square whatever the aspect, as X-VLM and BLIP are published."""
        return cls(side, (side, side))

    def for_training(self, augment: str) -> Preprocessing:
        """How pictures are prepared that `augment` then changes: for `crop` whole and somewhat larger, and where it crops at random exact
        pixels are not needed."""
        if augment == "crop":
            side = round(self.side * MARGIN[1] / MARGIN[0])
            return Preprocessing(side, side, False, self.resample, whole=True, reduced=True)
        return replace(self, reduced=True) if augment == "paper" else self

    def decoded(self, width: int, height: int) -> tuple[int, int] | None:
        """The least width and height at which a picture of that size may be decoded; None: its own."""
        if not self.reduced or self.resize is None:
            return None
        wide, high = self._resized(width, height)
        return SHARP * wide, SHARP * high

    def pixels(self, image: Image.Image, where: str) -> Pixels:
        """`image`, in mode RGB, as the model reads it.

        Raises:
            BadInput: it would become huge, or it has another size than the model reads where nothing resizes it; names `where`.
        """
        size = self._resized(image.width, image.height)
        if size[0] * size[1] > MAX_PIXELS:
            raise BadInput(where, f"with a shortest edge of {self.resize} it has {size[0]} x {size[1]} pixels", "crop it")
        if size != image.size:
            image = image.resize(size, self.resample)
        if self.crop:
            left, top = self._corner(size)
            image = image.crop((left, top, left + self.side, top + self.side))  # what lies outside is black, as there
        if not self.whole and image.size != (self.side, self.side):
            sizes = f"it has {image.width} x {image.height} pixels, the model reads {self.side} x {self.side}"
            why = f"{sizes} and its image processor resizes nothing"
            raise BadInput(where, why, f"resize it, or set do_resize in {FILE}")
        return np.array(image, dtype=np.uint8)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)

    def _corner(self, size: tuple[int, int]) -> tuple[int, int]:
        return (size[0] - self.side) // 2, (size[1] - self.side) // 2

    def placed(self, box: Box, width: int, height: int) -> Box | None:
        """A box of a picture of that size as fractions of what the model sees; None where it sees nothing of it."""
        if not self.crop:
            return box
        size = self._resized(width, height)
        spans = []
        for centre, length, whole, start in zip(box[:2], box[2:], size, self._corner(size), strict=True):
            low, high = (((centre + half * length) * whole - start) / self.side for half in (-0.5, 0.5))
            spans.append((min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)))
        (left, right), (top, bottom) = spans
        return ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top) if right > left and bottom > top else None

    def unplaced(self, point: tuple[float, float], width: int, height: int) -> list[float]:
        """A point of what the model sees (fractions) as fractions of a picture of that size; the other way round than :meth:`placed`."""
        if not self.crop:
            return list(point)
        size = self._resized(width, height)
        return [(part * self.side + start) / whole for part, start, whole in zip(point, self._corner(size), size, strict=True)]


def prepared(image: Image.Image, how: Preprocessing | int | None, where: str) -> Pixels:
    """Pixels of `image` (RGB): as `how` says, squeezed to a square of that side, or as they are."""
    if how is None:
        return np.array(image, dtype=np.uint8)
    return (Preprocessing.squash(how) if isinstance(how, int) else how).pixels(image, where)


def seen_regions(regions: Iterable[Region], how: Preprocessing | int | None, width: int, height: int) -> list[Region]:
    """Regions of a picture of that size, placed in what the model sees of it; those that it sees nothing of are left out."""
    if not isinstance(how, Preprocessing):
        return list(regions)
    placed = ((region, how.placed(region.box, width, height)) for region in regions)
    return [replace(region, box=box) for region, box in placed if box]


def side_of(how: Preprocessing | int | None) -> int | None:
    """Side of the pictures that `how` makes, if it says one."""
    return how.side if isinstance(how, Preprocessing) else how


def processor_of(settings: Mapping[str, Any], default: str | None, where: str) -> str:
    """The class of transformers that reads `settings`, which is `default` where they do not say it.

    Raises:
        BadInput: a class whose rules are not known here.
    """
    named = next((settings[name] for name in NAMES if settings.get(name)), default or "CLIPImageProcessor")
    kind = re.sub(r"(FeatureExtractor|ImageProcessor(Fast|Pil)?)$", "ImageProcessor", str(named))
    if kind not in PROCESSORS:
        raise BadInput(f"{where}: image processor {str(named)[:80]}", f"followed are {', '.join(PROCESSORS)}", "use one of these")
    return kind


def complete(settings: Mapping[str, Any], default: str | None, where: str) -> dict[str, Any]:
    """All settings of the image processor: what is missing as its class has it, and so what is null, but that a switch is off then."""
    given = {name: False if value is None and name.startswith("do_") else value for name, value in settings.items()}
    return PROCESSORS[processor_of(settings, default, where)] | {name: value for name, value in given.items() if value is not None}


def read(settings: Mapping[str, Any], side: int, where: str, default: str | None = None) -> Preprocessing:
    """What `settings` do with the form of a picture, for a model that reads squares of `side`.

    Args:
        default: the class of transformers that reads them where they do not name one.

    Raises:
        BadInput: what is not followed here, or pictures of another size than the model reads.
    """
    given = complete(settings, default, where)
    for name in ("do_pad", "use_square_size"):
        if given.get(name):
            raise BadInput(f"{where}: {name}", "it is not followed here", "prepare the pictures without it")
    resize = _size(given, "size", given["default_to_square"], where) if given["do_resize"] else None
    crop = _size(given, "crop_size", True, where) if given["do_center_crop"] else None
    resample = given["resample"]
    if type(resample) is not int or resample not in set(Image.Resampling):
        raise BadInput(f"{where}: resample is {str(resample)[:80]}", "Pillow has no such filter", "correct it there")
    target = crop or resize
    if isinstance(target, int):
        why = "without a centre crop pictures keep their aspect, and the model reads squares"
        raise BadInput(f"{where}: size is a shortest edge of {target}", why, "set do_center_crop, or height and width in size")
    if target not in (None, (side, side)):
        why = f"its pictures are {target[0]} x {target[1]}, the model reads {side} x {side}"
        raise BadInput(f"{where} is of another model", why, f"correct {'crop_size' if crop else 'size'} there")
    return Preprocessing(side, resize, crop is not None, resample)


def statistics(settings: Mapping[str, Any], where: str, default: str | None = None) -> tuple[Any, Any]:
    """Mean and deviation by which (pixels / 255) are normalised as `settings` say, whatever their scale; unchecked numbers if it is usual.

    Raises:
        BadInput: a scale that is no positive number.
    """
    given = complete(settings, default, where)
    factor = given["rescale_factor"] if given["do_rescale"] else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e30:
        raise BadInput(f"{where}: rescale_factor is {str(factor)[:80]!r}", "it multiplies the pixels: a number above 0", "correct it there")
    mean: Any = given["image_mean"] if given["do_normalize"] else (0.0, 0.0, 0.0)
    std: Any = given["image_std"] if given["do_normalize"] else (1.0, 1.0, 1.0)
    mean, std = ([value] * 3 if isinstance(value, int | float) and not isinstance(value, bool) else value for value in (mean, std))
    scale = 255 * factor
    if abs(scale - 1) < 1e-6 or not all(_numbers(values) for values in (mean, std)):
        return mean, std
    return [value / scale for value in mean], [value / scale for value in std]


def unfollowed(settings: Mapping[str, Any]) -> list[str]:
    """Settings that neither transformers' class nor this package follows."""
    return sorted(name for name, value in settings.items() if name not in SILENT and value not in (None, False))


def _size(given: Mapping[str, Any], name: str, square: bool, where: str) -> tuple[int, int] | int:
    """(height, width), or the shortest edge."""
    size = given.get(name)
    numbers: list[Any] = [size]
    if isinstance(size, list | tuple):
        square, numbers = True, [*size]
    elif isinstance(size, dict) and set(size) == {"height", "width"}:
        square, numbers = True, [size["height"], size["width"]]
    elif isinstance(size, dict) and set(size) == {"shortest_edge"} and name == "size":
        square, numbers = False, [size["shortest_edge"]]
    elif square:
        numbers = [size, size]
    if len(numbers) != 1 + square or not all(type(number) is int and 1 <= number <= MAX_SIDE for number in numbers):
        why = f"followed are height and width{', shortest_edge' if name == 'size' else ''} and one number, of 1 to {MAX_SIDE}"
        raise BadInput(f"{where}: {name} is {str(size)[:80]}", why, "correct it there")
    return (numbers[0], numbers[1]) if square else int(numbers[0])


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
