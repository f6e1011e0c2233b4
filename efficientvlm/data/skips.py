"""What is said of a source: samples that cannot be used, counted up to a limit at which the run stops, and how the data was read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.files import open_plain
from efficientvlm.data.ledger import Book
from efficientvlm.errors import BadInput, number_of

SHARE = 100  # by default one sample in so many may be bad
OF_A_STREAM = 100  # by default, where the number of samples is not known
REMEMBERED = 10_000
SHOWN = 5
LONGEST_LINE = 2**20


class Skips(Book):
    """The bad samples of one source, each counted once however often it is met.

    Args:
        limit: samples that may be skipped; None: 1 in 100, of a stream 100.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        super().__init__()
        self.name, self.limit = name, limit
        self.count = 0
        self.allowed = limit  # None until the number of samples is known
        self.reasons: dict[str, str] = {}
        self.notes: list[str] = []
        """How the data was read where that was a guess, and what was passed over: a sentence each."""
        self.samples: int | None = None
        """How many there are, where that is known once the source is open."""
        self._places: set[int] = set()
        self._met: set[bytes] = set()  # hashes, for there may be more samples than reasons that are remembered
        self._first: BadInput | None = None
        self._file: Path | None = None
        self._untold: dict[str, str] | None = None
        self._lock = threading.Lock()

    def add(self, error: BadInput, samples: int = 1, place: int | None = None) -> None:
        """Count the sample that `error` names; `samples` where one cause costs several, `place` where it stands in a source that is open.

        Raises:
            BadInput: one more than may be skipped, or the last one that was left.
        """
        self.tell("bad", error.what, error.why, error.fix, samples, place)
        with self._lock:
            self._count(error, samples)
            if place is not None:
                self._places.add(place)
            if self.samples and len(self._places) >= self.samples:
                raise BadInput(f"data {self.name} has no usable sample", "\n  ".join(["", *self.lines()]), "mend the pictures")

    def _count(self, error: BadInput, samples: int) -> None:
        if self._is_new(error.what):
            self._first = self._first or error
            self.count += samples
            if len(self.reasons) < REMEMBERED:
                self.reasons[error.what] = error.why
            if self._untold is not None:
                self._untold[error.what] = error.why
            self._check(error)
            self._write({error.what: error.why})

    def note(self, text: str) -> None:
        """Say `text` of the source, once."""
        self.tell("note", text)
        if text not in self.notes:
            self.notes.append(text)

    def settle(self, samples: int | None) -> None:
        """Now that a source of `samples` (None: unknown) is open: hold what was found against the limit."""
        if self.limit is None:
            self.allowed = OF_A_STREAM if samples is None else samples // SHARE
        self._check(self._first)

    def keep_in(self, path: Path) -> None:
        """Write what is skipped to `path`, a JSON line each, and take up what an interrupted run wrote there."""
        with self._lock:
            known = dict(_written(path)) if path.is_file() else {}
            new = {what: why for what, why in self.reasons.items() if what not in known}
            self.count += sum(map(self._is_new, known))
            self.reasons = known | new
            self._file = path
            self._write(new)

    def enter(self, *entry: Any) -> None:
        if entry[0] == "note":
            self.note(entry[1])
        else:
            _, what, why, fix, samples, place = entry
            self.add(BadInput(what, why, fix), samples, place)

    def lend(self) -> None:
        self._file = self._untold = None

    def collect(self) -> None:
        """Keep what is skipped from now on for :meth:`hand_over`, in a process that writes nothing."""
        self._untold = {}

    def hand_over(self) -> dict[str, str]:
        """Samples and reasons that were collected since the last call."""
        with self._lock:
            found = self._untold or {}
            if found:
                self._untold = {}
        return found

    def take_over(self, reported: list[dict[str, str]]) -> None:
        """Count what other processes have handed over; :class:`BadInput` as :meth:`add`."""
        for reasons in reported:
            for what, why in reasons.items():
                self.add(BadInput(what, why))

    def lines(self) -> list[str]:
        """The first reasons and how many more there are, for people."""
        shown = [f"{what}: {why}" for what, why in list(self.reasons.items())[:SHOWN]]
        return shown + ([f"and {self.count - len(shown)} more"] if self.count > len(shown) else [])

    def _is_new(self, what: str) -> bool:
        before = len(self._met)
        self._met.add(hashlib.blake2b(what.encode("utf-8", "replace"), digest_size=8).digest())
        return len(self._met) > before

    def _check(self, error: BadInput | None) -> None:
        if self.allowed is None or self.count <= self.allowed or error is None:
            return
        if self.allowed == 0:
            more = f" ({self.count - 1} more cannot be used)" if self.count > 1 else ""
            raise BadInput(error.what, error.why + more, f"{error.fix or 'mend or remove it'}; or allow bad samples with --set max_bad=N")
        raise BadInput(
            f"{number_of(self.count, 'sample')} of data {self.name} cannot be used",
            f"{self.allowed} may be skipped\n  " + "\n  ".join(self.lines()),
            "mend or remove them, or allow more with --set max_bad=N; an interrupted run then goes on",
        )

    def _write(self, reasons: dict[str, str]) -> None:
        if self._file is None or not reasons:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"sample": what, "reason": why}) + "\n" for what, why in reasons.items()))


def _written(path: Path) -> Iterator[tuple[str, str]]:
    """Samples and reasons in a file of :meth:`Skips.keep_in`."""
    with open_plain(path) as file:
        while line := file.readline(LONGEST_LINE):
            try:
                entry = json.loads(line)
                yield str(entry["sample"]), str(entry["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut short by a crash; the sample will be met again
