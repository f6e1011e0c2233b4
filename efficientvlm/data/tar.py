"""Tar shards in the layout of WebDataset (`000.jpg 000.txt 000.json ...`), read in place."""

from __future__ import annotations

import json
import os
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from efficientvlm.data.images import LARGEST_PICTURE, PICTURES
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import digest_of
from efficientvlm.data.text_tables import caption_lines, is_unicode, opened
from efficientvlm.errors import BadInput, shorten

LARGEST_TEXT = 10_000_000
TEXTS = (".txt", ".json", ".cls")
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)

Place = tuple[int, int]
"""Where the content of a file begins in a shard, and its bytes."""


class Header(tarfile.TarInfo):
    """A header that does not pass for the end of the archive when it is damaged or missing, as `tarfile` would have it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if archive.offset == 0 or isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError("no header of a file, nor the mark of the end") from None


class Index(NamedTuple):
    """What a shard holds: (name, offset, bytes) of each file, and where and why it ends too early, if it does."""

    members: list[tuple[str, int, int]]
    broken: tuple[int, str] | None


class TarTable:
    """Samples of shards; a picture is column `image` or as its ending says, texts are columns by their endings, `.json` by its keys."""

    licence = "unknown"

    def __init__(self, paths: list[Path], skips: Skips) -> None:
        self.paths, self.base = paths, paths[0].parent
        self._places: list[tuple[Path, str, dict[str, Place]]] = []
        values: dict[str, list[Any]] = {}
        indices = [read_index(path) for path in paths]
        held = [samples(index.members) for index in indices]
        for path, index, here in zip(paths, indices, held, strict=True):
            with opened(path) as file:
                for key, parts in here.items():
                    try:
                        pictures, row = row_of(file, path, key, parts)
                    except BadInput as error:
                        skips.add(error)
                        continue
                    for name in row:
                        values.setdefault(name, [None] * len(self._places))
                    self._places.append((path, key, pictures))
                    for name, column in values.items():
                        column.append(row.get(name))
            if index.broken:
                offset, why = index.broken
                by_size = round(len(here) * (path.stat().st_size - offset) / max(1, offset))
                lost = max(1, by_size, max(map(len, held)) - len(here))  # shards are mostly of one length
                skips.add(BadInput(f"shard {path}", f"{why} at byte {offset:,}", "download or write the shard again"), lost)
        self._values, self.columns = values, list(values) or ["image"]

    @cached_property
    def digest(self) -> str:
        return digest_of(self.paths)

    def __len__(self) -> int:
        return len(self._places)

    def column(self, name: str) -> list[Any]:
        return self._values.get(name, [])

    def image(self, row: int, name: str) -> bytes | Path:
        path, _, pictures = self._places[row]
        if name not in pictures:
            raise BadInput(self.where(row), f"it has no picture {name}", "remove the sample")
        with opened(path) as file:
            return read_at(file, pictures[name])

    def images(self, row: int, name: str) -> list[bytes | Path]:
        fix = "call the pictures of a sample left.png and right.png, behind its name"
        raise BadInput(self.where(row), f"its {name} are no files of the shard", fix)

    def where(self, row: int) -> str:
        path, key, _ = self._places[row]
        return f"{path} sample {key}"


def read_index(path: Path) -> Index:
    """What a shard holds.

    Raises:
        BadInput: no tar file, or a compressed one.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
                return Index(*_members(archive, size))
        except DAMAGE as error:
            file.seek(0)
            zipped = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
            fix = "unpack it: a compressed shard cannot be read out of order" if zipped else "give a .tar file"
            raise BadInput(f"shard {path}", f"it cannot be read as a tar file ({error})", fix) from None


def _members(archive: tarfile.TarFile, size: int) -> tuple[list[tuple[str, int, int]], tuple[int, str] | None]:
    """The files of a shard, and where and why it breaks off, if it does."""
    members: list[tuple[str, int, int]] = []
    end = 0
    try:
        for member in archive:
            if member.isreg() and is_unicode(member.name):
                if member.offset_data + member.size > size:
                    return members, (member.offset, f"{shorten(member.name)} is cut short")
                members.append((member.name, member.offset_data, member.size))
            end = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # a shard may have millions
    except (*DAMAGE, OSError, EOFError) as error:
        return members, (end, f"it is damaged ({error})")
    return members, None


