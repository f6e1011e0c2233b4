"""Vectors that another program made, which `embed` takes over: the rows of an .npy or a parquet file, and the ids of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.store import SENTENCES, keys_of
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.kinds.sentences import sentence
from efficientvlm.data.opening import ids
from efficientvlm.data.tables import one_line
from efficientvlm.data.text_tables import BOM, bounded, opened
from efficientvlm.errors import BadInput, shorten
from efficientvlm.selection.rules import Array
from efficientvlm.selection.search import unit
from efficientvlm.settings.stages import VECTORS, Embed
from efficientvlm.stages.stored import ROWS, ArrayFile, loaded_array

NAMES = ("id", "image_id", "img_id", "file_name", "image_path")
COMPARED = 8  # samples whose vectors are compared with those of the model, where one is given
LEAST = 0.9  # of their cosines, on average: pictures may have been resized by another program


class VectorFile(Protocol):
    """Rows of vectors."""

    @property
    def count(self) -> int: ...
    @property
    def width(self) -> int: ...

    def names(self) -> Iterator[str] | None:
        """What the sample of every row is called; None where the file does not say."""

    def blocks(self) -> Iterable[Array]:
        """All vectors in order, [n, E] at a time."""


class Reader(Protocol):
    """Reads samples of some data, and has vectors of them."""

    def read(self, numbers: range) -> tuple[list[str], Any, list[str]]: ...
    def embed(self, content: Any) -> Array: ...


def opened_file(config: Embed, kind: Kind[Any, Any]) -> VectorFile:
    """The file that is taken over.

    Raises:
        BadInput: it cannot be read, or holds no vectors of equal length.
    """
    assert config.vectors is not None
    path, listed = resolve(config.vectors), resolve(config.ids) if config.ids else None
    if path.suffix.lower() == ".npy":
        if config.id_column or config.vector_column:
            raise BadInput(f"{path} has no columns", "it is one table of numbers", "leave id_column and vector_column out")
        return Listed(path, listed)
    if path.suffix.lower() != ".parquet":
        raise BadInput(f"{path} is not imported", "vectors are read from a file that ends in .npy or .parquet", "save them as one of these")
    if listed:
        raise BadInput(f"ids {listed}", f"those of {path} are in a column of it", "name that: --set id_column=NAME")
    usual = kind.roles["sentence"] if config.side == SENTENCES else NAMES
    return Table(path, config.id_column, usual, config.vector_column)


class Listed(ArrayFile):
    """The rows of an .npy file, whose names another file lists: a text file with one a line, or an .npy file of texts or whole numbers."""

    def __init__(self, path: Path, listed: Path | None) -> None:
        super().__init__(path)
        self.listed = listed

    def names(self) -> Iterator[str] | None:
        return self._names(self.listed) if self.listed else None

    def _names(self, path: Path) -> Iterator[str]:
        if path.suffix.lower() == ".npy":
            array = loaded_array(path)
            if array.ndim != 1 or array.dtype.kind not in "Uiu":
                raise BadInput(f"{path} holds no ids", f"it has {array.dtype} in the form {array.shape}", "give a row of texts or numbers")
            yield from map(str, array)
            return
        with opened(path) as file:
            for number, (line, _) in enumerate(bounded(file, lambda _: None), 1):
                with suppress(AttributeError, UnicodeDecodeError):  # a line that is too long is None
                    if name := line.removeprefix(BOM if number == 1 else b"").decode("utf-8").rstrip("\r\n"):  # type: ignore[union-attr]
                        yield name
                        continue
                raise BadInput(f"{path} line {number}", "it holds no id", "write one a line as UTF-8, in the order of the vectors")


class Table:
    """The rows of a parquet file."""

    def __init__(self, path: Path, id_column: str | None, usual: Sequence[str], vector_column: str | None) -> None:
        """:class:`BadInput` unless it has a column of vectors of equal length."""
        self.path = path
        with parquet(self.path) as file:
            schema, self.count = file.schema_arrow, int(file.metadata.num_rows)
        there = shorten(", ".join(schema.names)) or "none"
        lists = [name for name in schema.names if schema.names.count(name) == 1 and _of_numbers(schema.field(name).type)]
        if unknown := next((name for name in (id_column, vector_column) if name and schema.names.count(name) != 1), None):
            raise BadInput(f"{path} has no column {unknown}", f"its columns are {there}", "name one of them")
        self.ids = id_column or next((name for name in usual if schema.names.count(name) == 1), None)
        found = [vector_column] if vector_column else [name for name in VECTORS if name in lists] or lists
        if not found or (len(found) > 1 and found[0] not in VECTORS) or found[0] not in lists:
            why = f"columns with lists of floating-point numbers are {shorten(', '.join(lists)) or 'none'}, of {there}"
            raise BadInput(f"{path} holds no embeddings", why, "name the column of vectors: --set vector_column=NAME")
        self.column = found[0]
        self.width = next((len(value) for column in self._columns(self.column) for value in column.drop_null()), 0)
        if not self.width:
            raise BadInput(f"{path} holds no embeddings", f"its column {self.column} holds no number", "give a row a sample")

    def names(self) -> Iterator[str] | None:
        return self._names(self.ids) if self.ids else None

    def _names(self, column: str) -> Iterator[str]:
        row = 0
        for names in self._columns(column):
            for row, name in enumerate(names.to_pylist(), row + 1):  # noqa: B020 - it goes on counting
                if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
                    raise BadInput(f"{self.path} row {row}", f"its {column} is no id ({shorten(repr(name), 80)})", "give texts or numbers")
                yield str(name)

    def blocks(self) -> Iterator[Array]:
        import pyarrow.compute as compute

        begin = 0
        for column in self._columns(self.column):
            there = column.is_valid().to_numpy(zero_copy_only=False)
            some = column.drop_null()
            lengths = compute.list_value_length(some).to_numpy(zero_copy_only=False)
            if len(wrong := np.flatnonzero(lengths != self.width)):
                row = begin + int(np.flatnonzero(there)[wrong[0]]) + 1
                why = f"its vector has {int(lengths[wrong[0]]):,} numbers, that of the first row {self.width:,}"
                raise BadInput(f"{self.path} row {row}", why, "give vectors of equal length")
            vectors = np.full((len(column), self.width), np.nan, np.float32)
            vectors[there] = some.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, self.width)
            begin += len(column)
            yield vectors

    def _columns(self, name: str) -> Iterator[Any]:
        """The column by part; :class:`BadInput` where it cannot be read on."""
        with parquet(self.path) as file:
            for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
                yield batch.column(0)


@contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """An open parquet file; :class:`BadInput` where it cannot be read, or not read on."""
    import pyarrow.parquet

    with opened(path) as file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read as parquet", one_line(error), "mend the file") from None


def _of_numbers(kind: Any) -> bool:
    import pyarrow

    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    return any(one(kind) for one in lists) and bool(pyarrow.types.is_floating(kind.value_type))


class Import:
    """What is taken over from a file for the samples of some data.

    Where the file names no samples, its rows are those of the data, in order. What is said stands for the id of a sentence.
    """

    def __init__(self, config: Embed, file: VectorFile, source: Any) -> None:
        """
        Raises:
            BadInput: another number of rows or names, a name that the data do not have, or twice one of a picture.
        """
        self.config, self.file, self.source = config, file, source
        self.known, self.there = _keys(source)
        self.remarks: list[str] = []
        """How it was read where that was a guess, and what came of a comparison."""
        if file.names() is None:
            self.remarks.append(f"{config.vectors} does not say of which samples its vectors are: taken are those of the data, in order")
        self._check()

    def lost(self, keys: Array) -> int:
        """Samples of the data that have none of the vectors with these keys."""
        return int((~(np.isin(self.known, keys) & self.there)).sum())

    def shards(self, size: int) -> Iterator[tuple[list[str], Array, dict[str, str]]]:
        """Ids, unit vectors [n, E] of half precision and what is missing, `size` rows of the file at a time."""
        names, rest = self._names(), np.zeros((0, self.file.width), np.float16)
        for block in self.file.blocks():
            rest = np.concatenate([rest, _half(block)])
            while len(rest) >= size:
                yield _usable(list(islice(names, size)), rest[:size])
                rest = rest[size:]
        if len(rest):
            yield _usable(list(islice(names, len(rest))), rest)

    def compared(self, network: Reader) -> Compared:
        """Some samples of the data, with the vectors that a network has for them."""
        known: dict[str, Array] = {}
        for place in np.unique(np.linspace(0, len(self.source) - 1, COMPARED).astype(int)).tolist():
            names, content, _ = network.read(range(place, place + 1))
            if names:
                known[names[0]] = network.embed(content)[0]
        return Compared(known)

    def _names(self) -> Iterator[str]:
        """The id of every row."""
        names = self.file.names()
        if names is None:
            return (name or "" for name in ids(self.source))
        return (sentence(name.strip()).id for name in names) if self.config.side == SENTENCES else names

    def _check(self) -> None:
        path, names = self.config.vectors, self.file.names()
        if names is None:
            if self.file.count != len(self.source):
                skipped = self.source.skips.count if hasattr(self.source, "skips") else 0
                more = f", and {skipped:,} that cannot be used" * bool(skipped)
                why = f"it has {self.file.count:,} vectors, and the data {len(self.source):,} samples{more}"
                raise BadInput(f"{path} does not fit", why, "give one a sample in the order of the data, or the ids of the samples")
            return
        known, keys, count = np.unique(self.known[self.there]), [], 0
        while some := list(islice(names, ROWS)):
            found = keys_of(sentence(name.strip()).id for name in some) if self.config.side == SENTENCES else keys_of(some)
            if len(unknown := np.flatnonzero(~np.isin(found, known))):
                more = f", and {len(unknown) - 1:,} more are unknown" * (len(unknown) > 1)
                why = f"row {count + int(unknown[0]) + 1} of {path} is called so{more}"
                fix = "give the data that they are of, or leave such rows out"
                raise BadInput(f"the data have no {shorten(some[int(unknown[0])], 80)}", why, fix)
            keys.append(found)
            count += len(some)
        if count != self.file.count:
            raise BadInput(f"{path} does not fit", f"it has {self.file.count:,} vectors, and there are {count:,} ids", "give one a vector")
        every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        if self.config.side != SENTENCES and len(np.unique(every)) < len(every):
            order = np.argsort(every, kind="stable")
            again = int(order[1:][every[order][1:] == every[order][:-1]].min())
            name = next(islice(self._names(), again, None))
            raise BadInput(f"{path} has two vectors of {shorten(name, 80)}", f"row {again + 1} is the second", "leave one out")


class Compared:
    """Cosines of imported vectors with those of a network, of the samples that are among both."""

    def __init__(self, known: dict[str, Array]) -> None:
        self.known, self.cosines = known, list[float]()

    def look_at(self, names: Sequence[str], vectors: Array) -> None:
        if not self.known:
            return
        for name, vector in zip(names, vectors, strict=True):
            if (own := self.known.get(name)) is not None:
                self.cosines.append(float(own @ vector.astype(np.float32)))

    def told(self, path: str, model: str) -> str:
        """What came of it, in a line.

        Raises:
            BadInput: the vectors are not those of the network.
        """
        if not self.cosines:
            return f"no vector was compared with those of {model}: the samples looked at are not in {path}, or cannot be read"
        mean = float(np.mean(self.cosines))
        said = f"of {len(self.cosines)} samples the cosine with the vectors of {model} is {mean:.4f} on average"
        if not mean >= LEAST:
            fix = "see that rows, ids and data belong together; vectors of another model are imported without --model"
            raise BadInput(f"{path} does not hold the vectors of {model}", f"{said}, {LEAST} is the least", fix)
        return said


def _keys(source: Any) -> tuple[Array, Array]:
    """The key of every sample [N], and whether it can be used [N]."""
    names, keys, there = ids(source), [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    while some := list(islice(names, ROWS)):
        keys.append(keys_of(name or "" for name in some))
        there.append(np.array([name is not None for name in some]))
    return np.concatenate(keys), np.concatenate(there)


def _half(block: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return unit(block).astype(np.float16)


def _usable(names: list[str], vectors: Array) -> tuple[list[str], Array, dict[str, str]]:
    good = np.isfinite(vectors).all(1) & (vectors != 0).any(1) & np.array([bool(name) for name in names], bool)
    missing = {
        name or "a sample that cannot be read": "its vector is not finite, or of zeros"
        for name, fine in zip(names, good, strict=True)
        if not fine
    }
    return [name for name, fine in zip(names, good, strict=True) if fine], vectors[good], missing
