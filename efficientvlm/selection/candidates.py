"""What may still be kept while sentences stream by: a bounded number for every image, on disk, so that a run that was killed goes on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efficientvlm.checkpoints.files import fsync_dir, write_atomic
from efficientvlm.errors import BadInput
from efficientvlm.selection.rules import Array, Choice, Rules, choose

STATE = "state.json"
FEWEST = 65_536  # rows that are added before it is looked which of them can go
AT_A_TIME = 8_192  # rows that are copied at once


class Offer(NamedTuple):
    """Pairs of a sentence and an image: the sentence's number in its pile [N], the image [N], their cosine [N], the sentence's nearest
    image [N] and its cosine with that [N]."""

    number: Array
    image: Array
    cosine: Array
    best: Array
    score: Array


class Held(NamedTuple):
    """The candidates in the end, each sentence once: its number in its pile, nearest image, cosine with that, and row of its vector."""

    number: Array
    best: Array
    score: Array
    row: Array


def record_of(width: int) -> Any:
    """The type of a candidate on disk, with a vector of `width` numbers."""
    plain = [("number", "<i8"), ("image", "<i4"), ("cosine", "<f4"), ("best", "<i4"), ("score", "<f4")]
    return np.dtype([*plain, ("vector", "<f2", (width,))])


def bytes_of_record(width: int) -> int:
    return int(record_of(width).itemsize)


class Candidates:
    """The best candidates of every image (or in all, if only their total is limited), of sentences that come in ascending order.

    In memory lie 32 bytes a candidate and 4 an image. The vectors lie in a file of `folder` that grows and, where more than half of it can
    no longer be kept, is written anew; what it holds up to the last :meth:`save` stands in `state.json`.
    """

    def __init__(self, folder: Path, images: int, width: int, rules: Rules) -> None:
        """Empty, or as they were saved in `folder`.

        Raises:
            BadInput: what was saved there is damaged.
        """
        self.folder, self.rules, self.images, self.width = folder, rules, images, width
        self.record = record_of(width)
        self.threshold = np.full(images if rules.by_image else 1, -np.inf, np.float32)
        """Cosine that a later sentence has to exceed, by image."""
        self.done, self.counts, self.beside = 0, Counter[str](), Counter[str]()
        """Sentences that were read, how many of them were dropped before they became candidates, and what else was counted."""
        self.part, self.count, self._kept = 0, 0, np.empty(0, self._columns)
        self._new: list[Array] = []
        self._unseen = 0
        if (folder / STATE).is_file():
            self._take_up()
        else:
            self._file = open(self._path(0), "w+b")  # noqa: SIM115  as long as the candidates live

    @property
    def _columns(self) -> Any:
        return np.dtype([(name, self.record[name]) for name in ("number", "image", "cosine", "best", "score")] + [("row", "<i8")])

    def offer(self, pairs: Offer, vectors: Callable[[Array], Array]) -> None:
        """Hold those `pairs` that are better than what their image holds; `vectors` gives the unit vectors [n, E] of the numbers [n]."""
        better = pairs.cosine > self.threshold[self._group(pairs.image, pairs.best)]
        count = int(better.sum())
        if not count:
            return
        rows = np.empty(count, self.record)
        for name, values in zip(Offer._fields, pairs, strict=True):
            rows[name] = values[better]
        rows["vector"] = vectors(rows["number"])
        self._file.write(rows.tobytes())
        self._hold(rows)
        if self._unseen >= max(FEWEST, len(self._kept)):
            self._sort_out()

    def save(self, done: int, counts: Mapping[str, int], beside: Mapping[str, int] | None = None) -> None:
        """Put down that `done` sentences were read, `counts` of those that were dropped, and what was counted `beside`: from here a killed
        run goes on."""
        old = self._trim() if self.count >= 2 * len(self._kept) + FEWEST else None
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done, self.counts, self.beside = done, Counter(counts), Counter(beside or {})
        state = {"done": done, "counts": dict(counts), "beside": dict(self.beside), "part": self.part, "rows": self.count}
        write_atomic(self.folder / STATE, json.dumps(state).encode())
        if old is not None:
            old.unlink(missing_ok=True)

    def choose(self) -> tuple[Choice, Held]:
        """What is kept in the end. Candidates that are not held any more are counted with those that :func:`rules.choose` drops."""
        self._sort_out()
        self._file.flush()
        columns = self._kept
        sentences, first = np.unique(columns["number"], return_index=True)
        held = Held(sentences, columns["best"][first], columns["score"][first], columns["row"][first])
        stored = np.memmap(self._path(self.part), self.record, "r", shape=(self.count,)) if self.count else None

        def vectors(rows: Array) -> Array:
            assert stored is not None
            found = stored["vector"][held.row[rows]].astype(np.float32)
            return found / np.linalg.norm(found, axis=1, keepdims=True)

        return choose(held.number, held.best, held.score, self.rules, vectors), held

    def close(self) -> None:
        self._file.close()

    def _group(self, image: Array, best: Array) -> Array:
        if not self.rules.by_image:
            return np.zeros(len(image), np.int64)
        return image if self.rules.per_image is not None else best

    def _hold(self, rows: Array) -> None:
        columns = np.empty(len(rows), self._columns)
        for name in Offer._fields:
            columns[name] = rows[name]
        columns["row"] = np.arange(self.count, self.count + len(rows))
        self._new.append(columns)
        self.count += len(rows)
        self._unseen += len(rows)

    def _sort_out(self) -> None:
        """Let go of what is behind the last place of its image, and raise the thresholds."""
        columns = np.concatenate([self._kept, *self._new])
        self._new, self._unseen = [], 0
        group = self._group(columns["image"], columns["best"])
        order = np.lexsort((columns["number"], -columns["cosine"], group))
        sorted_ = group[order]
        begins = np.flatnonzero(np.diff(sorted_, prepend=-1))
        place = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
        last = place == self.rules.places - 1
        self.threshold[sorted_[last]] = columns["cosine"][order[last]]
        self._kept = columns[np.sort(order[place < self.rules.places])]

    def _trim(self) -> Path | None:
        """Sort out, and where less than half of the file is held, write it anew; the old file, which is still the saved one, if so."""
        self._sort_out()
        if 2 * len(self._kept) > self.count:
            return None
        self._file.flush()
        old, new = self._path(self.part), self._path(self.part + 1)
        stored = np.memmap(old, self.record, "r", shape=(self.count,))
        file = open(new, "w+b")  # noqa: SIM115  as long as the candidates live
        for begin in range(0, len(self._kept), AT_A_TIME):
            file.write(stored[self._kept["row"][begin : begin + AT_A_TIME]].tobytes())
        self._file.close()
        self._file, self.part, self.count = file, self.part + 1, len(self._kept)
        self._kept["row"] = np.arange(self.count)
        fsync_dir(self.folder)
        return old

    def _path(self, part: int) -> Path:
        return self.folder / f"candidates-{part}"

    def _take_up(self) -> None:
        """Go on from what was saved; what was written later is cut off."""
        try:
            state = json.loads((self.folder / STATE).read_bytes())
            self.done, self.counts, self.part = int(state["done"]), Counter(state["counts"]), int(state["part"])
            self.beside = Counter(state.get("beside", {}))
            rows, path = int(state["rows"]), self._path(int(state["part"]))
            if path.stat().st_size < rows * self.record.itemsize:
                raise ValueError(f"{path.name} is cut short")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{self.folder} is damaged", str(error), "give --no-resume to begin anew") from None
        for other in self.folder.glob("candidates-*"):
            if other != path:
                other.unlink()
        self._file = open(path, "r+b")  # noqa: SIM115  as long as the candidates live
        self._file.truncate(rows * self.record.itemsize)
        while self.count < rows:
            some = min(AT_A_TIME, rows - self.count)
            self._hold(np.frombuffer(self._file.read(some * self.record.itemsize), self.record))
        self._sort_out()
        self._file.seek(0, os.SEEK_END)
