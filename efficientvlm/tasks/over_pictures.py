"""Work over many pictures, batch by batch, whose rows are kept or grow in a file, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from efficientvlm.checkpoints.files import sha256
from efficientvlm.checkpoints.growing import GrowingLines
from efficientvlm.checkpoints.manifest import MANIFEST
from efficientvlm.data.unlabelled import Shown, Unlabelled, ahead
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.interrupt import StopFlag
from efficientvlm.runtime.progress import Bar, say

SHOWN = 5  # pictures that cannot be read and are named

T = TypeVar("T")


class Opened(NamedTuple, Generic[T]):
    """What is read of a picture, or why it cannot be read."""

    content: T | None
    problem: BadInput | None = None


class Kept:
    """Rows that stay in memory, in the place of :class:`GrowingLines`."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.done, self.last, self.counts = 0, "", Counter[str]()

    def add(self, rows: Sequence[Mapping[str, Any]], done: int, last: str, counts: Counter[str]) -> None:
        self.rows += rows
        self.done, self.last, self.counts = done, last, counts


class OverPictures(Generic[T]):
    """What is done with pictures: :meth:`read` says what is read of each, :meth:`made` the rows of those of a batch that can be read."""

    work_done = "described"
    """Name of the count of pictures that were dealt with."""

    def __init__(self, out: Path | None, size: int, *, shown_above: int = 0, quiet: bool = False) -> None:
        """`size` pictures at a time; progress of more than `shown_above` is shown."""
        self.out, self.size, self.quiet, self.shown_above = out, size, quiet, shown_above
        self.first_lost = ""
        self.told = Counter[str]()

    def read(self, shown: Shown, where: str) -> T:
        """:class:`BadInput` for a picture that cannot be read."""
        raise NotImplementedError

    def made(self, seen: Sequence[tuple[Shown, T]], counts: Counter[str]) -> list[dict[str, Any]]:
        """Rows of pictures; what is counted of them is added to `counts`."""
        raise NotImplementedError

    def noted(self, counts: Counter[str]) -> str:
        """What stands beside the progress."""
        return ""

    def work(self, pictures: Unlabelled, lines: GrowingLines | Kept, stop: StopFlag | None = None) -> None:
        """Deal with what is not yet in `lines`.

        Raises:
            BadInput: a picture that was named cannot be read; the pictures are no longer those that `lines` were begun with.
            Interrupted: asked to stop.
        """
        total, counts = len(pictures), Counter(lines.counts)
        with Bar("predict", total, start=lines.done, quiet=self.quiet or total <= self.shown_above) as bar:
            for batch in ahead(self.rest(pictures, lines), self.size, self.opened):
                rows = self.rows(batch, counts)
                lines.add(rows, lines.done + len(batch), batch[-1][0].name, Counter(counts))
                bar.update(lines.done, self.noted(counts))
                if stop and stop.requested and lines.done < total:
                    what = f"stopped behind {lines.done:,} of {total:,} pictures"
                    raise Interrupted(what, f"what was {self.work_done} lies beside {self.out}", "run the same command again")

    def rest(self, pictures: Unlabelled, lines: GrowingLines | Kept) -> Iterator[Shown]:
        if not lines.done:
            return pictures.after(0)
        rest = pictures.after(lines.done - 1)
        last = next(rest, None)
        if last is None or last.name != lines.last:
            now = last.name if last else "missing"
            why = f"picture number {lines.done:,} was {lines.last}, and is {now}: pictures were added or removed"
            raise BadInput(f"{self.out} was begun with other pictures", why, "give --no-resume to begin anew, or another --out")
        return rest

    def opened(self, shown: Shown) -> Opened[T]:
        """What is read of a picture; one that was named has to be readable."""
        if isinstance(shown.content, BadInput):
            return Opened(None, shown.content)
        try:
            return Opened(self.read(shown, "" if isinstance(shown.content, Path) else shown.name))
        except BadInput as error:
            if shown.named:
                raise
            return Opened(None, error)

    def rows(self, batch: Sequence[tuple[Shown, Opened[T]]], counts: Counter[str]) -> list[dict[str, Any]]:
        """What is written of a batch, and `counts` of it."""
        seen: list[tuple[Shown, T]] = []
        for shown, opened in batch:
            if opened.problem or opened.content is None:
                assert opened.problem
                why = self.lost(shown.name, opened.problem)
                self.first_lost = self.first_lost or why
                counts["skipped"] += 1
            else:
                seen.append((shown, opened.content))
        if not seen:
            return []
        counts[self.work_done] += len(seen)
        return self.made(seen, counts)

    def called(self, name: str) -> str:
        """A picture as a row names it: relative to the file that the row stands in, so that the file is read as data."""
        return os.path.relpath(name, self.out.parent) if self.out and not os.path.isabs(name) else name

    def lost(self, name: str, error: BadInput, what: str = "") -> str:
        """Why `what` of a picture is left out; the first few are said."""
        why = f"{what}{name}: {error.why or error.what}"
        self.told[what] += 1
        if self.told[what] <= SHOWN:
            say(f"predict: left out {why}")
        return why

    def check(self, pictures: Unlabelled, lines: GrowingLines | Kept) -> None:
        """Say what was left out; :class:`BadInput` where that is all."""
        counts = lines.counts
        if not counts[self.work_done]:
            if isinstance(lines, GrowingLines):
                lines.discard()  # nothing to go on from
            several = len(pictures) > 1
            what = f"none of {len(pictures):,} pictures can be read" if several else "the one picture cannot be read"
            raise BadInput(what, f"{'the first, ' * several}{self.first_lost}", "give pictures, e.g. PNG or JPEG")
        if counts["skipped"]:
            say(f"predict: {counts['skipped']:,} of {len(pictures):,} pictures cannot be read and were left out")


def digest(loaded: Loaded) -> str:
    """What tells one checkpoint from another."""
    file = loaded.path / MANIFEST
    return sha256(file) if file.is_file() else hashlib.sha256(str(loaded.path).encode()).hexdigest()
