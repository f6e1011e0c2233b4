"""Plain text files, a sample a line: only where lines begin is kept in memory, and a line is read when it is asked for."""

from __future__ import annotations

import codecs
import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from efficientvlm.data.draw import generator, some_of
from efficientvlm.data.forms import SUFFIXES, paths_of
from efficientvlm.data.kinds.kind import Kind, Row
from efficientvlm.data.skips import Skips
from efficientvlm.data.splits import by_split, only
from efficientvlm.data.text_tables import BOM, bounded, opened, too_long
from efficientvlm.errors import BadInput, number_of

T = TypeVar("T")
SUFFIX = ".txt"
SPLIT_SEED = 20190719  # fixed, so that a line is held out in every stage or in none
ATTEMPTS = 1000
FIRST = 4096  # bytes by which a file of something else is known
AT_ONCE = 1000  # lines that are read one after another
LONGEST = 400_000  # bytes of a line: what is longer has more characters than a text may have, whatever they are


class Spans(NamedTuple):
    """Lines of a file: where each begins, its bytes without the end of line, and its number from 1."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int32]
    numbers: NDArray[np.int64]


class Lines(Generic[T]):
    """Samples of one kind of which a line of UTF-8 text is one each; empty lines are none.

    A line takes 20 bytes of memory, however long it is. Lines that cannot be used are counted when the files are opened, or when they are
    read: then, as with other data, `source[i]` is another line, and :meth:`usable` leaves it out.
    """

    licence = "unknown"

    def __init__(
        self,
        kind: Kind[T, Any],
        spec: str,
        split: str,
        *,
        val_fraction: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
        max_bad: int | None = None,
    ) -> None:
        """
        Raises:
            BadInput: no files of text, no UTF-8, too many bad lines, or no line at all.
        """
        self.kind, self.name, self.skips = kind, spec, Skips(spec, max_bad)
        files = text_files(spec, split, self.skips)
        if files is None:
            raise BadInput(f"data {spec}", f"it is no file that ends in {SUFFIX}", "give a text file with a sentence a line")
        self.paths, hold_out = files
        digest, found = hashlib.sha256(), []
        for path in self.paths:
            seen = hashlib.sha256()
            found.append(self._look_at(path, seen))
            digest.update(seen.digest())
        self.fingerprint = digest.hexdigest()
        self._spans = Spans(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
        self._firsts = np.cumsum([0, *(len(spans.starts) for spans in found)])
        rows = len(self._spans.starts)
        self.skips.settle(rows + self.skips.count)
        if not rows:
            raise BadInput(f"data {spec}", "it holds no line of text", "write a sentence a line, or give another file")
        chosen: NDArray[np.int64] | None = None
        if hold_out and val_fraction:
            held = generator(SPLIT_SEED, "lines").random(rows) < val_fraction
            chosen = np.flatnonzero(held if split == "val" else ~held)
        elif split == "val" and hold_out:
            chosen = np.arange(0)
        count = rows if chosen is None else len(chosen)
        if limit is not None and limit < count:
            self.skips.note(f"{limit:,} of {count:,} lines, drawn at random (seed {seed})")
            some = np.array(some_of(count, limit, seed), np.int64)
            chosen = some if chosen is None else chosen[some]
        self._chosen = chosen

    @property
    def origin(self) -> str:
        """What all samples of these files come from, whatever split or part of them is read."""
        return self.fingerprint

    def __len__(self) -> int:
        return len(self._spans.starts) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> T:
        place = index = range(len(self))[index]
        for attempt in range(ATTEMPTS):
            if found := self.usable([place]):
                return found[0]
            place = int(generator(SPLIT_SEED, "instead", index, attempt).integers(len(self)))
        raise BadInput(f"data {self.name}", f"of {ATTEMPTS} lines drawn none could be read", "mend the data")

    def usable(self, indices: Sequence[int]) -> list[T]:
        """The samples of `indices` without those that cannot be used."""
        found = []
        for index, content in zip(indices, self._contents(indices), strict=True):
            if isinstance(content, BadInput):
                self.skips.add(content)
            else:
                found.append(self.kind.item(str(self._row(index)), (), [Row(content, self._where(self._row(index)))]))
        return found

    def texts(self) -> Iterator[str]:
        for contents in self.contents():
            yield from self.kind.texts(contents)

    def contents(self) -> Iterator[list[Any]]:
        for start in range(0, len(self), AT_ONCE):
            for content in self._contents(range(start, min(len(self), start + AT_ONCE))):
                if not isinstance(content, BadInput):
                    yield [content]

    def ids(self) -> Iterator[str | None]:
        for start in range(0, len(self), AT_ONCE):
            for content in self._contents(range(start, min(len(self), start + AT_ONCE))):
                item: Any = None if isinstance(content, BadInput) else self.kind.item("", (), [Row(content, "")])
                yield item.id if item else None

    def _contents(self, indices: Sequence[int]) -> list[Any]:
        """What the lines say, or why they cannot be used."""
        found: list[Any] = [None] * len(indices)
        by_file: dict[int, list[int]] = {}
        for at, index in enumerate(indices):
            by_file.setdefault(self._file(self._row(index)), []).append(at)
        for number, places in by_file.items():
            with opened(self.paths[number]) as file:
                for at in places:
                    found[at] = self._content(file, self._row(indices[at]))
        return found

    def _content(self, file: BinaryIO, row: int) -> Any:
        where, size = self._where(row), int(self._spans.sizes[row])
        line = os.pread(file.fileno(), size, int(self._spans.starts[row]))
        role = self.kind.required[0]
        try:
            if len(line) < size:
                raise BadInput(where, "its file has become shorter since it was opened", "run the command again")
            return self.kind.content({role: line.decode("utf-8")}, where, {role: "line"})
        except UnicodeDecodeError:
            return BadInput(where, "it is not UTF-8 text", "save the file as UTF-8")
        except BadInput as error:
            return error

    def _row(self, index: int) -> int:
        index = range(len(self))[index]
        return index if self._chosen is None else int(self._chosen[index])

    def _file(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _where(self, row: int) -> str:
        return f"{self.paths[self._file(row)]} line {int(self._spans.numbers[row])}"

    def _look_at(self, path: Path, digest: Any) -> Spans:
        """Where the lines of a file are that are not empty, are text and not too long; bad ones are counted."""
        starts, sizes, numbers = array("q"), array("i"), array("q")
        offset = 0
        with opened(path) as file:
            refuse_other(f"data {path}", file.read(FIRST))
            file.seek(0)
            for number, (line, size) in enumerate(bounded(file, digest.update), 1):
                skipped = len(BOM) if offset == 0 and line is not None and line.startswith(BOM) else 0
                body = b"" if line is None else line[skipped:].rstrip(b"\r\n")
                if line is None or len(body) > LONGEST:
                    why = too_long(size) if line is None else f"it has {size:,} bytes, at most {LONGEST:,} are read"
                    self.skips.add(BadInput(f"{path} line {number}", why, "write a sentence a line"))
                elif not body.isascii() and not _is_text(body):
                    self.skips.add(BadInput(f"{path} line {number}", "it is not UTF-8 text", "save the file as UTF-8"))
                elif body.strip():
                    starts.append(offset + skipped)
                    sizes.append(len(body))
                    numbers.append(number)
                offset += size
        return Spans(np.array(starts, np.int64), np.array(sizes, np.int32), np.array(numbers, np.int64))


def refuse_other(what: str, begin: bytes) -> None:
    """:class:`BadInput` where a file that begins so holds no lines of UTF-8; `what` names it."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * begin.count(0) > len(begin) > 0:
        raise BadInput(what, "it is UTF-16 text, or no text at all", "save the file as UTF-8")
    if begin.count(b"\r") > 1 and b"\n" not in begin:
        raise BadInput(what, "its lines end in carriage returns, which are no ends of lines here", "save the file with line feeds")


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def text_files(spec: str, split: str, skips: Skips) -> tuple[list[Path], bool] | None:
    """The plain text files that data are, or that lie in a folder with no data of another form, and whether `val` is to be held out of
    them; None if they are none. A folder's files that are called after splits are those of one split each.

    Raises:
        BadInput: text files together with others, or a folder without the split.
    """
    paths = paths_of(spec)
    if not paths[0].is_dir():
        plain = [path for path in paths if path.suffix.lower() == SUFFIX]
        if plain and len(plain) < len(paths):
            raise BadInput(f"data {spec}", "text files and files of another form cannot be read as one", "give those of one form")
        return (plain, split != "test") if plain else None
    files = sorted(path for path in paths[0].iterdir() if path.is_file() and not path.name.startswith("."))
    if any(path.suffix.lower() in SUFFIXES or path.name in ("state.json", "dataset_dict.json") for path in files):
        return None
    named = {path.name: path for path in files if path.suffix.lower() == SUFFIX}
    if not named:
        return None
    if not (claims := by_split(named)):
        if len(named) < len(files):
            skips.note(f"{number_of(len(files) - len(named), 'file does', 'files do')} not end in {SUFFIX}: passed over")
        return list(named.values()), split != "test"
    wanted = split if split in claims else "train" if split == "val" and "train" in claims else ""
    if not wanted:
        raise BadInput(f"data {spec} has no split {split}", f"it has {', '.join(named)}", "give one file")
    name = only(claims[wanted], claims[wanted], spec, wanted)
    return [named[name]], wanted == "train" and "val" not in claims
