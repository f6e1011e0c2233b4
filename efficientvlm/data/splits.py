"""Which split the name of a file, a folder or a data set's part speaks of: one table for every form of data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from efficientvlm.errors import BadInput, shorten

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "test1", "test-dev", "test-std", "test-challenge"),
}
"""Split → the words that mean it, as a whole part of a name and with a year or not; a hyphen may be `_` or nothing."""

_ROLES = {word.replace("-", ""): role for role, words in SPLIT_NAMES.items() for word in words}
_WORDS = "|".join(sorted((word.replace("-", "[-_]?") for words in SPLIT_NAMES.values() for word in words), key=len, reverse=True))
_WORD = re.compile(rf"(?<![a-z0-9])({_WORDS})([-_]?(?:19|20)\d\d)?(?![a-z0-9])", re.IGNORECASE)
T = TypeVar("T")


def split_of(name: str) -> str | None:
    """train, val or test: what `v2_mscoco_val2014_annotations` speaks of; None if it names no split, or several."""
    found = {_ROLES[re.sub("[-_]", "", match[1].lower())] for match in _WORD.finditer(name)}
    return found.pop() if len(found) == 1 else None


def part_of(name: str) -> str:
    """The part of a name that says the split, with its year: `val2014`."""
    match = _WORD.search(name)
    return match[0] if match else ""


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Split → the names of parts that speak of it; one that is nothing else (`train`) goes before those that say more (`train_small`)."""
    found: dict[str, list[str]] = {}
    for name in names:
        if role := split_of(name):
            found.setdefault(role, []).append(name)
    return {role: [name for name in names if _WORD.fullmatch(name)] or names for role, names in found.items()}


def only(parts: Sequence[T], names: Sequence[str], spec: str, split: str) -> T:
    """The one of `parts` that there is.

    Raises:
        BadInput: several could be it; names them.
    """
    if len(parts) > 1:
        raise BadInput(f"data {spec} has {len(parts)} splits for {split}", f"it has {shorten(', '.join(names))}", "keep one of them")
    return parts[0]
