"""`shapes`, our generator of coloured shapes: pictures with captions and boxes, questions, two-image statements; endless, without files."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from efficientvlm.data import exact, phrases
from efficientvlm.data.draw import generator
from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing, side_of
from efficientvlm.data.scenes import LEVELS, Difficulty, Scene, compositions, draw, sample
from efficientvlm.errors import BadInput

VERSION = 1  # of the generated content: raise it when any item changes
DEFAULT_SIZE = 64
MOST_OBJECTS = 9
SAMPLED_TEXTS = 5000
QUESTIONS = 10
HIDDEN = ("all", "left", "right")
NEWER = ("alike", "exact", "hide", "without", "only")
"""Settings that fingerprints are older than."""
LATEST = ("without", "only")
"""Those that names of origins are older than."""
GRAY = 128

NUMBERS = {
    "seed": (0, 2**63 - 1),
    "difficulty": (min(LEVELS), max(LEVELS)),
    "size": (1, 10**9),
    "alike": (0, MOST_OBJECTS),
    "exact": (0, exact.ONE_ALONE),
    "without": (0, 10**9),
    "only": (0, 10**9),
}
"""The least and the most that can be said for a setting."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What `shapes:key=value,...` can say.

    Attributes:
        seed: another seed is another data set.
        difficulty: 1 (one large shape, four colours) to 5 (up to seven small ones of six forms, look-alikes, noise). Levels 2 and 3 cover
            the pictures of easy-VQA.
        size: images of the training split; the other splits have a tenth of it.
        objects: least and most shapes; by default what the difficulty says.
        alike: so many shapes of a scene share a colour, so that it alone does not tell which one is meant.
        exact: 1: captions are five wordings of one content, statements are such that it takes both pictures to judge them, see `exact.py`;
            2: there are statements about one of two pictures beside them, to begin with; 3: there are only such, which affirm something.
        hide: pictures that are painted gray, to measure what a model does without them: all, or the left or the right of two.
        without: so many compositions, colours with forms, occur in no scene, and are named in no caption; always the same ones, so that
            every colour and every form is left.
        only: likewise nothing but these.
    """

    seed: int = 0
    difficulty: int = 3
    size: int = 20_000
    objects: tuple[int, int] | None = None
    alike: int = field(default=0, repr=False)  # fingerprints are older than what follows
    exact: int = field(default=0, repr=False)
    hide: str = field(default="", repr=False)
    without: int = field(default=0, repr=False)
    only: int = field(default=0, repr=False)

    @property
    def level(self) -> Difficulty:
        return LEVELS[self.difficulty]

    @property
    def counts(self) -> tuple[int, int]:
        """Least and most shapes of a scene."""
        return self.objects or self.level.objects

    @property
    def among(self) -> frozenset[tuple[str, str]] | None:
        """The compositions that occur; None where all do."""
        if not (self.without or self.only):
            return None
        return frozenset(compositions(self.level)[self.without : self.only or None])


def parse(spec: str) -> Settings:
    """Settings in `shapes` or `shapes:key=value,key=value`.

    Raises:
        BadInput: an unknown key (names the nearest), or a value out of range.
    """
    _, _, rest = spec.partition(":")
    settings = Settings()
    known = [each.name for each in fields(Settings)]
    for part in filter(None, (text.strip() for text in rest.split(","))):
        key, _, text = part.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise BadInput(f"data {spec}", f"unknown key {key}", f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}")
        if key == "objects":
            value: Any = _range(spec, key, text)
        elif key == "hide":
            value = text
            if text not in HIDDEN:
                raise BadInput(f"data {spec}", f"hide={text} names no pictures", f"use {', '.join(HIDDEN)}")
        else:
            value = _number(spec, key, text, *NUMBERS[key])
        settings = replace(settings, **{key: value})
    if settings.alike > settings.counts[0]:
        why = f"alike={settings.alike} of a scene's shapes share a colour, but it may have {settings.counts[0]} only"
        raise BadInput(f"data {spec}", why, f"write objects={settings.alike}-{max(settings.alike, settings.counts[1])}")
    check_compositions(spec, settings)
    return settings


def check_compositions(spec: str, settings: Settings) -> None:
    """:class:`BadInput` where `without` and `only` leave a colour or a form out, or contradict each other."""
    if settings.without and settings.only:
        raise BadInput(f"data {spec}", "without and only cannot both be asked for", "leave one of them out")
    level = settings.level
    most = level.colours * (level.shapes - 1)
    if settings.without > most:
        why = f"difficulty {settings.difficulty} has {level.colours} colours with {level.shapes} forms, and each of them is to be left"
        raise BadInput(f"data {spec}", f"without={settings.without}: {why}", f"use {most} at most")
    if settings.only > level.colours * level.shapes:
        why = f"difficulty {settings.difficulty} has {level.colours} colours with {level.shapes} forms"
        raise BadInput(f"data {spec}", f"only={settings.only}: {why}", f"use {level.colours * level.shapes} at most")


class Shapes(Generic[T]):
    """One split as samples of one kind; the one at `i` depends on the settings, the split and `i` only.

    Pairs and questions with the same index show the same picture.
    """

    licence = "Apache-2.0"

    def __init__(
        self,
        kind: Kind[T, Any],
        split: str,
        settings: Settings | None = None,
        *,
        image_size: Preprocessing | int | None = None,
        spec: str = "shapes",
    ) -> None:
        if split not in ("train", "val", "test"):
            raise BadInput(f"shapes has no split {split}", "", "use train, val or test")
        self.kind, self.split, self.name = kind, split, spec
        self.settings = settings or parse(spec)
        if self.settings.hide in ("left", "right") and len(kind.pictures) < 2:
            raise BadInput(f"data {spec}", f"{kind.holds} have no {self.settings.hide} picture", "write hide=all")
        if self.settings.among is not None and self.settings.exact and len(kind.pictures) > 1:
            why = f"{kind.holds} of exact are about drawn colours and forms, which without and only do not choose"
            raise BadInput(f"data {spec}", why, "leave them out, or exact")
        self.side = side_of(image_size) or DEFAULT_SIZE

    @property
    def origin(self) -> str:
        """sha256 of what the scenes follow from, the same at every size of picture; a smaller set begins a larger one."""
        said = {name: value for name, value in vars(self.settings).items() if name != "size" and (value or name not in LATEST)}
        return hashlib.sha256(f"shapes {VERSION} {said!r}".encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        text = f"shapes {VERSION} {self.settings!r} {self.side}"
        for name in NEWER:
            value = getattr(self.settings, name)
            text += f" {name}={value}" if value else ""
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return self.settings.size if self.split == "train" else max(1, self.settings.size // 10)

    def __getitem__(self, index: int) -> T:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.kind.drawn(self, index, self._key(index))

    def texts(self) -> Iterator[str]:
        """Captions, phrases, questions and answers of up to 5,000 scenes, whatever the kind: the vocabulary serves all of them."""
        if self.settings.exact:
            yield from exact.FORMS
        for index in range(min(len(self), SAMPLED_TEXTS)):
            _, scene = self.scene(index)
            words = self.words(index, "pair")
            yield from self.captions(scene, words)
            yield from (region.phrase for region in phrases.regions(scene, words))
            for question in phrases.questions(scene, self.words(index, "vqa"), self.settings.level, QUESTIONS):
                yield question.text
                yield from (answer for answer, _ in question.answers)

    def contents(self) -> Iterator[list[Any]]:
        """What is said of each of up to 5,000 scenes."""
        known = _said(self.kind, self.split, self.settings, self.side)
        for index in range(min(len(self), SAMPLED_TEXTS)):
            if index == len(known):
                known.append(self.kind.contents_at(self, index))
            yield known[index]

    def ids(self) -> Iterator[str | None]:
        for index in range(len(self)):
            item: Any = None if self.kind.pictures else self[index]
            yield item.id if item else self._key(index)

    def _key(self, index: int) -> str:
        return f"shapes/{self.settings.seed}/{self.split}/{index}"

    def picture(self, index: int) -> tuple[Scene, Pixels]:
        """The scene at `index`, drawn."""
        rng, scene = self.scene(index)
        return scene, self.drawn(scene, rng)

    def drawn(self, scene: Scene, rng: np.random.Generator, which: str = "") -> Pixels:
        """The pixels of a scene, or gray if it is to be hidden; `which` of two it is."""
        pixels = draw(scene, self.side, rng)
        if self.settings.hide and self.settings.hide in ("all", which):
            pixels[:] = GRAY
        return pixels

    def captions(self, scene: Scene, words: np.random.Generator) -> list[str]:
        """What is said of a scene."""
        return exact.captions(scene) if self.settings.exact else phrases.captions(scene, words)

    def scene(self, index: int, part: str = "scene") -> tuple[np.random.Generator, Scene]:
        """A scene at `index`, and the generator that goes on to draw it."""
        rng = generator(self.settings.seed, "shapes", self.split, index, part)
        return rng, self.sampled(rng)

    def sampled(self, rng: np.random.Generator, objects: tuple[int, int] | None = None) -> Scene:
        """A scene as the settings say, or of so many shapes."""
        return sample(rng, self.settings.level, objects or self.settings.objects, self.settings.alike, among=self.settings.among)

    def words(self, index: int, purpose: str) -> np.random.Generator:
        """What chooses the words about the scene at `index`."""
        return generator(self.settings.seed, "shapes", self.split, index, purpose)


@lru_cache(maxsize=4)
def _said(kind: Kind[Any, Any], split: str, settings: Settings, side: int) -> list[list[Any]]:
    """What `contents` has drawn so far: a stage asks for it several times, a plan at every step."""
    return []


def _range(spec: str, key: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    least, most = (_number(spec, key, part, 1, MOST_OBJECTS) for part in (low, high or low))
    if least > most:
        raise BadInput(f"data {spec}", f"{key}={text} is no range", f"write {key}=1-3")
    return least, most


def _number(spec: str, key: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise BadInput(f"data {spec}", f"{key}={text} is no whole number", f"use {low} to {high}") from None
    if not low <= value <= high:
        raise BadInput(f"data {spec}", f"{key}={value} is not in {low} to {high}", "use a number in between")
    return value
