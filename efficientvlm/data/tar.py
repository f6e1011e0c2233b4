"""Tar shards in the layout of WebDataset (`000.jpg 000.txt 000.json ...`), read in place: each shard is indexed once."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from efficientvlm.data.skips import Skips
from efficientvlm.data.text_tables import is_unicode, opened
from efficientvlm.errors import BadInput
from efficientvlm.files import write_atomic

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LARGEST_TEXT = 10_000_000
VERSION = 1


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
    """What a shard holds: (name, offset, bytes) of each file, where and why it ends too early, if it does, and the shard's sha256."""

    members: list[tuple[str, int, int]]
    broken: tuple[int, str] | None
    sha256: str


class TarTable:
    """Samples of one or several shards; a picture is column `image`, other files are columns by their endings, `.json` by its keys."""

    licence = "unknown"

    def __init__(self, paths: list[Path], skips: Skips) -> None:
        self.base = paths[0].parent
        self._places: list[tuple[Path, str, tuple[int, int] | None]] = []
        values: dict[str, list[Any]] = {"image": []}
        digest = hashlib.sha256()
        indices = [indexed(path) for path in paths]
        held = [samples(index.members) for index in indices]
        for path, index, here in zip(paths, indices, held, strict=True):
            digest.update(index.sha256.encode())
            with opened(path) as file:
                for key, parts in here:
                    try:
                        picture, row = _row(file, path, key, parts)
                    except BadInput as error:
                        skips.add(error)
                        continue
                    for name in row:
                        values.setdefault(name, [None] * len(self._places))
                    self._places.append((path, key, picture))
                    for name, column in values.items():
                        column.append(row.get(name))
            if index.broken:
                offset, why = index.broken
                by_size = round(len(here) * (path.stat().st_size - offset) / max(1, offset))
                lost = max(1, by_size, max(map(len, held)) - len(here))  # shards are mostly of one length
                skips.add(BadInput(f"shard {path}", f"{why} at byte {offset:,}", "download or write the shard again"), lost)
        self.digest = digest.hexdigest()
        self._values, self.columns = values, list(values)

    def __len__(self) -> int:
        return len(self._places)

    def column(self, name: str) -> list[Any]:
        return self._values[name]

    def image(self, row: int, name: str) -> bytes | Path:
        path, _, place = self._places[row]
        if place is None:
            raise BadInput(self.where(row), "it has no picture", "remove the sample")
        with opened(path) as file:
            return _read(file, place)

    def where(self, row: int) -> str:
        path, key, _ = self._places[row]
        return f"{path} sample {key}"


def indexed(path: Path) -> Index:
    """The index of a shard, from the cache if it was made before and the shard has its size and time of then.

    Raises:
        BadInput: no tar file, or a compressed one.
    """
    with opened(path) as file:
        status = os.fstat(file.fileno())
    key = f"{VERSION}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    cached = cache_folder() / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    try:
        stored = json.loads(cached.read_text("utf-8"))
        members = [(str(name), int(offset), int(size)) for name, offset, size in stored["members"]]
        broken = (int(stored["broken"][0]), str(stored["broken"][1])) if stored["broken"] else None
        return Index(members, broken, str(stored["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass  # none yet, or a damaged one
    index = read_index(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, json.dumps(index._asdict()).encode())
    except OSError:
        pass  # a cache that cannot be written costs time, no more
    return index


def read_index(path: Path) -> Index:
    """What a shard holds.

    Raises:
        BadInput: no tar file, or a compressed one.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
                return Index(*_members(archive, size), sha256)
        except (tarfile.TarError, ValueError, OverflowError) as error:
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
                    return members, (member.offset, f"{member.name} is cut short")
                members.append((member.name, member.offset_data, member.size))
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError) as error:
        return members, (end, f"it is damaged ({error})")
    return members, None


def samples(members: list[tuple[str, int, int]]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Files that follow each other and share a name up to the first dot: (name, ending → (offset, bytes))."""
    found: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for name, offset, size in members:
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        if not stem or not ending:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if not found or found[-1][0] != key:
            found.append((key, {}))
        found[-1][1][f".{ending.lower()}"] = (offset, size)
    return found


def _row(file: Any, path: Path, key: str, parts: dict[str, tuple[int, int]]) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
    texts = {}
    for ending, place in parts.items():
        if ending in (".txt", ".json"):
            if place[1] > LARGEST_TEXT:
                raise BadInput(f"{path} sample {key}", f"its {ending} has {place[1]:,} bytes", "remove the sample")
            texts[ending] = _read(file, place)
    return picture, text_columns(texts, f"{path} sample {key}")


def text_columns(parts: dict[str, bytes], where: str) -> dict[str, Any]:
    """Columns of a sample's `.txt` (column text) and `.json` (its keys, but not `image`)."""
    row: dict[str, Any] = {}
    try:
        if ".json" in parts:
            parsed = json.loads(parts[".json"].decode("utf-8"))
            if not isinstance(parsed, dict):
                raise BadInput(where, "its .json is no object", "write a JSON object")
            row = {name: value for name, value in parsed.items() if name != "image"}
            if not is_unicode(json.dumps(parsed, ensure_ascii=False)):
                raise BadInput(where, "its .json holds half of a surrogate pair", "save it as UTF-8")
        if ".txt" in parts:
            row["text"] = parts[".txt"].decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadInput(where, "its text is not UTF-8", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"its .json is not JSON ({error})", "mend or remove the sample") from None
    return row


def cache_folder() -> Path:
    """Where indices are kept: `efficientvlm/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficientvlm" / "shards"


def _read(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    content: bytes = file.read(place[1])
    return content
