"""Scenes of coloured shapes: what is in them (sampled from a difficulty) and their pixels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientvlm.data.items import Box, Pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "orange": (255, 140, 0),
    "purple": (128, 0, 200),
    "pink": (255, 110, 190),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "rectangle", "triangle", "diamond", "cross", "ring")
SMALLEST = 0.08  # of the side, however crowded
CONTRAST = 150  # least sum of channel differences between a shape and the background


@dataclass(frozen=True)
class Difficulty:
    """What a scene may hold; sizes are fractions of the image side."""

    objects: tuple[int, int]
    colours: int
    shapes: int
    size: tuple[float, float]
    darkest: int  # of a pale background's channels
    dark: float  # chance of a dark background
    jitter: int  # of a shape's colour, each channel
    noise: float  # standard deviation of pixel noise
    similar: float  # chance that a shape shares colour or form with an earlier one


LEVELS: dict[int, Difficulty] = {
    1: Difficulty((1, 1), 4, 3, (0.30, 0.55), 230, 0.0, 0, 0.0, 0.0),
    2: Difficulty((1, 1), 8, 3, (0.13, 0.55), 225, 0.0, 12, 0.0, 0.0),
    3: Difficulty((1, 3), 8, 3, (0.13, 0.50), 215, 0.1, 16, 2.0, 0.2),
    4: Difficulty((2, 5), 11, 4, (0.12, 0.36), 200, 0.3, 24, 4.0, 0.4),
    5: Difficulty((3, 7), 12, 6, (0.11, 0.30), 180, 0.5, 28, 8.0, 0.6),
}


def compositions(level: Difficulty) -> list[tuple[str, str]]:
    """All colours with all forms, each colour once with a form of its own, then once with the next one, and so on.

    However many are taken from the beginning, colours and forms occur in them, and in the rest, about equally often.
    """
    colours = list(COLOURS)[: level.colours]
    return [(colour, SHAPES[(number + turn) % level.shapes]) for turn in range(level.shapes) for number, colour in enumerate(colours)]


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; centre, width and height are fractions of the image."""

    colour: str
    shape: str
    x: float
    y: float
    width: float
    height: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> Box:
        return (self.x, self.y, self.width, self.height)


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    noise: float


def sample(
    rng: np.random.Generator,
    level: Difficulty,
    objects: tuple[int, int] | None = None,
    alike: int = 0,
    kinds: Sequence[tuple[str, str]] = (),
    among: Collection[tuple[str, str]] | None = None,
) -> Scene:
    """A scene of `level`; no two shapes overlap. A crowded scene gets smaller shapes rather than fewer.

    The first `alike` shapes share a colour; or all are of `kinds`, colours and forms, which some background has to go with. With `among`
    no other kinds than these occur.
    """
    least, most = objects or level.objects
    count = len(kinds) or least + int(rng.random() * (most - least + 1))
    background = _background(rng, level)
    while any(_contrast(COLOURS[colour], background) < CONTRAST for colour, _ in kinds) or not _shows(background, among):
        background = _background(rng, level)
    colours = [name for name in list(COLOURS)[: level.colours] if _contrast(COLOURS[name], background) >= CONTRAST]
    shapes = SHAPES[: level.shapes]
    things: list[Thing] = []
    smallest, largest = level.size
    if count > 1:
        largest = max(smallest, min(largest, 1.1 / count**0.5))
    while len(things) < count:
        colour, shape = kinds[len(things)] if kinds else _kind(rng, level, things, colours, shapes)
        if 0 < len(things) < alike:
            colour = things[0].colour
        if among is not None and (colour, shape) not in among:
            continue
        rgb = _jittered(rng, COLOURS[colour], level.jitter)
        for attempt in range(100):
            shrink = 0.95 ** max(0, attempt - 11)
            low = max(min(smallest, SMALLEST), smallest * shrink)
            width, height = _extent(rng, shape, low, max(low, largest * shrink))
            draw = rng.random(2)
            x, y = width / 2 + draw[0] * (1 - width), height / 2 + draw[1] * (1 - height)
            if all(_apart(x, y, width, height, other) for other in things):
                break
        else:
            break  # no room left, which is rare: what is said follows what is there
        things.append(Thing(colour, shape, float(x), float(y), width, height, rgb))
    return Scene(tuple(things), background, level.noise * float(rng.random()))


