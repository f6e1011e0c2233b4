"""Stores of embeddings: vectors of half precision by sample id, in Arrow files that are mapped into memory.

A store is a folder with a manifest, which says what its vectors are of: the teacher, its preprocessing, and the samples. `shard-N.arrow`
holds in the order of the samples `id` (a string), `key` (64 bits of a hash of it) and `vector`; `index.arrow` the keys of all shards in
order, with the row of each. Nothing is read as a whole: a look-up takes a binary search in the index and one row a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from efficientvlm.checkpoints.files import resolve, write_atomic
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.errors import BadInput, shorten

if TYPE_CHECKING:
    from torch import Tensor

IMAGES, SENTENCES = "images", "sentences"
FAMILY, INDEX = "embeddings", "index.arrow"
NOTE = b"missing"


class Shard(NamedTuple):
    """A file of a store: ids, their keys, vectors [N, E] of half precision, and of how many samples there is no vector and why not."""

    ids: Any
    keys: NDArray[np.uint64]
    vectors: NDArray[np.float16]
    missing: dict[str, str]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def keys_of(ids: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits of a hash of each id."""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in ids)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def write_shard(path: Path, ids: Sequence[str], vectors: NDArray[np.float16], missing: dict[str, str]) -> None:
    """Write vectors [N, E] as a whole file that follows from them alone; `missing`: sample → why there is no vector of it."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float16())
    named = pa.array([plain(key) for key in ids], pa.string())
    columns = {"id": named, "key": pa.array(keys_of(ids)), "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    _write(path, columns, {NOTE: json.dumps(missing).encode()})


def read_shard(path: Path) -> Shard:
    """A shard, mapped into memory.

    Raises:
        BadInput: it is no such file, or is damaged.
    """
    batch, notes = _read(path)
    try:
        vectors = batch.column("vector")
        flat = vectors.flatten().to_numpy(zero_copy_only=True).reshape(len(vectors), vectors.type.list_size)
        return Shard(batch.column("id"), batch.column("key").to_numpy(zero_copy_only=True), flat, dict(json.loads(notes[NOTE])))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from None


def write_index(path: Path, shards: Sequence[Shard]) -> None:
    """Write the keys of all `shards` in order with their rows; of equal keys the earlier row comes first."""
    import pyarrow as pa

    keys = np.concatenate([shard.keys for shard in shards])
    order = np.argsort(keys, kind="stable")
    _write(path, {"key": pa.array(keys[order]), "row": pa.array(order.astype(np.int64))}, {})


class Store:
    """A finished store. What its manifest says is known at once; a file is opened when a vector of it is asked for."""

    made = True
    """Whether its vectors are there; a plan knows stores that are not yet made."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        said = manifest.extra
        self.side, self.width, self.count = str(said["side"]), int(said["width"]), int(said["count"])
        self.missing, self.origin = int(said["missing"]), said.get("origin")
        self.preprocessing = str(said.get("preprocessing", ""))
        self.teacher: str | None = manifest.inputs.get("model")
        """sha256 of the manifest of the checkpoint whose vectors they are; None where an import did not say."""
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, spec: str | Path) -> Store:
        """The store in a folder.

        Raises:
            BadInput: an unfinished or damaged one, or a folder of something else.
        """
        manifest, path = require_complete(spec), resolve(spec)
        if manifest.family != FAMILY:
            raise BadInput(f"{path} holds no embeddings", f"it was written by evlm {manifest.stage}", "give a folder that evlm embed wrote")
        try:
            return cls(path, manifest)
        except (KeyError, ValueError, TypeError) as error:
            raise BadInput(f"{path} is damaged", f"its manifest does not say {error}", "run evlm embed again with --force") from None

    def check(
        self,
        *,
        side: str,
        width: int | None = None,
        teacher: str | None = None,
        origin: str | None = None,
        preprocessing: str | None = None,
    ) -> list[str]:
        """See that these are vectors of `side` by the checkpoint with the manifest of digest `teacher`, of `width` numbers.

        What is asked and the store does not know, as it was imported, is not refused; it is told in the remarks that are returned.

        Args:
            origin: what the samples come from, see `data.opening.origin`; sentences are told apart by their ids alone.
            preprocessing: in what form the teacher would read them now, see `loaded.read_as`.

        Raises:
            BadInput: they are not, and how they differ.
        """
        fix = "make it with evlm embed from the same teacher and data"
        if self.side != side:
            raise BadInput(f"{self.path} holds vectors of {self.side}", f"those of {side} are needed", fix)
        if width is not None and self.width != width:
            raise BadInput(f"{self.path} holds vectors of {self.width} numbers", f"the teacher's have {width}", fix)
        unknown = []
        if teacher and not self.teacher:
            unknown.append(f"{self.path} does not say of which teacher its vectors are, so nobody knows whether they are this one's")
        elif teacher and self.teacher != teacher:
            why = f"its vectors are of the checkpoint with manifest {str(self.teacher)[:12]}, the teacher's is {teacher[:12]}"
            raise BadInput(f"{self.path} is of another teacher", why, fix)
        if side == IMAGES and origin and self.origin and self.origin != origin:
            raise BadInput(f"{self.path} is of other images", "the data that are read are not those it was made from", fix)
        if preprocessing and not self.preprocessing:
            unknown.append(f"{self.path} does not say in what form its {side} were read, so nobody knows whether it was this one")
        elif preprocessing and self.preprocessing != preprocessing:
            why = f"{self.preprocessing} there, {preprocessing} now"
            raise BadInput(f"{self.path} is of {side} in another form", why, "embed them in the form in which they are read now")
        return unknown

    def has(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """For each id whether there is a vector."""
        return self._rows(ids) >= 0

    def rows(self, ids: Sequence[str]) -> NDArray[np.float16]:
        """Vectors [N, E] as they are stored, of half precision.

        Raises:
            BadInput: there is none for an id, which is named.
        """
        rows = self._rows(ids)
        if len(lacking := np.flatnonzero(rows < 0)):
            why = f"nor of {len(lacking) - 1:,} more of {len(ids):,}" if len(lacking) > 1 else ""
            raise BadInput(
                f"{self.path} has no vector of {ids[int(lacking[0])]}", why, "embed these data, or take such samples out of them"
            )
        found = np.empty((len(ids), self.width), np.float16)
        numbers = self._places(rows)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            found[chosen] = self._shard(number).vectors[rows[chosen] - self._firsts[number]]
        return found

    def vectors(self, ids: Sequence[str]) -> Tensor:
        """Unit vectors [N, E] as a tensor in float32, on the CPU; raises as :meth:`rows`."""
        import torch

        found = torch.from_numpy(self.rows(ids)).float()
        return torch.nn.functional.normalize(found, dim=-1)

    @property
    def ids(self) -> StoredIds:
        """The id of every row, in order."""
        return StoredIds(self)

    def blocks(self) -> Iterator[NDArray[np.float16]]:
        """All vectors in order, [N, E] at a time, mapped into memory."""
        for number in range(len(self._firsts) - 1):
            yield self._shard(number).vectors

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """The row at which every shard begins, and behind the last one their number."""
        return np.cumsum([0, *self.manifest.extra["rows"]])

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        batch, _ = _read(self.path / INDEX)
        return batch.column("key").to_numpy(zero_copy_only=True), batch.column("row").to_numpy(zero_copy_only=True)

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = read_shard(self.path / shard_name(number))
        return self._shards[number]

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the shard of each row."""
        return np.searchsorted(self._firsts, rows, side="right") - 1

    def _rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Row of each id, -1 where there is none. Ids are compared, for keys of different ones may be equal."""
        keys, rows = self._index
        wanted = keys_of(ids)
        begin, end = np.searchsorted(keys, wanted, side="left"), np.searchsorted(keys, wanted, side="right")
        found = np.full(len(ids), -1, np.int64)
        left = np.flatnonzero(begin < end)
        while len(left):  # one look for nearly all of them: equal keys of other ids are rare
            likely = np.array(rows[begin[left]])
            right = np.array([plain(ids[at]) for at in left.tolist()], object) == np.array(self._named(likely), object)
            found[left[right]] = likely[right]
            begin[left] += 1
            left = left[~right & (begin[left] < end[left])]
        return found

    def _named(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids at those rows."""
        named = np.empty(len(rows), object)
        numbers = self._places(rows)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            named[chosen] = self._shard(number).ids.take(rows[chosen] - self._firsts[number]).to_pylist()
        found: list[str] = named.tolist()
        return found


def plain(name: str) -> str:
    """`name` as a store has it, which is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


class StoredIds(Sequence[str]):
    """The ids of a store by row, read when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return int(self.store._firsts[-1])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        number = int(self.store._places(np.array([row]))[0])
        return self.store._shard(number).ids[row - int(self.store._firsts[number])].as_py()


def _write(path: Path, columns: dict[str, Any], notes: dict[bytes, bytes]) -> None:
    import pyarrow as pa

    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns)).replace_schema_metadata(notes)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    write_atomic(path, sink.getvalue().to_pybytes())


def _read(path: Path) -> tuple[Any, dict[bytes, bytes]]:
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        return file.get_batch(0), dict(file.schema.metadata or {})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> BadInput:
    first = next(iter(why.splitlines()), "it cannot be read")
    return BadInput(f"{path} is damaged", shorten(first), "check the folder with `evlm verify`, or run evlm embed again with --force")
