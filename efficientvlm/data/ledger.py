"""Counts that one process keeps although others work for it: what a worker counts is told, and entered again where it belongs.

Objects that count (:class:`Book`) have a number, by which a worker, a fork of the process it works for, calls them. Entries are made in
the order in which work is taken over, so that counts, and the sample at which a limit is passed, are those of a run without workers.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

Entry = tuple[int, tuple[Any, ...]]
"""The number of a book, and what is to be entered in it."""

_books: WeakValueDictionary[int, Book] = WeakValueDictionary()
_numbers = itertools.count()
_told: list[Entry] | None = None


class Book:
    """Something that counts."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        _books[self._number] = self

    def tell(self, *entry: Any) -> None:
        """In a worker: that `entry` is to be entered; elsewhere nothing."""
        if _told is not None:
            _told.append((self._number, entry))

    def enter(self, *entry: Any) -> None:
        """Count what a worker has told."""
        raise NotImplementedError

    def lend(self) -> None:
        """From now on this copy, in a worker, counts for another process: nothing is written any more, open files are opened anew."""


def work_for_another() -> None:
    """Begin to tell, in a process that was forked to work for another."""
    global _told, _numbers
    _told, _numbers = [], itertools.count(-1, -1)  # what begins to count here is nobody else's
    for book in list(_books.values()):
        book.lend()


def told() -> list[Entry]:
    """What was told since the last call."""
    global _told
    found, _told = _told or [], []
    return found


def enter(entries: list[Entry]) -> None:
    """Make the entries that a worker told."""
    for number, entry in entries:
        if (book := _books.get(number)) is not None:
            book.enter(*entry)
