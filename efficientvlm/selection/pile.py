"""A pile of sentences: lines of a text file or a column of a table, read from the beginning to the end and never held as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from efficientvlm.data.lines import FIRST, refuse_other
from efficientvlm.data.stream_rows import read_file
from efficientvlm.data.tables import one_line
from efficientvlm.data.text_tables import BOM, is_unicode, opened
from efficientvlm.errors import BadInput
from efficientvlm.selection.rules import Array, Limits, squeezed

TABLES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")
OTHERS = {".json", ".arrow", ".tar", ".zip", ".gz", ".bz2", ".xz", ".zst", ".npy", ".npz", ".safetensors"}
"""Endings of files that hold something else, or hold it packed."""
COLUMNS = ("sentence", "text", "caption")
LONGEST_LINE = 1 << 20  # bytes
KEY = np.dtype([("first", "<u8"), ("second", "<u8")])
SORTED_AT_ONCE = 4_000_000  # sentences, at about 40 bytes


class Pile:
    """The sentences of a file, by number from 0: a row that holds none has a number too."""

    def __init__(self, path: Path, column: str | None = None) -> None:
        """`column` of a table; by default the one that is called sentence, text or caption.

        Raises:
            BadInput: a column of a file that has none, or a file of another kind.
        """
        self.path, self.column = path, column
        self.table = path.suffix.lower() in TABLES
        endings = {ending.lower() for ending in path.suffixes[-2:]}
        if not self.table and endings & OTHERS:
            fix = f"give a file {', '.join(TABLES)}, or plain text, a sentence a line"
            raise BadInput(f"{path} is no pile of sentences", f"a file that ends in {''.join(path.suffixes[-2:])} is not read here", fix)
        if column and not self.table:
            raise BadInput(f"{path} has no column {column}", "it is read as text, a sentence a line", f"give a file {', '.join(TABLES)}")

    def sentences(self, start: int = 0) -> Iterator[str | None]:
        """The squeezed sentence of every row from number `start` on; None where a row cannot be read as text.

        Raises:
            BadInput: the file cannot be opened or read on, or has no such column.
        """
        return islice(self._cells() if self.table else self._lines(), start, None)

    def about(self) -> int:
        """How many rows there are; of a table that is no parquet file how many lines, which may be more."""
        if self.path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            with opened(self.path) as file:
                try:
                    return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    raise BadInput(f"{self.path} cannot be read as parquet", one_line(error), "mend the file") from None
        count, last = 0, b"\n"
        with opened(self.path) as file:
            while block := file.read(LONGEST_LINE):
                count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")

    def _lines(self) -> Iterator[str | None]:
        with opened(self.path) as file:
            start = file.read(FIRST)
            refuse_other(f"{self.path} cannot be read", start)
            file.seek(len(BOM) if start.startswith(BOM) else 0)
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield None
                    continue
                try:
                    yield squeezed(line.decode("utf-8"))
                except UnicodeDecodeError:
                    yield None

    def _cells(self) -> Iterator[str | None]:
        column = self.column
        for raw in read_file(str(self.path)):
            if raw.problem is not None:
                yield None
                continue
            column = column or self._found(list(raw.values))
            if column not in raw.values and self.path.suffix.lower() not in (".jsonl", ".ndjson"):
                raise self._missing(column, list(raw.values))
            cell = raw.values.get(column)
            yield squeezed(cell) if isinstance(cell, str) and is_unicode(cell) else None

    def _found(self, names: list[str]) -> str:
        if not (found := next((name for name in COLUMNS if name in names), "")):
            raise self._missing(" or ".join(COLUMNS), names)
        return found

    def _missing(self, column: str, names: list[str]) -> BadInput:
        return BadInput(
            f"{self.path} has no column {column}", f"it has {', '.join(names) or 'none'}", "name one with --column sentence=NAME"
        )


def _skip_line(file: IO[bytes]) -> None:
    while (part := file.readline(LONGEST_LINE)) and not part.endswith(b"\n"):
        pass


def repeats(pile: Pile, limits: Limits, keys: Path) -> tuple[int, Array]:
    """How many rows `pile` has, and bits (uint8, one bit a row, the highest first) of those that repeat an earlier sentence.

    Sentences are equal if they are so after lower-casing; those that `limits` refuse do not count. Takes a bit a row of memory; a digest of
    16 bytes of each goes into the file `keys`, which is removed.
    """
    with open(keys, "wb") as file:
        for sentence in pile.sentences():
            counts = sentence is not None and not limits.refusal(sentence)
            file.write(hashlib.blake2b(sentence.lower().encode(), digest_size=16).digest() if counts and sentence else bytes(16))
    count = keys.stat().st_size // 16
    found = np.zeros(count, bool) if count else np.zeros(0, bool)
    parts = -(-count // SORTED_AT_ONCE)
    for part in range(parts):
        rows, values = _part(keys, count, part, parts)
        order = np.lexsort((values["second"], values["first"]))  # stable: equal ones stay in the order of the pile
        again = np.flatnonzero(values[order][1:] == values[order][:-1]) + 1
        found[rows[order[again]]] = True
    keys.unlink()
    return count, np.packbits(found)


def _part(keys: Path, count: int, part: int, parts: int) -> tuple[Array, Array]:
    """Rows and keys of the sentences that fall into one of `parts` by their key; those that do not count are in none."""
    stored = np.memmap(keys, KEY, "r", shape=(count,))
    rows, values = [], []
    for begin in range(0, count, SORTED_AT_ONCE):
        block = np.asarray(stored[begin : begin + SORTED_AT_ONCE])
        mine = np.flatnonzero((block["first"] % parts == part) & ((block["first"] != 0) | (block["second"] != 0)))
        rows.append(mine + begin)
        values.append(block[mine])
    return np.concatenate(rows), np.concatenate(values)


def is_repeat(bits: Array, start: int, count: int) -> Array:
    """bool [count]: the bits of :func:`repeats` from row `start` on."""
    first = start // 8
    return np.unpackbits(bits[first : (start + count + 7) // 8])[start - 8 * first :][:count].astype(bool)