def draw(scene: Scene, side: int, rng: np.random.Generator) -> Pixels:
    """Pixels `[side, side, 3]` with smooth edges; `rng` makes the pixel noise."""
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = scene.background
    for thing in scene.things:
        half_width, half_height = thing.width * side / 2, thing.height * side / 2
        left, top = int(max(0, thing.x * side - half_width - 1)), int(max(0, thing.y * side - half_height - 1))
        right, bottom = int(min(side, thing.x * side + half_width + 2)), int(min(side, thing.y * side + half_height + 2))
        dx = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - thing.x * side)
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - thing.y * side)
        cover = (0.5 - _distance(thing.shape, dx, dy, half_width, half_height)).clip(0, 1)[:, :, None]
        patch = canvas[top:bottom, left:right]
        patch += cover * (np.array(thing.rgb, np.float32) - patch)
    if scene.noise > 0:
        canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(scene.noise)
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def _distance(shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], a: float, b: float) -> NDArray[np.floating[Any]]:
    """Signed distance in pixels to the edge (exact or nearly so), negative inside; a, b are half width and height."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - a
    if shape == "ring":
        return np.abs(np.sqrt(dx * dx + dy * dy) - 0.74 * a) - 0.26 * a
    ax = np.abs(dx)
    if shape == "triangle":  # apex up
        slope = (4 * b * b + a * a) ** 0.5
        return np.maximum((2 * b * ax - a * (dy + b)) / slope, dy - b)
    ay = np.abs(dy)
    if shape == "rectangle":
        return np.maximum(ax - a, ay - b)
    if shape == "diamond":
        return (b * ax + a * ay - a * b) / (a * a + b * b) ** 0.5
    return np.maximum(np.minimum(ax - 0.36 * a, ay - 0.36 * b), np.maximum(ax - a, ay - b))  # cross


def _background(rng: np.random.Generator, level: Difficulty) -> tuple[int, int, int]:
    dark = rng.random() < level.dark
    channels = rng.random(3)
    values = channels * 90 if dark else level.darkest + channels * (256 - level.darkest)
    return (int(values[0]), int(values[1]), int(values[2]))


def _shows(background: tuple[int, int, int], among: Collection[tuple[str, str]] | None) -> bool:
    """Whether a shape of some kind can be seen in front of it."""
    return among is None or any(_contrast(COLOURS[colour], background) >= CONTRAST for colour, _ in among)


def _contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> int:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def _kind(rng: np.random.Generator, level: Difficulty, things: list[Thing], colours: list[str], shapes: tuple[str, ...]) -> tuple[str, str]:
    draws = rng.random(5)
    colour, shape = colours[int(draws[0] * len(colours))], shapes[int(draws[1] * len(shapes))]
    if things and draws[2] < level.similar:
        other = things[int(draws[3] * len(things))]
        if draws[4] < 0.5:
            colour = other.colour
        else:
            shape = other.shape
    return colour, shape


def _jittered(rng: np.random.Generator, rgb: tuple[int, int, int], reach: int) -> tuple[int, int, int]:
    draws = rng.random(4)
    if not reach or draws[3] < 0.5:  # half of the shapes have the pure colour
        return rgb
    red, green, blue = (min(255, max(0, round(value + (2 * draw - 1) * reach))) for value, draw in zip(rgb, draws[:3], strict=True))
    return (red, green, blue)


def _extent(rng: np.random.Generator, shape: str, low: float, high: float) -> tuple[float, float]:
    draws = rng.random(2)
    width = float(low + draws[0] * (high - low))
    if shape == "rectangle":
        return width, float(low + draws[1] * (high - low))
    return width, width * 0.88 if shape == "triangle" else width


def _apart(x: float, y: float, width: float, height: float, other: Thing) -> bool:
    gap = 0.03
    return abs(x - other.x) > (width + other.width) / 2 + gap or abs(y - other.y) > (height + other.height) / 2 + gap
