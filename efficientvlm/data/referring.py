"""Phrases about a scene of shapes, each of which means one shape of it and no other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from efficientvlm.data.items import Region
from efficientvlm.data.phrases import SIDES, kind
from efficientvlm.data.scenes import Scene, Thing

LEAST = 0.05  # of the side, by which a shape lies further out than the next of its kind
LARGER = 1.25  # by which its extent is larger than that of the next
ENDS = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}


def expressions(scene: Scene, rng: np.random.Generator) -> list[Region]:
    """A phrase for every shape that one can be found for, by what tells it from the others: its kind, its form, its colour, how large it is
    or where it lies among those of its kind, or which other shape it is beside of."""
    found = []
    for thing in scene.things:
        said = list(dict.fromkeys(_phrases(scene, thing)))
        if said:
            found.append(Region(f"the {said[int(rng.integers(len(said)))]}", thing.box))
    return found


def _phrases(scene: Scene, thing: Thing) -> Iterator[str]:
    """Every phrase that means `thing` alone, the shorter ones first."""
    for name, matching in _groups(scene, thing):
        if len(matching) == 1:
            yield name
        else:
            yield from (f"{word} {name}" for word in _superlatives(thing, matching))
    for other in scene.things:
        named = [name for name, matching in _groups(scene, other) if len(matching) == 1]
        if other is thing or not named:
            continue
        for name, matching in _groups(scene, thing):
            for relation, holds in SIDES.items():
                if len(matching) > 1 and [one for one in matching if one is not other and holds(one, other)] == [thing]:
                    yield f"{name} {relation} the {named[0]}"


def _groups(scene: Scene, thing: Thing) -> Iterator[tuple[str, list[Thing]]]:
    """What `thing` may be called, and all shapes that are called so."""
    yield kind(thing), [one for one in scene.things if kind(one) == kind(thing)]
    yield thing.shape, [one for one in scene.things if one.shape == thing.shape]
    yield f"{thing.colour} shape", [one for one in scene.things if one.colour == thing.colour]


def _superlatives(thing: Thing, matching: list[Thing]) -> Iterator[str]:
    others = [one for one in matching if one is not thing]
    for word, (axis, sign) in ENDS.items():
        place = [(one.x, one.y)[axis] * sign for one in (thing, *others)]
        if place[0] > max(place[1:]) + LEAST:
            yield word
    extent = [(one.width * one.height) ** 0.5 for one in (thing, *others)]
    if extent[0] > LARGER * max(extent[1:]):
        yield "largest" if len(others) > 1 else "larger"
    if extent[0] * LARGER < min(extent[1:]):
        yield "smallest" if len(others) > 1 else "smaller"
