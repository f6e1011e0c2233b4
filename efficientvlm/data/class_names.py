"""What classes are called in a sentence: by the data themselves, or by a file of names."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.files import MIB, read_limited
from efficientvlm.data.cells import LONGEST_TEXT
from efficientvlm.data.folders import NO_WORD
from efficientvlm.data.text_tables import lines_of
from efficientvlm.errors import BadInput, number_of, shorten

LARGEST = 64 * MIB
SYNSET, ANY = re.compile(r"n\d{8}"), re.compile(".+")
KEY_NAMES = ("class", "label", "key", "id", "wnid", "synset")
NAMED = 3


@dataclass(frozen=True)
class Classes:
    """The classes that are told apart: how the data call each (`keys`), and what it is called in a sentence (`names`)."""

    keys: list[str]
    names: list[str]
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def only(self, keys: Sequence[str]) -> Classes:
        """Those of `keys`, in the same order."""
        wanted = set(keys)
        kept = [(key, name) for key, name in zip(self.keys, self.names, strict=True) if key in wanted]
        return Classes([key for key, _ in kept], [name for _, name in kept], self.remarks)


@dataclass(frozen=True)
class NamesFile:
    """A file of class names: names in an order, or a name for each of some classes; a file of lines may be meant as either."""

    path: Path
    listed: list[str] = field(default_factory=list)
    mapped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> NamesFile:
        """A line a class: its name, or the class, a tab and its name; a CSV file with columns for both; or JSON, a list or an object.

        Lines that begin with a synset of WordNet (`n01440764 tench`) name it. An object of JSON may be that of Keras, in which the number
        of a class has a list of its synset and its name.

        Raises:
            BadInput: no such file, larger than 64 MiB, not UTF-8, without names, or with two names for one class.
        """
        content = read_limited(path, LARGEST, "a file of class names")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise cls._wrong(path, f"{error.reason} at byte {error.start}", "write it in UTF-8") from None
        ending = path.suffix.lower()
        found = cls._json(path, text) if ending == ".json" else cls._rows(path, text, "," if ending == ".csv" else "\t", ending)
        if not found.listed and not found.mapped:
            raise cls._wrong(path, "it holds no names", "write one a line")
        if long := next((name for name in (*found.listed, *found.mapped.values()) if len(name) > LONGEST_TEXT), None):
            raise cls._wrong(path, f"a name has {len(long):,} characters, at most {LONGEST_TEXT:,} are read", "shorten it")
        return found

    @classmethod
    def _json(cls, path: Path, text: str) -> NamesFile:
        fix = 'write a list of names, or an object of them: {"n01440764": "tench"}'
        try:
            found = json.loads(text, object_pairs_hook=tuple)  # an object of Python would keep the last of two names
        except (ValueError, RecursionError) as error:
            raise cls._wrong(path, f"it is no JSON ({error})", fix) from None
        if isinstance(found, list):
            return cls(path, listed=[cls._name(path, one, fix) for one in found])
        if not isinstance(found, tuple):
            raise cls._wrong(path, "it is neither a list nor an object", fix)
        if all(isinstance(one, list) and len(one) == 2 for _, one in found):
            found = tuple((str(key), name) for _, (key, name) in found)
        return cls._pairs(path, [(key, cls._name(path, name, fix)) for key, name in found])

    @classmethod
    def _rows(cls, path: Path, text: str, mark: str, ending: str) -> NamesFile:
        lines = [line for line in lines_of(text) if line.strip()]
        if ending in (".csv", ".tsv"):
            try:
                rows = list(csv.reader(io.StringIO(text), delimiter=mark, strict=True))
            except csv.Error as error:
                raise cls._wrong(path, f"it is no table ({error})", "write a header and two columns: class,name") from None
            header = [name.strip().lower() for name in rows[0]] if rows else []
            key = next((header.index(name) for name in KEY_NAMES if name in header), None)
            if key is None or "name" not in header:
                why = f"its columns are {shorten(', '.join(header), 80) or 'none'}"
                raise cls._wrong(path, why, "write a header and two columns: class,name")
            at, full = header.index("name"), [row for row in rows[1:] if any(cell.strip() for cell in row)]
            if short := next((number for number, row in enumerate(full, 2) if len(row) <= max(key, at)), None):
                raise cls._wrong(path, f"row {short} has too few cells", "write a class and its name")
            return cls._pairs(path, [(row[key].strip(), row[at].strip()) for row in full])
        lines = [line.strip() for line in lines]
        for between, form, what in (("\t", ANY, "a class, a tab and its name"), (" ", SYNSET, "a synset and its name")):
            pairs = [(key.strip(), name.strip()) for key, _, name in (line.partition(between) for line in lines)]
            fit = [bool(name and form.fullmatch(key)) for key, name in pairs]
            if not any(fit):
                continue
            if not all(fit):
                why = f"other lines have {what}, '{shorten(lines[fit.index(False)], 60)}' has not"
                raise cls._wrong(path, why, f"write {what} in every line, or in none")
            return cls._pairs(path, pairs)
        return cls(path, listed=lines)

    @classmethod
    def _pairs(cls, path: Path, pairs: Sequence[tuple[str, str]]) -> NamesFile:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise cls._wrong(
                path,
                f"{number_of(len(twice), 'class has', 'classes have')} two names, the first is {shorten(twice[0], 80)}",
                "keep one of them",
            )
        if empty := next((key for key, name in pairs if not name), None):
            raise cls._wrong(path, f"class {shorten(empty, 80)} has an empty name", "write one")
        return cls(path, mapped=dict(pairs))

    @classmethod
    def _name(cls, path: Path, value: Any, fix: str) -> str:
        if not isinstance(value, str) or not value.strip() or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise cls._wrong(path, f"{shorten(repr(value), 80)} is no name", fix)
        return value.strip()

    @staticmethod
    def _wrong(path: Path, why: str, fix: str) -> BadInput:
        return BadInput(f"cannot read the class names in {path}", why, fix)

    @property
    def names(self) -> list[str]:
        """All names, where there are no data that have classes."""
        return self.listed or list(self.mapped.values())

    def of(self, known: Sequence[str], name: str) -> Classes:
        """What the classes `known` to the data `name` are called, with the classes that the file has beside them.

        Raises:
            BadInput: a class has no name here.
        """
        mapped, listed = self.mapped, self.listed
        if mapped:
            if lost := [key for key in known if key not in mapped]:
                raise self._lacks(lost, known, name)
            return Classes(list(mapped), list(mapped.values()))
        if set(known) <= set(listed):
            if twice := [text for text, count in Counter(listed).items() if count > 1]:
                why = f"there is more than one {named(twice)}, and the classes of {name} are named by it"
                raise self._wrong(self.path, why, "write every class once, or a class, a tab and its name a line")
            return Classes(list(listed), list(listed))
        by_key = {said(key): key for key in known}
        if len(by_key) == len(known) and set(by_key) <= set(listed) and len(set(listed)) == len(listed):
            return Classes([by_key.get(text, text) for text in listed], list(listed))
        if all(key.isdecimal() and key.isascii() for key in known):
            highest = max(map(int, known))
            if highest >= len(listed):
                why = f"{name} has a class {highest}, and there are {len(listed):,} names, counted from 0"
                raise self._wrong(self.path, why, "write a name for every number, or a class, a tab and its name a line")
            keys = {int(key): key for key in known}
            return Classes([keys.get(number, str(number)) for number in range(len(listed))], list(listed))
        if len(listed) == len(known):
            first, last = (f"{key} is '{shorten(text, 60)}'" for key, text in ((known[0], listed[0]), (known[-1], listed[-1])))
            return Classes(list(known), list(listed), [f"class names are taken in the order of the classes: {first}, ..., {last}"])
        raise self._lacks([key for key in known if key not in listed], known, name)

    def _lacks(self, lost: Sequence[str], known: Sequence[str], name: str) -> BadInput:
        why = f"{len(lost):,} of {len(known):,} classes of {name} have no name there: {named(lost)}"
        return self._wrong(self.path, why, "write a class, a tab and its name a line, or one name a line for all classes in their order")


def classes_named(known: Sequence[str], file: NamesFile | None, name: str) -> Classes:
    """What the classes `known` to the data `name` are called: by `file`, or as the data call them, with spaces for underscores.

    Raises:
        BadInput: there is no class, or one without a name.
    """
    if not known:
        raise BadInput(f"data {name} has no classes", "", "use data whose rows have a label")
    if file is not None:
        return file.of(known, name)
    numbers = [key for key in known if NO_WORD.fullmatch(key)]
    remark = f"{len(numbers):,} of {len(known):,} classes of {name} are numbers, e.g. {named(numbers)}: a file of names says what they are"
    return Classes(list(known), [said(key) for key in known], [remark] if numbers else [])


def said(key: str) -> str:
    """A class as a sentence has it."""
    return " ".join(key.replace("_", " ").split()) or key


def named(texts: Sequence[str]) -> str:
    """The first of `texts`, and that there are more."""
    return ", ".join(shorten(text, 60) for text in texts[:NAMED]) + ", ..." * (len(texts) > NAMED)


def distinct(names: Sequence[str]) -> list[str]:
    """Each of `names` once, in order."""
    return list(dict.fromkeys(names))
