"""The layout of NLVR2: a file of JSON lines a split, called `.json`, whose statements name their two pictures by an identifier."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import MemoryTable, digest_of
from efficientvlm.data.text_tables import first_mark, json_row, json_rows, opened
from efficientvlm.errors import BadInput

IDENTIFIER = re.compile(r"([A-Za-z0-9]+)-(\d+)-(\d+)-(\d+)")
NAME = re.compile(r"[A-Za-z0-9_]+")
LOOKED_AT = 1 << 20  # bytes of a first line
NEEDED = {"identifier", "sentence"}


class Identifier(NamedTuple):
    """`split-set-pair-sentence`, as `dev-850-1-0`: one of the pairs of pictures of a set, and one of the sentences written about it."""

    split: str
    set: str
    pair: str
    sentence: str

    @classmethod
    def of(cls, text: Any) -> Identifier | None:
        """None for anything else."""
        found = IDENTIFIER.fullmatch(text) if isinstance(text, str) else None
        return cls(*found.groups()) if found else None

    @property
    def group(self) -> str:
        """Equal for all pairs of pictures that a sentence is judged on."""
        return f"{self.split}-{self.set}-{self.sentence}"

    def picture(self, number: int) -> str:
        """File name of the left (0) or the right (1) picture."""
        return f"{self.split}-{self.set}-{self.pair}-img{number}.png"


def is_statements(path: Path) -> bool:
    """Whether a file of JSON has statements in lines, as NLVR2's `train.json`, `dev.json` and `test1.json`."""
    if first_mark(path) != b"{":
        return False
    with opened(path) as file:
        first = json_row(file.readline(LOOKED_AT), "")
    return isinstance(first, dict) and first.keys() >= NEEDED


def statements(path: Path, skips: Skips) -> MemoryTable:
    """The statements of a file, a row each.

    Pictures lie as the archives of NLVR2 have them (`images/train/37/...`, `dev/...`) or all in one folder, beside the file or above.
    """
    columns: dict[str, list[Any]] = {"image": [], "second_image": [], "sentence": [], "label": [], "identifier": []}
    places: list[str] = []
    find = Finder(path.parent)
    with opened(path) as file:
        for _, number, row in json_rows(file, str(path)):
            where = f"{path} line {number}"
            if isinstance(row, BadInput):
                skips.add(row)
                continue
            identifier = Identifier.of(row.get("identifier"))
            if identifier is None:
                skips.add(BadInput(where, "its identifier is not split-set-pair-sentence", "write it as dev-850-1-0, or remove the row"))
                continue
            pictures = [find(identifier, row.get("directory"), number) for number in (0, 1)]
            said = (row.get("sentence"), row.get("label"), row["identifier"])
            for column, value in zip(columns.values(), (*pictures, *said), strict=True):
                column.append(value)
            places.append(where)
    return MemoryTable(columns, path.parent, places.__getitem__, digest_of([path]))


class Finder:
    """Where pictures lie, below a folder or the one above it; where the last one was found is looked at first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roots = [Path(), Path("images"), Path(".."), Path("../images")]
        self.before: tuple[Path, int] | None = None

    def __call__(self, identifier: Identifier, directory: Any, number: int) -> str:
        """Path, from the folder, of a picture; of one that is not there, where it was looked for first."""
        name, split = identifier.picture(number), Path(identifier.split)
        inner = [split / str(directory) if NAME.fullmatch(str(directory)) else split, split, Path()]
        every = [(root, depth) for root in self.roots for depth in range(len(inner))]
        for root, depth in ([self.before] if self.before else []) + every:
            place = root / inner[depth] / name
            if os.path.isfile(self.folder / place):
                self.before = root, depth
                return str(place)
        return str(self.roots[1] / inner[0] / name)