def part_of(name: str) -> tuple[str, str] | None:
    """The sample that a file of a shard belongs to, its name up to the first dot, and its ending in lower case; None if it has not both."""
    folder, _, file = os.path.normpath(name).rpartition("/")
    stem, _, ending = file.partition(".")
    if not stem or not ending:
        return None
    return f"{folder}/{stem}" if folder else stem, f".{ending.lower()}"


def samples(members: list[tuple[str, int, int]]) -> dict[str, dict[str, list[Place]]]:
    """Sample → ending → places of its files, wherever in the shard they stand: more than one are of two samples with one name."""
    found: dict[str, dict[str, list[Place]]] = {}
    for name, offset, size in members:
        if part := part_of(name):
            found.setdefault(part[0], {}).setdefault(part[1], []).append((offset, size))
    return found


def picture_column(ending: str) -> str | None:
    """The column of a picture by its ending, `image` for `.jpg` and `left` for `.left.jpg`; None for what is no picture."""
    name, _, kind = ending.removeprefix(".").rpartition(".")
    return (name or "image") if f".{kind}" in PICTURES else None


def row_of(file: BinaryIO, path: Path, key: str, parts: dict[str, list[Place]]) -> tuple[dict[str, Place], dict[str, Any]]:
    """Where the pictures of a sample lie, by column, and its row; :class:`BadInput` where it has none, or is damaged."""
    where = f"{path} sample {key}"
    wanted = {ending: places for ending, places in parts.items() if picture_column(ending) or ending in TEXTS}
    check_parts([ending for ending, places in wanted.items() for _ in places], where)
    for ending, ((_, size),) in wanted.items():
        check_size(ending, size, where)
    pictures = {column: place for ending, (place,) in wanted.items() if (column := picture_column(ending))}
    if not pictures:
        raise BadInput(
            where, f"it has no picture (files of one name up to the first dot: {shorten(', '.join(parts))})", "remove the sample"
        )
    texts = text_columns({ending: read_at(file, place) for ending, (place,) in wanted.items() if ending in TEXTS}, where)
    return pictures, dict.fromkeys(pictures) | {name: value for name, value in texts.items() if name not in pictures}


def check_parts(endings: list[str], where: str) -> None:
    """:class:`BadInput` for a sample with two files of one ending, or two pictures of one column."""
    if twice := next((ending for ending in endings if endings.count(ending) > 1), None):
        raise BadInput(where, f"there are {endings.count(twice)} files {twice} of this name", "give every sample a name of its own")
    for column in filter(None, dict.fromkeys(map(picture_column, endings))):
        if len(pictures := [ending for ending in endings if picture_column(ending) == column]) > 1:
            raise BadInput(where, f"it has {len(pictures)} pictures, {' and '.join(pictures)}", "keep one of them")


def check_size(ending: str, size: int, where: str) -> None:
    """:class:`BadInput` for a file that is too large to be what its ending says."""
    most = LARGEST_PICTURE if picture_column(ending) else LARGEST_TEXT
    if size > most:
        raise BadInput(where, f"its {ending} has {size:,} bytes, at most {most:,} are read", "remove the sample")


def text_columns(parts: dict[str, bytes], where: str) -> dict[str, Any]:
    """Columns of a sample's `.txt` (column text, a line or a list of them), `.cls` (column cls) and `.json` (its keys, but not `image`)."""
    row: dict[str, Any] = {}
    try:
        if ".json" in parts:
            parsed = json.loads(parts[".json"].decode("utf-8-sig"))
            if not isinstance(parsed, dict):
                raise BadInput(where, "its .json is no object", "write a JSON object")
            row = {name: value for name, value in parsed.items() if name != "image"}
            if not is_unicode(json.dumps(parsed, ensure_ascii=False)):
                raise BadInput(where, "its .json holds half of a surrogate pair", "save it as UTF-8")
        if ".txt" in parts:
            lines = caption_lines(parts[".txt"])
            row["text"] = lines[0] if len(lines) == 1 else lines
        if ".cls" in parts:
            row["cls"] = parts[".cls"].decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadInput(where, "its text is not UTF-8", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"its .json is not JSON ({error})", "mend or remove the sample") from None
    return row


def read_at(file: BinaryIO, place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])
