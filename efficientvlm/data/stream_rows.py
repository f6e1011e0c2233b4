"""The rows of one file, from its beginning to its end: JSON lines, CSV, parquet or tar, on disk or at an address."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from efficientvlm.data.tables import one_line, read_as, readers
from efficientvlm.data.tar import DAMAGE, TEXTS, Header, check_parts, check_size, part_of, picture_column, text_columns
from efficientvlm.data.text_tables import csv_rows, json_rows, opened
from efficientvlm.errors import BadInput, without_secrets

ROWS_AT_A_TIME = 64
BYTES_AT_A_TIME = 1 << 20


class Undecodable:
    """Stands in a row for what cannot be decoded, so that whoever reads it refuses it by its column."""

    def __repr__(self) -> str:
        return "text that is not UTF-8"


@dataclass(slots=True)
class Raw:
    """A row as it was read: values by column, or the problem that kept it from being read; image paths are relative to `base`."""

    values: dict[str, Any]
    base: Path
    where: str
    problem: BadInput | None = None


def read_file(name: str) -> Iterator[Raw]:
    """Rows of a file or address, by its ending.

    Raises:
        BadInput: unreachable, of an unknown kind, damaged beyond a row, or an address of which reading broke off.
    """
    kind = "".join(Path(name.partition("?")[0]).suffixes[-2:]).lower()
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = next((known for ending, known in readers.items() if kind.endswith(ending)), None)
    if reader is None and (".tar" in kind or kind.endswith(".tgz")):
        reader = _tar
    if reader is None:
        raise BadInput(f"data {name}", "such a file cannot be streamed", f"use {', '.join(readers)} or .tar")
    base = Path() if "://" in name else Path(name).parent
    with _open(name) as file:
        yield from reader(file, without_secrets(name), base)


@contextlib.contextmanager
def _open(name: str) -> Iterator[IO[bytes]]:
    if "://" not in name:
        with opened(Path(name)) as file:
            yield file
        return
    import fsspec

    try:
        remote = fsspec.open(name, "rb").open()
    except Exception as error:  # noqa: BLE001  every file system has errors of its own
        raise BadInput(f"data {name} cannot be opened", f"{type(error).__name__}: {one_line(error)}", "check the address") from None
    with remote as file, io.BufferedReader(_Remote(file, name), BYTES_AT_A_TIME) as buffered:
        yield buffered


class _Remote(io.RawIOBase):
    """A file at an address. That it cannot be read is a :class:`BadInput`, so that no reader takes it for a damaged or shorter file."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except Exception as error:  # noqa: BLE001  every file system has errors of its own
            self._broke_off(error)
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._file.seek(offset, whence))
        except Exception as error:  # noqa: BLE001
            self._broke_off(error)

    def tell(self) -> int:
        return int(self._file.tell())

    def _broke_off(self, error: Exception) -> NoReturn:
        why = f"the stream broke off ({type(error).__name__}: {one_line(error)})"
        raise BadInput(f"data {self._name}", why, "run the same command again; it resumes") from None


def _jsonl(file: IO[bytes], name: str, base: Path) -> Iterator[Raw]:
    for _, number, row in json_rows(file, name):
        yield _raw(row, base, f"{name} line {number}")


def _csv(file: IO[bytes], name: str, base: Path) -> Iterator[Raw]:
    for _, number, row in csv_rows(file, name):
        yield _raw(row, base, f"{name} line {number}")


def _raw(row: dict[str, Any] | BadInput, base: Path, where: str) -> Raw:
    return Raw({}, base, where, row) if isinstance(row, BadInput) else Raw(row, base, where)


def _parquet(file: IO[bytes], name: str, base: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        means = _readers(parquet.schema_arrow)
        for batch in parquet.iter_batches(ROWS_AT_A_TIME):
            for values in _decoded(batch):
                yield Raw(read_as(values, means), base, f"{name} row {number}")
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"data {name}", f"it cannot be read as parquet after row {number} ({one_line(error)})", "mend the file") from None


def _decoded(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; text that is not UTF-8 is no reason to stop, for nobody may read its column."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        columns = [list(map(_cell, column)) for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Undecodable()


def _readers(schema: Any) -> dict[str, Any]:
    """What the file says of its columns for the library `datasets`, or what their types say."""
    import datasets

    try:
        return readers(datasets.Features.from_arrow_schema(schema))
    except Exception:  # noqa: BLE001  types that the library does not know mean what they hold
        return {}


def _tar(file: IO[bytes], name: str, base: Path) -> Iterator[Raw]:
    """Samples of a shard, compressed or not. A damaged one ends in a row that says so: the rest of it is lost."""
    key: str | None = None
    held: list[tuple[str, bytes]] = []
    problem: BadInput | None = None

    def where() -> str:
        return f"{name} sample {key}"

    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
            for member in archive:
                part = part_of(member.name) if member.isreg() else None
                if part is None:
                    continue
                if key is not None and part[0] != key:
                    yield _sample(held, problem, base, where())
                    held, problem = [], None
                key, ending = part
                if not picture_column(ending) and ending not in TEXTS:
                    continue
                try:
                    check_size(ending, member.size, where())
                except BadInput as error:
                    problem = error
                    continue
                stored = archive.extractfile(member)
                content = stored.read() if stored else b""
                if len(content) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                held.append((ending, content))
                archive.members.clear()  # type: ignore[attr-defined]  # else a long stream fills the memory with headers
            if key is not None:
                yield _sample(held, problem, base, where())
    except (*DAMAGE, OSError, EOFError) as error:
        shard = f"shard {name}"
        why = f"it is damaged after sample {key or 'none'} ({one_line(error)})"
        yield Raw({}, base, shard, BadInput(shard, why, "copy or write the shard again"))


def _sample(held: list[tuple[str, bytes]], problem: BadInput | None, base: Path, where: str) -> Raw:
    try:
        if problem:
            raise problem
        check_parts([ending for ending, _ in held], where)
        pictures = {column: content for ending, content in held if (column := picture_column(ending))}
        texts = text_columns({ending: content for ending, content in held if ending in TEXTS}, where)
        if not pictures or not texts:
            missing = "text" if pictures else "picture"
            why = f"it has no {missing}; in a stream the files of a sample follow each other in the shard"
            raise BadInput(where, why, "sort the shard by name, or read it without stream:, in any order")
        return Raw({**texts, **pictures}, base, where)
    except BadInput as error:
        return Raw({}, base, where, error)
