"""What can be said and asked about a scene of shapes: captions, regions, questions, statements about two scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from efficientvlm.data.items import Question, Region
from efficientvlm.data.scenes import COLOURS, SHAPES, Difficulty, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.x + a.width / 2 < b.x - b.width / 2,
    "right of": lambda a, b: a.x - a.width / 2 > b.x + b.width / 2,
    "above": lambda a, b: a.y + a.height / 2 < b.y - b.height / 2,
    "below": lambda a, b: a.y - a.height / 2 > b.y + b.height / 2,
}
COLOUR_FORMS = ("what color is the {}?", "what is the color of the {}?")
SHAPE_FORMS = ("what shape is present?", "what shape does the image contain?", "what shape is in the image?")
PRESENT_FORMS = ("is there {a} {}?", "is there {a} {} in the image?", "is {a} {} present?", "does the image contain {a} {}?")
ABSENT_FORMS = ("is there not {a} {}?", "is there not {a} {} in the image?", "is no {} present?", "does the image not contain {a} {}?")


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def named(noun: str) -> str:
    """`noun` with its article."""
    return f"{article(noun)} {noun}"


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def background_name(rgb: tuple[int, int, int]) -> str:
    """white, light or dark gray, black, or a pale or dark hue."""
    low, high = min(rgb), max(rgb)
    pale = high > 140
    if high - low < 9:
        return ("white" if low > 243 else "light gray") if pale else ("black" if high < 40 else "dark gray")
    red, green, blue = ((value - low) / (high - low) > 0.5 for value in rgb)
    hue = {
        (True, False, False): "red",
        (True, True, False): "yellow",
        (False, True, False): "green",
        (False, True, True): "cyan",
        (False, False, True): "blue",
        (True, False, True): "magenta",
    }[red, green, blue]
    return f"{'pale' if pale else 'dark'} {hue}"


def size_name(thing: Thing) -> str:
    extent = (thing.width * thing.height) ** 0.5
    return "small" if extent < 0.22 else "large" if extent > 0.38 else "medium"


def place_name(thing: Thing) -> str:
    """Where the centre lies in a 3 by 3 grid."""
    column, row = min(2, int(thing.x * 3)), min(2, int(thing.y * 3))
    vertical, horizontal = ("top", "", "bottom")[row], ("left", "", "right")[column]
    return " ".join(filter(None, (vertical, horizontal))) or "center"


def kind(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def amount(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def related(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Every true relation between two shapes of different kinds that are the only ones of their kind."""
    kinds = Counter(map(kind, scene.things))
    single = [thing for thing in scene.things if kinds[kind(thing)] == 1]
    return [(a, name, b) for a, b in permutations(single, 2) for name, holds in SIDES.items() if holds(a, b)]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Four sentences, each telling enough to know the scene among many others."""
    ground = f"on a {background_name(scene.background)} background"
    if len(scene.things) == 1:
        thing = scene.things[0]
        size, place = size_name(thing), place_name(thing)
        absent = _absent(scene, rng)
        return [
            f"a {size} {kind(thing)} at the {place} {ground}",
            f"the image contains a {size} {thing.shape} at the {place}, the color of the shape is {thing.colour}, {ground}",
            f"there is {named(kind(thing))} at the {place} and there is not {named(absent)} in the image, "
            f"the background is {background_name(scene.background)}",
            f"the shape in the image is a {size} {thing.shape}, its color is {thing.colour}, no {absent} is present, it is at the {place}",
        ]
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    listed = [f"{named(kind(thing))} at the {place_name(thing)}" for thing in order]
    plain = sorted(Counter(map(kind, scene.things)).items())
    counted = joined([amount(count, name) for name, count in plain])
    relations = related(scene)
    first = f"{joined(listed)} {ground}"
    if relations:
        chosen = [relations[i] for i in rng.permutation(len(relations))[:2]]
        second = " and ".join(f"{named(kind(a))} {name} {named(kind(b))}" for a, name, b in chosen) + f" {ground}"
    else:
        second = f"{joined(listed[::-1])} in the image"
    return [
        first,
        second,
        f"there are {amount(len(order), 'shape')} {ground}: {counted}",
        f"the image contains {joined(listed)} and no {_absent(scene, rng)}",
    ]


def regions(scene: Scene, rng: np.random.Generator) -> list[Region]:
    """One region a shape; shapes of the same kind are told apart by place or size where possible."""
    found = []
    for thing in scene.things:
        form = rng.random()
        phrase = f"{size_name(thing)} {kind(thing)}" if form < 0.6 else kind(thing)
        found.append(Region(f"{named(phrase)}" if form < 0.8 else f"{named(phrase)} at the {place_name(thing)}", thing.box))
    return found


def questions(scene: Scene, rng: np.random.Generator, level: Difficulty, count: int) -> list[Question]:
    """`count` different questions; where the scene has one shape, those of easy-VQA in its words."""
    makers = _SINGLE if len(scene.things) == 1 else _MULTIPLE
    shares = np.cumsum([share for share, _ in makers])
    asked: dict[str, Question] = {}
    for _ in range(6 * count):
        maker = makers[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))][1]
        question = maker(scene, rng, level)
        if question is not None:
            asked.setdefault(question[0], Question(question[0], [(question[1], 1.0)]))
            if len(asked) == count:
                break
    return list(asked.values())


Asked = tuple[str, str] | None


def _ask_colour(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    thing = scene.things[int(rng.random() * len(scene.things))]
    if len(scene.things) == 1:
        return pick(rng, COLOUR_FORMS).format("shape" if rng.random() < 0.5 else thing.shape), thing.colour
    if sum(other.shape == thing.shape for other in scene.things) > 1:
        return None
    return pick(rng, COLOUR_FORMS).format(thing.shape), thing.colour


def _ask_shape(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    thing = scene.things[int(rng.random() * len(scene.things))]
    if len(scene.things) == 1 and rng.random() < 0.76:
        return pick(rng, SHAPE_FORMS), thing.shape
    if sum(other.colour == thing.colour for other in scene.things) > 1:
        return None
    return f"what is the {thing.colour} shape?", thing.shape


def _ask_presence(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    thing = scene.things[int(rng.random() * len(scene.things))]
    what = rng.random()
    present = rng.random() < (0.35 if len(scene.things) == 1 else 0.5)
    if what < 0.6:
        noun = f"{thing.colour if present else pick(rng, list(COLOURS)[: level.colours])} shape"
        there = any(f"{other.colour} shape" == noun for other in scene.things)
    elif what < 0.85 or len(scene.things) == 1:
        noun = thing.shape if present else pick(rng, SHAPES[: level.shapes])
        there = any(other.shape == noun for other in scene.things)
    else:
        noun = kind(thing) if present else f"{thing.colour} {pick(rng, SHAPES[: level.shapes])}"
        there = any(kind(other) == noun for other in scene.things)
    positive = rng.random() < 0.5
    form = pick(rng, PRESENT_FORMS if positive else ABSENT_FORMS)
    return form.format(noun, a=article(noun)), "yes" if there == positive else "no"


def _ask_count(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    thing = scene.things[int(rng.random() * len(scene.things))]
    nouns = ("shape", thing.shape, f"{thing.colour} shape", pick(rng, SHAPES[: level.shapes]))
    noun = pick(rng, nouns)
    total = sum(noun in ("shape", other.shape, f"{other.colour} shape") for other in scene.things)
    form = pick(rng, ("how many {} are there?", "how many {} are in the image?"))
    return form.format(plural(noun)), str(total)


def _ask_relation(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    relations = related(scene)
    if not relations:
        return None
    a, name, b = relations[int(rng.random() * len(relations))]
    if rng.random() < 0.5:
        return f"is the {kind(a)} {name} the {kind(b)}?", "yes"
    if rng.random() < 0.5:
        a, b = b, a
    else:
        name = pick(rng, [other for other, holds in SIDES.items() if not holds(a, b)])
    return f"is the {kind(a)} {name} the {kind(b)}?", "no"


def _ask_other(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    if len(scene.things) != 2:
        return None
    relations = related(scene)
    if not relations:
        return None
    a, name, b = relations[int(rng.random() * len(relations))]
    if rng.random() < 0.5:
        return f"what color is the shape {name} the {kind(b)}?", a.colour
    return f"what shape is {name} the {kind(b)}?", a.shape


def _ask_background(scene: Scene, rng: np.random.Generator, level: Difficulty) -> Asked:
    return "what color is the background?", background_name(scene.background)


Maker = Callable[[Scene, np.random.Generator, Difficulty], Asked]
_SINGLE: tuple[tuple[float, Maker], ...] = ((0.6, _ask_presence), (0.2, _ask_colour), (0.2, _ask_shape))
_MULTIPLE: tuple[tuple[float, Maker], ...] = (
    (0.34, _ask_presence),
    (0.12, _ask_colour),
    (0.12, _ask_shape),
    (0.16, _ask_count),
    (0.14, _ask_relation),
    (0.07, _ask_other),
    (0.05, _ask_background),
)


STATEMENTS = ("both", "at least one", "exactly one", "neither", "left", "right", "more", "fewer", "total")
NOUNS = ("kind", "shape", "colour")


def statement(form: str, noun: str, left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A statement of one of the forms in `STATEMENTS` about `noun` in two scenes, and whether it is true."""
    in_left, in_right = number(left, noun), number(right, noun)
    if form == "both":
        return f"both images contain {named(noun)}", in_left > 0 and in_right > 0
    if form == "at least one":
        return f"at least one image contains {named(noun)}", in_left > 0 or in_right > 0
    if form == "exactly one":
        return f"exactly one image contains {named(noun)}", (in_left > 0) != (in_right > 0)
    if form == "neither":
        return f"neither image contains {named(noun)}", in_left == in_right == 0
    if form in ("left", "right"):
        return f"the {form} image contains {named(noun)}", (in_left if form == "left" else in_right) > 0
    if form in ("more", "fewer"):
        return (
            f"the left image has {form} {plural(noun)} than the right image",
            in_left > in_right if form == "more" else in_left < in_right,
        )
    total = min(len(NUMBERS) - 1, max(0, in_left + in_right + int(rng.integers(-1, 2))))
    return f"there {'is' if total == 1 else 'are'} {amount(total, noun)} in total", in_left + in_right == total


def noun_for(what: str, left: Scene, right: Scene, rng: np.random.Generator, level: Difficulty) -> str:
    """A `kind`, `shape` or `colour` to speak of: half of the time one that is there."""
    things = left.things + right.things
    there = rng.random() < 0.5
    thing = things[int(rng.random() * len(things))]
    colour = thing.colour if there else pick(rng, list(COLOURS)[: level.colours])
    shape = thing.shape if there else pick(rng, SHAPES[: level.shapes])
    return {"kind": f"{colour} {shape}", "shape": shape, "colour": f"{colour} shape"}[what]


def number(scene: Scene, noun: str) -> int:
    """How many shapes of `scene` are a `noun`: a kind, a form or a shape of a colour."""
    return sum(noun in (kind(thing), thing.shape, f"{thing.colour} shape") for thing in scene.things)


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """A form or coloured shape that is not there."""
    if rng.random() < 0.4:
        forms = [shape for shape in SHAPES[:3] if all(thing.shape != shape for thing in scene.things)]
        if forms:
            return pick(rng, forms)
    return pick(rng, [f"{colour} shape" for colour in COLOURS if all(thing.colour != colour for thing in scene.things)])


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
