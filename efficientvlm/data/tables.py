"""Rows of a user's own data: JSONL, parquet, or a folder that Hugging Face `datasets` saved.

Text is at hand; images are read when asked for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from efficientvlm.errors import BadInput

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


class Table(Protocol):
    """Rows with named columns."""

    columns: list[str]
    licence: str
    base: Path
    """Folder that image paths are relative to."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """All values of a column that holds no images; None where a row lacks it."""

    def image(self, row: int, name: str) -> bytes | Path:
        """The encoded image in a row, or where its file is."""

    def where(self, row: int) -> str:
        """How to find a row, for messages."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the files the rows come from, not of pictures they point to."""


def open_table(spec: str, split: str) -> tuple[Table, bool]:
    """The rows of one split, and whether the caller must still hold out its validation part.

    A single file or `save_to_disk` folder serves train and val together and, whole, as test. A folder with one file (or several parquet
    shards) a split, or a saved `DatasetDict`, is used as it is split; without a validation split that is held out from train.

    Raises:
        BadInput: not there, of an unknown form, or without the split.
    """
    path = Path(spec)
    if path.is_file():
        return _open_files([path]), split != "test"
    if (path / "dataset_dict.json").is_file():
        found: dict[str, list[Path]] = {name.name: [name] for name in sorted(path.iterdir()) if (name / "state.json").is_file()}
    elif (path / "state.json").is_file():
        return SavedTable(path), split != "test"
    else:
        found = _split_files(path)
    names = {role: name for role, known in SPLIT_NAMES.items() for name in found if name in known}
    if split in names:
        chosen, hold_out = split, split == "train" and "val" not in names
    elif split == "val" and "train" in names:
        chosen, hold_out = "train", True
    else:
        have = f"it has {', '.join(found)}" if found else f"it holds no {', '.join(SUFFIXES)} file and nothing that datasets saved"
        raise BadInput(f"data {spec} has no split {split}", have, "name the files train.jsonl, val.jsonl, test.jsonl (or .parquet)")
    files = found[names[chosen]]
    return (SavedTable(files[0]) if files[0].is_dir() else _open_files(files)), hold_out


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder (or of its subfolder `data`) by split; the name of a shard goes on after a `-`."""
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.suffix in SUFFIXES and path.is_file():
                found.setdefault(path.stem.partition("-")[0], []).append(path)
        if found:
            return found
    return {}


def _open_files(paths: list[Path]) -> Table:
    kinds = {path.suffix for path in paths}
    if kinds == {".parquet"}:
        return ParquetTable(paths)
    if len(paths) == 1 and kinds <= {".jsonl", ".ndjson"}:
        return JsonlTable(paths[0])
    listed = ", ".join(path.name for path in paths)
    raise BadInput(
        f"data {paths[0].parent}", f"cannot use {listed} as one split", f"give one {', '.join(SUFFIXES[:2])} file or parquet files"
    )


class JsonlTable:
    """One JSON object a line; an image is a path relative to the file, or base64. Lines are read again when an inline image is needed."""

    licence = "unknown"

    def __init__(self, path: Path) -> None:
        self.path, self.base = path, path.parent
        self._offsets: list[int] = []
        self._lines: list[int] = []
        self._values: dict[str, list[Any]] = {}
        digest = hashlib.sha256()
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    self._add(line, offset, number)
                offset += len(line)
        self.digest = digest.hexdigest()
        for values in self._values.values():
            values.extend([None] * (len(self) - len(values)))
        self.columns = list(self._values)

    def _add(self, line: bytes, offset: int, number: int) -> None:
        row = len(self._offsets)
        for name, value in self._parse(line, number).items():
            if (isinstance(value, str) and len(value) > LONG) or isinstance(value, dict):
                value = INLINE
            values = self._values.setdefault(name, [])
            values.extend([None] * (row - len(values)))
            values.append(value)
        self._offsets.append(offset)
        self._lines.append(number)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{self.path} line {number}", f"it is not JSON ({error})", "write one JSON object a line") from None
        if not isinstance(parsed, dict):
            raise BadInput(f"{self.path} line {number}", "it is not a JSON object", "write one JSON object a line")
        return parsed

    def __len__(self) -> int:
        return len(self._offsets)

    def column(self, name: str) -> list[Any]:
        return [self._reread(row)[name] if value is INLINE else value for row, value in enumerate(self._values[name])]

    def image(self, row: int, name: str) -> bytes | Path:
        value = self._values[name][row]
        return encoded(self._reread(row)[name] if value is INLINE else value, self.base, self.where(row))

    def where(self, row: int) -> str:
        return f"{self.path} line {self._lines[row]}"

    def _reread(self, row: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[row])
            return self._parse(file.readline(), self._lines[row])


LONG = 1000  # a longer string is not kept in memory: an image in base64, most likely
INLINE = object()


class SavedTable:
    """A folder written by `Dataset.save_to_disk`."""

    def __init__(self, path: Path) -> None:
        from datasets import load_from_disk

        self.path = self.base = path
        try:
            self._keep(load_from_disk(str(path)))
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"data {path}", f"datasets cannot open it ({error})") from None

    def _keep(self, data: Any) -> None:
        from datasets import Image

        self.columns: list[str] = list(data.column_names)
        self.licence: str = data.info.license or "unknown"
        pictures = {name: feature for name, feature in data.features.items() if isinstance(feature, Image)}
        for name in pictures:
            data = data.cast_column(name, Image(decode=False))
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self._data.select_columns([name]).to_dict()[name]
        return values

    def image(self, row: int, name: str) -> bytes | Path:
        return encoded(self._data[row][name], self.base, self.where(row))

    def where(self, row: int) -> str:
        return f"{self.path} row {row}"

    @property
    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.suffix == ".arrow")

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class ParquetTable(SavedTable):
    """Parquet files; `datasets` keeps a memory-mapped copy in its cache, so that any row is found at once."""

    def __init__(self, paths: list[Path]) -> None:
        import datasets
        import pyarrow

        self.paths, self.path, self.base = paths, paths[0] if len(paths) == 1 else paths[0].parent, paths[0].parent
        shown = datasets.is_progress_bar_enabled()
        try:
            datasets.disable_progress_bars()
            self._keep(datasets.Dataset.from_parquet([str(path) for path in paths]))
        except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise BadInput(f"data {self.path}", f"it cannot be read as parquet ({str(error.__cause__ or error).splitlines()[0]})") from None
        finally:
            if shown:
                datasets.enable_progress_bars()

    @property
    def _files(self) -> list[Path]:
        return self.paths


def encoded(value: Any, base: Path, where: str) -> bytes | Path:
    """An image cell as bytes or an existing file: a path, base64 (also as a data URL), bytes, or {bytes, path}.

    Raises:
        BadInput: empty, or neither a file nor base64 of a picture; names `where`.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise BadInput(where, f"it has no image ({value!r})" if not isinstance(value, str) else "its image is empty", "remove the row")
    if not value.startswith("data:") and len(value) <= LONG:
        path = Path(os.path.join(base, value))
        if path.is_file():
            return path
    try:
        data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if data.startswith(MAGIC):
        return data
    if len(value) > LONG or value.startswith("data:"):
        raise BadInput(where, "its image is no base64 of a picture", "store a path relative to the file, or base64 of a PNG or JPEG")
    raise BadInput(where, f"there is no image {value} in {base}", "image paths are relative to the folder of the data file")
