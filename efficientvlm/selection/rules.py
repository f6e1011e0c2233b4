"""What is kept of a pile of sentences (ours; DIME-FM tells that a pile was filtered by a teacher and its images, and not how).

The score of a sentence is its largest cosine with any image. Of sentences that are equal after lower-casing and squeezing blanks the first
stays. The rest is walked down by score, the earlier sentence first where scores are equal.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rules:
    """How many sentences are kept.

    `per_image`: only those that are among so many best of some image; `cap`: at most so many whose nearest image is the same, without a
    second choice; `total`: so many in all, the best. None: no such rule; one of the three has to be there. `near`: a sentence with at least
    this cosine with one that is kept for the same nearest image is dropped, and takes no place under the cap. `reserve`: candidates that
    are held for every place under the cap or in total, of which near-duplicates use up some.
    """

    per_image: int | None = None
    cap: int | None = None
    total: int | None = None
    near: float | None = 0.97
    reserve: int = 4

    def __post_init__(self) -> None:
        if self.per_image is self.cap is self.total is None:
            raise ValueError("one of per_image, cap and total says how many are kept")

    @property
    def places(self) -> int:
        """Candidates that are held: of every image, or in all where only the total is limited."""
        if self.per_image is not None:
            return self.per_image
        return (self.cap or self.total or 1) * (1 if self.near is None else self.reserve)

    @property
    def by_image(self) -> bool:
        """Whether candidates are held for every image."""
        return self.per_image is not None or self.cap is not None


@dataclass(frozen=True)
class Limits:
    """Which sentences are looked at at all. `scripts`: at least `script_share` of the letters are of these; empty: whatever they are."""

    min_characters: int = 5
    max_characters: int = 300
    min_words: int | None = None
    max_words: int | None = None
    scripts: Sequence[str] = ()
    script_share: float = 0.9

    def refusal(self, text: str) -> str:
        """Why the squeezed `text` is not looked at, as it is counted; empty where it is."""
        words = text.count(" ") + 1
        if not text:
            return "empty"
        if len(text) < self.min_characters or words < (self.min_words or 0):
            return "too_short"
        if len(text) > self.max_characters or words > (self.max_words or words):
            return "too_long"
        if self.scripts and share_of(text, self.scripts) < self.script_share:
            return "other_script"
        return ""


@lru_cache(65_536)
def scripts_of(letter: str) -> frozenset[str]:
    """The words of a letter's name in Unicode, the name of its script among them; none of what is no letter."""
    return frozenset(unicodedata.name(letter, "").lower().replace("-", " ").split()) if letter.isalpha() else frozenset()


def share_of(text: str, scripts: Sequence[str]) -> float:
    """Which part of the letters of `text` is of one of the `scripts`; 0 of a text without letters."""
    found = [not words.isdisjoint(scripts) for words in map(scripts_of, text) if words]
    return sum(found) / len(found) if found else 0.0


def squeezed(text: str) -> str:
    """`text` with one space in the place of blanks of any kind, and none at its ends."""
    return " ".join(text.split())


class Choice(NamedTuple):
    """Rows of the candidates that are kept, best first; how many others were dropped, by reason; places (images, under a cap) that may have
    been left empty for want of a larger reserve."""

    kept: Array
    dropped: Counter[str]
    short: int


def choose(index: Array, best: Array, score: Array, rules: Rules, vectors: Callable[[Array], Array]) -> Choice:
    """Walk down the candidates.

    Args:
        index: int64 [N], the place of each sentence in its pile; every sentence stands there once.
        best, score: the nearest image [N] of each, and the cosine [N] with it.
        vectors: rows → unit vectors [n, E], asked for where near-duplicates are looked for.

    Returns:
        `kept` in descending order of score. `dropped` counts near_duplicate, over_cap and over_total. `short` counts images of
        which fewer than `cap` are kept though as many candidates as are held were theirs: others may have made way for near-duplicates.
        Without a cap it counts the sentences that are missing in the same way to the `total`.
    """
    order = np.lexsort((index, -score))
    near, over, short = np.zeros(len(order), bool), np.zeros(len(order), bool), 0
    if rules.cap is not None or rules.near is not None:
        grouped = order[np.argsort(best[order], kind="stable")]
        ends = np.flatnonzero(np.diff(best[grouped], append=-1)) + 1
        held = rules.places if rules.per_image is None and rules.cap is not None else None
        for begin, end in pairwise([0, *ends.tolist()]):
            if end - begin == 1:
                continue
            rows = grouped[begin:end]
            repeats, taken = repeated(vectors(rows), rules.near, rules.cap) if rules.near is not None else (np.zeros(len(rows), bool), 0)
            near[rows] = repeats
            rest = rows[~repeats]
            if rules.cap is not None:
                over[rest[rules.cap :]] = True
                short += rules.near is not None and taken < rules.cap and len(rows) == held
    kept = order[~(near | over)[order]]
    dropped = Counter(near_duplicate=int(near.sum()), over_cap=int(over.sum()))
    if rules.total is not None:
        dropped["over_total"] = max(0, len(kept) - rules.total)
        if not rules.by_image and len(index) == rules.places:
            short = max(0, rules.total - len(kept))
        kept = kept[: rules.total]
    return Choice(kept, dropped, short)


def repeated(vectors: Array, near: float, cap: int | None) -> tuple[Array, int]:
    """bool [N]: which of the unit `vectors` [N, E], best first, are near to one that is kept before; and how many are kept.

    With `cap`, what comes behind the last place is not compared any more.
    """
    found, kept = np.zeros(len(vectors), bool), np.empty_like(vectors)
    count = 0
    for row, vector in enumerate(vectors):
        if count and float((kept[:count] @ vector).max()) >= near:
            found[row] = True
            continue
        kept[count] = vector
        count += 1
        if count == cap:
            break
    return found, count
