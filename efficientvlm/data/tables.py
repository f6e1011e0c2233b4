"""Rows of a user's own data, and the tables that Hugging Face `datasets` reads. Text is at hand; images are read when asked for."""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from efficientvlm.checkpoints.files import open_plain, sha256
from efficientvlm.data.cells import listed
from efficientvlm.errors import BadInput, shorten

MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
LONG = 1000  # a longer string is not kept in memory: an image in base64, most likely


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

    def images(self, row: int, name: str) -> list[bytes | Path]:
        """The same of a column that lists several."""

    def where(self, row: int) -> str:
        """How to find a row, for messages."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the files the rows come from, not of pictures they point to."""


class MemoryTable:
    """Rows that are small enough to be held: column → values, all of one length."""

    licence = "unknown"

    def __init__(self, values: dict[str, list[Any]], base: Path, where: Callable[[int], str], digest: str) -> None:
        self.columns, self.base, self.digest = list(values), base, digest
        self._values, self._where = values, where

    def __len__(self) -> int:
        return len(next(iter(self._values.values()), ()))

    def column(self, name: str) -> list[Any]:
        return self._values[name]

    def image(self, row: int, name: str) -> bytes | Path:
        value = self._values[name][row]
        return value if isinstance(value, Path) else encoded(value, self.base, self.where(row))

    def images(self, row: int, name: str) -> list[bytes | Path]:
        return encoded_list(self._values[name][row], self.base, self.where(row))

    def where(self, row: int) -> str:
        return self._where(row)


class Selection:
    """Some rows of a table."""

    def __init__(self, table: Table, rows: list[int]) -> None:
        self.columns, self.licence, self.base, self.digest = table.columns, table.licence, table.base, table.digest
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        values = self._table.column(name)
        return [values[row] for row in self._rows]

    def image(self, row: int, name: str) -> bytes | Path:
        return self._table.image(self._rows[row], name)

    def images(self, row: int, name: str) -> list[bytes | Path]:
        return self._table.images(self._rows[row], name)

    def where(self, row: int) -> str:
        return self._table.where(self._rows[row])


class SavedTable:
    """A folder written by `Dataset.save_to_disk`."""

    def __init__(self, path: Path) -> None:
        from datasets import load_from_disk

        self.path = self.base = path
        try:
            self._keep(load_from_disk(str(path)))
        except Exception as error:  # noqa: BLE001  on damaged files the library raises whatever it stumbles over
            raise BadInput(f"data {path}", f"datasets cannot open it ({one_line(error)})", "save or copy it again") from None

    def _keep(self, data: Any) -> None:
        from datasets import ClassLabel, Image

        self.columns: list[str] = list(data.column_names)
        self.licence: str = data.info.license or "unknown"
        for name, feature in data.features.items():
            if isinstance(feature, Image):
                data = data.cast_column(name, Image(decode=False))
            elif isinstance(inner_of(feature), Image):
                data = data.cast_column(name, [Image(decode=False)])
        self._data, self._readers = data, readers(data.features)
        self.class_names = {name: list(feature.names) for name, feature in data.features.items() if isinstance(feature, ClassLabel)}
        """Column of class labels → all of their names."""
        self._alone: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._data)

    def column(self, name: str) -> list[Any]:
        try:
            values: list[Any] = self._data.select_columns([name]).to_dict()[name]
        except UnicodeDecodeError:
            raise BadInput(f"data {self.path}", f"its column {name} is not UTF-8 text", "write it again") from None
        return list(map(self._readers[name], values)) if name in self._readers else values

    def image(self, row: int, name: str) -> bytes | Path:
        return encoded(self._cell(row, name), self.base, self.where(row))

    def images(self, row: int, name: str) -> list[bytes | Path]:
        return encoded_list(self._cell(row, name), self.base, self.where(row))

    def _cell(self, row: int, name: str) -> Any:
        if name not in self._alone:  # a whole row would be decoded, with columns that nobody asked for
            self._alone[name] = self._data.select_columns([name])
        try:
            return self._alone[name][row][name]
        except UnicodeDecodeError:
            raise BadInput(self.where(row), f"its {name} is not UTF-8 text", "mend or remove the row") from None

    def where(self, row: int) -> str:
        return f"{self.path} row {row}"

    @property
    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.suffix == ".arrow")

    @cached_property
    def digest(self) -> str:
        return digest_of(self._files)


