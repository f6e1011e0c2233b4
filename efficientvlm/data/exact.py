"""What is said of scenes so that it takes every picture to judge it: captions of one content in several wordings, balanced statements."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from efficientvlm.data.phrases import SIDES, amount, background_name, joined, kind, named, pick, place_name
from efficientvlm.data.scenes import COLOURS, SHAPES, Difficulty, Scene, Thing, sample

SAME = ("both images contain {} or neither does", "the images agree about {}")
OTHER = ("exactly one image contains {}", "one image contains {} and the other does not")
ONE = ("the {side} image contains {}", "there is no {noun} in the {side} image")
FORMS = (*SAME, *OTHER, *ONE)
BOTH, EASED, ONE_ALONE = 1, 2, 3  # what statements are about
PRESENT = 2  # of twice as many colours that are asked about


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
    rng: np.random.Generator, level: Difficulty, objects: tuple[int, int], alike: int, about: int = BOTH
) -> tuple[Scene, Scene, list[tuple[str, bool]]]:
    """Two scenes, and statements about both with their truth: about some colours, and about two forms.

    Half of the colours and forms that are asked about are in the left image, and half in the right one, each drawn for itself. What is
    stated is drawn too. So neither the text, nor the text with one image, tells anything about one of the statements: each of them goes as
    often with a true as with a false one. `about` is BOTH; EASED, which has as many statements about one of the images beside them, to
    begin with; or ONE_ALONE, which has such that affirm something of one image, and no others.
    """
    present = 1 if alike else min(PRESENT, objects[0])
    known = list(COLOURS)[: level.colours]
    colours = [known[at] for at in rng.permutation(len(known))[: 2 * present]]
    shapes = [SHAPES[at] for at in rng.permutation(level.shapes)[:2]]
    scenes, there = [], []
    for _ in range(2):
        some = [colours[at] for at in rng.permutation(len(colours))[:present]]
        shape = shapes[int(rng.integers(2))]
        count = int(rng.integers(objects[0], objects[1] + 1))
        free = [colour for colour in known if colour not in colours or colour in some]
        painted = [*some, *some[:1] * (alike - 1)]
        painted += [pick(rng, free) for _ in range(count - len(painted))]
        others = [other for other in SHAPES[: level.shapes] if other not in shapes or other == shape]
        formed = [shape, *(pick(rng, others) for _ in range(len(painted) - 1))]
        scenes.append(_scene(rng, level, list(zip(painted, (formed[at] for at in rng.permutation(len(formed))), strict=True))))
        there.append({shape, *(f"{colour} shape" for colour in some)})
    said = []
    for noun in (*(f"{colour} shape" for colour in colours), *shapes):
        if about != ONE_ALONE:
            stated = bool(rng.random() < 0.5)
            agree = (noun in there[0]) == (noun in there[1])
            said.append((pick(rng, SAME if stated else OTHER).format(named(noun)), stated == agree))
        if about != BOTH:
            side, stated = int(rng.integers(2)), about == ONE_ALONE or bool(rng.random() < 0.5)
            text = ONE[1 - stated].format(named(noun), noun=noun, side=("left", "right")[side])
            said.append((text, stated == (noun in there[side])))
    return scenes[0], scenes[1], said


def _scene(rng: np.random.Generator, level: Difficulty, kinds: list[tuple[str, str]]) -> Scene:
    """A scene that has room for all of `kinds`, one after another in any order."""
    while True:
        scene = sample(rng, level, kinds=[kinds[at] for at in rng.permutation(len(kinds))])
        if len(scene.things) == len(kinds):
            return scene
