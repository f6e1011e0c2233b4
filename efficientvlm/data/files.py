"""A user's own samples of any kind, from any table of `data.forms`, grouped by image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from efficientvlm.checkpoints.files import sha256
from efficientvlm.data.cells import LEFT_OUT, is_missing, text_of
from efficientvlm.data.draw import generator, seed_of, some_of
from efficientvlm.data.forms import open_table
from efficientvlm.data.images import open_sized
from efficientvlm.data.kinds.kind import Kind, Picture, Row
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.skips import Skips
from efficientvlm.errors import BadInput, number_of, shorten

T = TypeVar("T")
SPLIT_SEED = 20190719  # fixed, so that an image is held out in every stage or in none
ATTEMPTS = 1000


class Files(Generic[T]):
    """Samples of one kind. Rows that share their pictures are one sample; of data without pictures every row is one.

    Rows that cannot be used are left out when the source is opened. A picture that cannot be read is found later: `source[i]` is then
    another picture, which depends on the data and on `i` only; :meth:`usable` leaves it out instead. So are rows that turn out not to fit
    their picture, those alone.
    """

    def __init__(
        self,
        kind: Kind[T, Any],
        spec: str,
        split: str,
        *,
        columns: Mapping[str, str] | None = None,
        val_fraction: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
        image_size: Preprocessing | int | None = None,
        max_bad: int | None = None,
    ) -> None:
        self.kind, self.name, self.size = kind, spec, image_size
        self.skips = Skips(spec, max_bad)
        self.table, hold_out = open_table(spec, split, self.skips, kind.of_folder)
        rows = len(self.table) + self.skips.count
        if not rows:
            raise BadInput(f"data {spec}", f"its split {split} has no rows", "check the file, or use another split")
        self.skips.settle(rows)
        if len(self.table):
            self.columns = find_columns(self.table.columns, kind, columns or {}, spec)
        groups = self._groups() if len(self.table) else {}
        keys = [key for key in groups if not hold_out or (seed_of(SPLIT_SEED, key) < val_fraction * 2**63) == (split == "val")]
        if limit is not None and limit < len(keys):
            self.skips.note(f"{limit:,} of {len(keys):,} images, drawn at random (seed {seed})")
            keys = [keys[index] for index in some_of(len(keys), limit, seed)]
        said = [role for role in self.columns if role not in (*kind.pictures, kind.listed, "image_id")] if groups else []
        self._said = {role: self.table.column(self.columns[role]) for role in said}
        self._keys: list[str] = []
        self._rows: list[list[int]] = []
        self._contents: list[list[Any]] = []
        for key in keys:
            self._keep(key, groups[key])
        self.skips.settle(rows)
        if not self._keys and (keys or not groups):
            raise BadInput(f"data {spec} has no usable sample", "\n  ".join(["", *self.skips.lines()]), "mend the rows")
        self.skips.samples = len(self._keys)

    @property
    def licence(self) -> str:
        return self.table.licence

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the data files and, in order, every picture file the rows point to."""
        digest = hashlib.sha256(self.table.digest.encode())
        for rows in self._rows:
            for where in self._images(rows[0]):
                if isinstance(where, Path):
                    digest.update(_file_digest(where))
        return digest.hexdigest()

    @cached_property
    def origin(self) -> str:
        """sha256 over the data files and the sizes of all pictures in files of their own: the same for all splits and parts of them."""
        digest, sized = hashlib.sha256(self.table.digest.encode()), False
        for row in range(len(self.table)) if self.kind.pictures else ():
            try:
                images = self._images(row)
                sizes = [image.stat().st_size for image in images if isinstance(image, Path)]
            except (BadInput, OSError):
                sizes = []
            else:
                if not sizes:  # the pictures lie in the data files
                    break
            digest.update(f"{sizes}".encode())
            sized = sized or bool(sizes)
        return digest.hexdigest() if sized else self.table.digest

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> T:
        place = index = range(len(self))[index]
        for attempt in range(ATTEMPTS):
            if found := self.usable([place]):
                return found[0]
            place = int(generator(SPLIT_SEED, "instead", self._keys[index], attempt).integers(len(self)))
        raise BadInput(f"data {self.name}", f"of {ATTEMPTS} pictures drawn none could be read", "mend the data")

    def usable(self, indices: Sequence[int]) -> list[T]:
        """The samples of `indices` without those that cannot be read."""
        found = []
        for index in indices:
            item, wrong = self._read(index)
            for error in wrong:
                self.skips.add(error, place=index if item is None else None)
            if item is not None:
                found.append(item)
        return found

    def texts(self) -> Iterator[str]:
        for contents in self._contents:
            yield from self.kind.texts(contents)

    def contents(self) -> Iterator[list[Any]]:
        yield from self._contents

    def ids(self) -> Iterator[str | None]:
        """Those of samples with pictures are their keys; of others they may follow from what is said."""
        if self.kind.pictures:
            yield from self._keys
        else:
            yield from (getattr(self._read(index)[0], "id", None) for index in range(len(self)))

    def values_of(self, role: str) -> list[Any]:
        """All cells of a role, of rows that another split has or that were not drawn too."""
        return self._said.get(role, [])

    def listed_in(self, role: str) -> list[str]:
        """The classes that the data's own schema lists for a role; none where there is no such list."""
        names: list[str] = getattr(self.table, "class_names", {}).get(self.columns.get(role), [])
        return names

    def _read(self, index: int) -> tuple[T | None, list[BadInput]]:
        """The sample without the rows that do not fit its pictures, and what is wrong; None if a picture cannot be read, or no row fits."""
        wrong: list[BadInput] = []
        try:
            pictures = self._pictures(index)
            said = [row for row in self._said_at(index) if self._fits(row, pictures, wrong)]
            return (self.kind.item(self._keys[index], pictures, said) if said else None), wrong
        except BadInput as error:
            return None, [*wrong, error]

    def _pictures(self, index: int) -> list[Picture]:
        first = self._rows[index][0]
        where = self.table.where(first)
        return [Picture(*open_sized(image, self.size, where), self.size) for image in self._images(first)]

    def _said_at(self, index: int) -> Iterator[Row[Any]]:
        for row, content in zip(self._rows[index], self._contents[index], strict=True):
            yield Row(content, self.table.where(row))

    def _fits(self, row: Row[Any], pictures: list[Picture], wrong: list[BadInput]) -> bool:
        """Whether a row fits its pictures; if not, `wrong` says why."""
        try:
            self.kind.check(row, pictures)
        except BadInput as error:
            wrong.append(error)
            return False
        return True

    def _groups(self) -> dict[str, list[int]]:
        """Rows by image: by the image_id column, else by the path of the image or the hash of its bytes."""
        groups: dict[str, list[int]] = {}
        ids = self.table.column(self.columns["image_id"]) if "image_id" in self.columns else None
        for row in range(len(self.table)):
            try:
                key = self._path_key(row) if ids is None or is_missing(ids[row]) else self._id_key(row, ids[row])
            except BadInput as error:
                self.skips.add(error)
                continue
            groups.setdefault(key, []).append(row)
        return groups

    def _id_key(self, row: int, value: Any) -> str:
        key = text_of(value)
        if key is None:
            fix = "an image_id is a text or a number; --column image_id=none leaves the column out"
            raise BadInput(self.table.where(row), f"its {self.columns['image_id']} is no name ({shorten(repr(value), 80)})", fix)
        return key

    def _images(self, row: int) -> list[bytes | Path]:
        """The encoded pictures of a row, or where their files are."""
        kind, where = self.kind, self.table.where(row)
        if kind.listed in self.columns:
            return several(kind, self.table.images(row, self.columns[kind.listed]), where)
        return several(kind, [self.table.image(row, self.columns[role]) for role in kind.pictures], where)

    def _path_key(self, row: int) -> str:
        """By the pictures; where there are none, every row is a sample of its own."""
        return " ".join(map(self._name_of, self._images(row))) if self.kind.pictures else str(row)

    def _name_of(self, image: bytes | Path) -> str:
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()[:16]
        return Path(os.path.relpath(image, self.table.base)).as_posix().encode("utf-8", "backslashreplace").decode()

    def _keep(self, key: str, rows: list[int]) -> None:
        """Add the image `key` with those of its rows that can be used."""
        kept: list[int] = []
        contents: list[Any] = []
        first: list[bytes | Path] | None = None
        for row in rows:
            try:
                if "image_id" in self.columns:
                    images = self._images(row)
                    if first is not None and not all(map(_same, first, images)):
                        what = f"{self.columns['image_id']} {key} is another picture than in {self.table.where(kept[0])}"
                        raise BadInput(self.table.where(row), what, "give every picture an id of its own")
                    content = self._content(row)
                    first = first if first is not None else images
                else:
                    content = self._content(row)
            except BadInput as error:
                self.skips.add(error)
                continue
            kept.append(row)
            contents.append(content)
        if kept:
            self._keys.append(key)
            self._rows.append(kept)
            self._contents.append(contents)

    def _content(self, row: int) -> Any:
        values = {role: column[row] for role, column in self._said.items()}
        return self.kind.content(values, self.table.where(row), self.columns)