class ParquetTable(SavedTable):
    """Parquet files; `datasets` keeps a memory-mapped copy in its cache, by the digest of the files, so that any row is found at once."""

    def __init__(self, paths: list[Path]) -> None:
        import datasets
        import pyarrow.parquet

        self.paths, self.path, self.base = paths, paths[0] if len(paths) == 1 else paths[0].parent, paths[0].parent
        shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
        try:
            rows = 0
            for path in paths:
                with open_plain(path) as file:
                    rows += pyarrow.parquet.read_metadata(file).num_rows  # before a file that is none is hashed
            if not rows:
                raise BadInput(f"data {self.path}", "it has no rows", "check the files")
            cache = Path(datasets.config.HF_DATASETS_CACHE) / "efficientvlm" / self.digest[:32]
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # of damage it would write a line of its own
            names = [glob.escape(str(path)) for path in paths]  # which the library takes for patterns
            self._keep(datasets.Dataset.from_parquet(names, cache_dir=str(cache)))
        except BadInput:
            raise
        except Exception as error:  # noqa: BLE001  as above
            raise BadInput(
                f"data {self.path}", f"it cannot be read as parquet ({one_line(error.__cause__ or error)})", "write or copy it again"
            ) from None
        finally:
            datasets.logging.set_verbosity(level)
            if shown:
                datasets.enable_progress_bars()

    @property
    def _files(self) -> list[Path]:
        return self.paths


def readers(features: Mapping[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """Column → what makes of its values what they mean, where that is needed: names of class labels, and float32 with its own digits."""
    found = {name: _reader(feature) for name, feature in features.items()}
    return {name: read for name, read in found.items() if read is not None}


def read_as(row: dict[str, Any], means: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """A row with what :func:`readers` make of its values."""
    return {name: means[name](value) if name in means else value for name, value in row.items()} if means else row


def _reader(feature: Any) -> Callable[[Any], Any] | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names: list[str] = list(feature.names)
        return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    if isinstance(feature, datasets.Value):
        kind = {"float16": np.float16, "float32": np.float32}.get(feature.dtype)
        return None if kind is None else lambda value: None if value is None else float(str(kind(value)))  # 0.1, not 0.10000000149
    if isinstance(feature, dict) and (parts := readers(feature)):
        return lambda value: value and read_as(value, parts)
    inner = inner_of(feature)
    if inner is None or (read := _reader(inner)) is None:
        return None
    return lambda value: value and [read(part) for part in value]


def inner_of(feature: Any) -> Any:
    """What a feature of `datasets` is a list of; None if it is of no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def encoded_list(value: Any, base: Path, where: str) -> list[bytes | Path]:
    """As :func:`encoded`, of a cell that lists several pictures, also as text.

    Raises:
        BadInput: it is no list; names `where`.
    """
    found = listed(value, where, "list of images")
    if not isinstance(found, list):
        what = "it has no images" if found is None else f"its images are no list ({shorten(repr(found), 80)})"
        raise BadInput(where, what, 'list their paths, as ["left.png", "right.png"]')
    return [encoded(entry, base, where) for entry in found]


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
        raise BadInput(
            where, f"it has no image ({shorten(repr(value), 80)})" if not isinstance(value, str) else "its image is empty", "remove the row"
        )
    if not value.startswith("data:") and len(value) <= LONG:
        path = Path(os.path.join(base, value))
        if os.path.isfile(path):
            return path
        if os.path.exists(path):
            raise BadInput(where, f"its image {shorten(value)} is no file", "image paths are those of files")
    try:
        data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if data.startswith(MAGIC):
        return data
    if len(value) > LONG or value.startswith("data:"):
        raise BadInput(where, "its image is no base64 of a picture", "store a path relative to the file, or base64 of a PNG or JPEG")
    raise BadInput(where, f"there is no image {shorten(value)} in {base}", "image paths are relative to the folder of the data file")


def digest_of(paths: list[Path]) -> str:
    """sha256 (hex) over the sha256 of each file."""
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(path)) for path in paths)).hexdigest()


def one_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    return shorten(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)
