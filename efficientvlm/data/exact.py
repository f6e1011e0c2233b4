"""What is said of scenes so that it takes every picture to judge it: captions of one content in several wordings, balanced statements."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from efficientvlm.data.phrases import SIDES, amount, background_name, joined, kind, named, number, pick, place_name
from efficientvlm.data.scenes import COLOURS, SHAPES, Difficulty, Scene, Thing

SAME = ("both images contain {} or neither does", "the images agree about {}")
OTHER = ("exactly one image contains {}", "one image contains {} and the other does not")
SAME_NUMBER = ("both images contain the same number of shapes", "there are as many shapes in the left image as in the right image")
OTHER_NUMBER = ("the images contain different numbers of shapes", "there are not as many shapes in the left image as in the right image")
FORMS = (*SAME, *OTHER, *SAME_NUMBER, *OTHER_NUMBER)
COUNTED = 0.25  # of the statements are about how many shapes there are


def captions(scene: Scene) -> list[str]:
    """Five wordings of one content: every shape, from left to right, with its place and what is behind."""
    order = sorted(scene.things, key=lambda thing: thing.x)
    kinds = [named(kind(thing)) for thing in order]
    placed = [f"{named(kind(thing))} at the {place_name(thing)}" for thing in order]
    ground = f"{background_name(scene.background)} background"
    chain = "".join(f" {_beside(a, b)} {named(kind(b))}" for a, b in pairwise(order))
    return [
        f"from left to right {joined(kinds)} on a {ground}",
        f"there is {joined(placed)}",
        f"{kinds[0]}{chain} on a {ground}",
        f"{amount(len(order), 'shape')} on a {ground}, {joined(placed)}",
        f"the {ground} is behind {joined(placed)}",
    ]


def _beside(first: Thing, second: Thing) -> str:
    """Where `second`, which lies further right, is seen from `first`, as the word between them."""
    return next((name for name in ("above", "below", "left of") if SIDES[name](first, second)), "beside")


def about_two(
    rng: np.random.Generator, level: Difficulty, objects: tuple[int, int], drawn: Callable[[tuple[int, int]], Scene]
) -> tuple[Scene, Scene, str, bool]:
    """Two scenes, a statement about both, and whether it is true.

    What it is about, whether the left image has it and whether it is true are drawn first, each for itself; the right image follows. So
    neither the text, nor the text with one image, tells anything: each of them goes as often with a true statement as with a false one.

    Args:
        drawn: a scene of so many shapes.
    """
    label, stated = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    agree = stated == label
    if objects[0] < objects[1] and rng.random() < COUNTED:
        counts = range(objects[0], objects[1] + 1)
        left = counts[int(rng.integers(len(counts)))]
        others = [count for count in counts if count != left]
        right = left if agree else others[int(rng.integers(len(others)))]
        text = pick(rng, SAME_NUMBER if stated else OTHER_NUMBER)
        return _found(drawn, (left, left), "shape", left), _found(drawn, (right, right), "shape", right), text, label
    colour, shape = pick(rng, list(COLOURS)[: level.colours]), pick(rng, SHAPES[: level.shapes])
    noun = pick(rng, (f"{colour} {shape}", shape, f"{colour} shape"))
    has = bool(rng.random() < 0.5)
    text = pick(rng, SAME if stated else OTHER).format(named(noun))
    return _found(drawn, objects, noun, has), _found(drawn, objects, noun, has == agree), text, label


def _found(drawn: Callable[[tuple[int, int]], Scene], objects: tuple[int, int], noun: str, wanted: int) -> Scene:
    """The first scene drawn that has `wanted` shapes, or that has a `noun` or has none as `wanted` says."""
    while True:
        scene = drawn(objects)
        if (len(scene.things) if noun == "shape" else number(scene, noun) > 0) == wanted:
            return scene