def several(kind: Kind[Any, Any], images: list[bytes | Path], where: str) -> list[bytes | Path]:
    """`images` of a row; :class:`BadInput` if they are not as many as a sample of `kind` has, or one of them is there twice."""
    if len(images) != len(kind.pictures):
        raise BadInput(where, f"it has {number_of(len(images), 'picture')}, and takes {len(kind.pictures)}", "mend or remove the row")
    if any(image in images[:at] for at, image in enumerate(images)):
        name = next((shorten(str(image)) for image in images if isinstance(image, Path)), "the same bytes")
        raise BadInput(where, f"one picture is there twice ({name})", "name the picture that is meant, or remove the row")
    return images


def find_columns(have: Sequence[str], kind: Kind[Any, Any], columns: Mapping[str, str], spec: str) -> dict[str, str]:
    """role → column, by `columns` or by the usual names; a role that `columns` gives no name, or `none`, is left out.

    A column that lists the pictures is found where not each of them has one of its own, or where `columns` names it.

    Raises:
        BadInput: an unknown role, a column that is not there, or a required role without one; lists the columns found.
    """
    roles, required = kind.roles, kind.required
    listed = f"columns found: {shorten(', '.join(have)) or 'none'}"
    unknown = [role for role in columns if role not in roles]
    if unknown:
        raise BadInput(f"--column {unknown[0]}={columns[unknown[0]]}", f"there is no role {unknown[0]}", f"roles are {', '.join(roles)}")
    found: dict[str, str] = {}
    for role, names in roles.items():
        name = columns.get(role)
        if name in LEFT_OUT and name not in have:
            if role in required:
                raise BadInput(f"--column {role}={name}", f"{role} cannot be left out", f"--column {role}=<name>; {listed}")
        elif name is not None:
            if name not in have:
                raise BadInput(f"data {spec} has no column {shorten(name)}", listed, f"--column {role}=<name>")
            found[role] = name
        elif usual := next((usual for usual in names if usual in have), None):
            found[role] = usual
    if kind.listed in found:
        together = kind.listed in columns or any(role not in found for role in kind.pictures)
        for role in kind.pictures if together else (kind.listed,):
            found.pop(role, None)
        required = tuple(role for role in required if not together or role not in kind.pictures)
    missing = [role for role in required if role not in found]
    if missing:
        raise BadInput(
            f"data {spec} has no column for {' and '.join(missing)}",
            listed,
            "say which: " + " ".join(f"--column {role}=<name>" for role in missing),
        )
    return found


def _file_digest(path: Path) -> bytes:
    try:
        return bytes.fromhex(sha256(path))
    except BadInput:
        return b"unreadable"


def _same(first: bytes | Path, second: bytes | Path) -> bool:
    """Whether two image cells are one picture: one file, or equal bytes."""
    if isinstance(first, Path) and isinstance(second, Path):
        return first == second or _file_digest(first) == _file_digest(second)
    return first == second
