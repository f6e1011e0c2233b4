"""Data that is read from one end to the other: `stream:hub:owner/name`, `stream:FILES` (paths, patterns or addresses).

Indices only grow. The sample at an index depends on the data and the seed alone, so a resumed run reads what an uninterrupted one would
have: it goes through the stream up to its position again, without decoding pictures, which takes time.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from efficientvlm.data import hub
from efficientvlm.data.cells import LEFT_OUT, text_of
from efficientvlm.data.draw import generator
from efficientvlm.data.files import find_columns, several
from efficientvlm.data.forms import braces, paths_of
from efficientvlm.data.images import open_sized
from efficientvlm.data.kinds.kind import Kind, Picture, Row
from efficientvlm.data.ledger import Book
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.skips import Skips
from efficientvlm.data.stream_rows import Raw, read_file
from efficientvlm.data.tables import encoded, encoded_list, inner_of, one_line, read_as, readers
from efficientvlm.errors import BadInput, without_secrets

PREFIX = "stream:"
LOOKED_AT = 1000  # rows, for the names of the columns
TEXTS = 100_000  # rows a tokenizer is trained on
ATTEMPTS = 100

T = TypeVar("T")


class Stream(Book, Generic[T]):
    """The training part of a stream, endlessly: after its last row it begins again, in another order.

    Every row is a sample of its own. `len` counts the samples passed so far. Each of several workers goes through all of it, and decodes
    the pictures of its own samples alone; what comes through the network is read by one process.
    """

    endless = True
    licence = "unknown"

    def __init__(
        self,
        kind: Kind[T, Any],
        spec: str,
        *,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        seed: int = 0,
        image_size: Preprocessing | int | None = None,
        max_bad: int | None = None,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__()
        self.kind, self.name, self.size = kind, without_secrets(spec), image_size
        self.seed, self.limit, self.buffer_size = seed, limit, shuffle_buffer
        self._what = spec.removeprefix(PREFIX)
        self.skips = Skips(self.name, max_bad)
        self.skips.settle(None)
        if limit is not None:
            self.skips.note(f"the first {limit:,} rows of each pass: a stream cannot be drawn from")
        have: dict[str, None] = {}  # in the order they come in
        broken: BadInput | None = None
        for raw in itertools.islice(self._pass(0), LOOKED_AT):
            have.update(dict.fromkeys(raw.values))
            broken = broken or raw.problem
        if broken and not have:
            raise broken
        named = {name: None for role, name in (columns or {}).items() if role not in kind.required and name not in LEFT_OUT}
        self.columns = find_columns(list(have | named), kind, columns or {}, spec)
        free = [role for role in kind.roles if role not in self.columns and role not in (columns or {})]
        self._late = {name for role in free for name in kind.roles[role]}  # would have been taken, had they come earlier
        self._lock = threading.Lock()
        self._passed = 0  # by workers
        self._lent = False
        self._rewind()

    @property
    def by_one(self) -> bool:
        """It comes through the network, which workers do not need."""
        return self._what.startswith(hub.PREFIX) or "://" in self._what

    @property
    def fingerprint(self) -> str:
        """sha256 over names and sizes of local files, of anything else over the name: a stream's content is not read in advance."""
        parts = [self.name]
        if not self._what.startswith(hub.PREFIX):
            parts += [f"{Path(file).name} {Path(file).stat().st_size}" for file in self._files() if "://" not in file]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()

    def __len__(self) -> int:
        return max(self._position, self._passed)

    def enter(self, *entry: Any) -> None:
        self._passed = max(self._passed, entry[0])

    def lend(self) -> None:
        self._lent = True  # the place in open files would be that of all

    def __getitem__(self, index: int) -> T:
        """The sample at `index`; a smaller index than the last one reads the stream anew."""
        self.tell(index + 1)
        with self._lock:
            if index < self._position or self._lent:
                self._lent = False
                self._rewind()
            while self._position <= index:
                raw = self._next()
            others = self._buffer
            try:
                return self._sample(raw)
            except BadInput as error:
                self.skips.add(error)
            for attempt in range(ATTEMPTS):
                raw = others[int(generator(self.seed, "instead", index, attempt).integers(len(others)))]
                try:
                    return self._sample(raw)
                except BadInput as error:
                    self.skips.add(error)
        raise BadInput(f"data {self.name}", f"of {ATTEMPTS} samples drawn none could be read", "mend the data")

    def texts(self) -> Iterator[str]:
        for contents in self.contents():
            yield from self.kind.texts(contents)

    def contents(self) -> Iterator[list[Any]]:
        """Those of the first 100,000 rows; the rest is not known in advance."""
        for raw in itertools.islice(self._pass(0), TEXTS):
            try:
                yield [self.kind.content(self._values(raw), raw.where, self.columns)]
            except BadInput as error:
                self.skips.add(error)

    def _rewind(self) -> None:
        self._position = 0
        self._rows = itertools.chain.from_iterable(self._pass(epoch) for epoch in itertools.count())
        self._random = generator(self.seed, "stream")
        self._buffer: list[Raw] = list(itertools.islice(self._rows, self.buffer_size))

    def _next(self) -> Raw:
        """A row of the buffer, which the next row of the stream replaces."""
        place = int(self._random.integers(len(self._buffer)))
        raw, self._buffer[place] = self._buffer[place], next(self._rows)
        self._position += 1
        return raw

    def _pass(self, epoch: int) -> Iterator[Raw]:
        """All rows once; files in an order of this epoch, and as they stand in the first one."""
        rows = self._from_hub() if self._what.startswith(hub.PREFIX) else self._from_files(epoch)
        count = 0
        for raw in itertools.islice(rows, self.limit):
            count += 1
            yield raw
        if not count:
            raise BadInput(f"data {self.name}", "it has no rows", "check the files")

    def _files(self) -> list[str]:
        found: list[str] = []
        for part in self._what.split() if "://" in self._what else [self._what]:
            found += list(braces(part)) if "://" in part else [str(path) for path in paths_of(part)]
        return found

    def _from_files(self, epoch: int) -> Iterator[Raw]:
        files = self._files()
        for place in generator(self.seed, "files", epoch).permutation(len(files)) if epoch else range(len(files)):
            yield from read_file(files[int(place)])

    def _from_hub(self) -> Iterator[Raw]:
        from datasets import Image

        data = hub.load(self._what, "train", streaming=True)
        for name, feature in (data.features or {}).items():
            if isinstance(feature, Image):
                data = data.cast_column(name, Image(decode=False))
            elif isinstance(inner_of(feature), Image):
                data = data.cast_column(name, [Image(decode=False)])
        rows, means = iter(data), readers(data.features or {})
        for number in itertools.count():
            where = f"{self._what} row {number}"
            try:
                values = next(rows)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001  the library, its file systems and its network raise what they like
                raise BadInput(where, f"the stream broke off ({one_line(error)})", "run the same command again; it resumes") from None
            yield Raw(read_as(values, means), Path(), where)

    def _values(self, raw: Raw) -> dict[str, Any]:
        if raw.problem is not None:
            raise raw.problem
        if late := self._late.intersection(raw.values):
            self._late -= late
            self.skips.note(
                f"column {', '.join(sorted(late))} comes first in {raw.where} and is not read; name it with --column to read it"
            )
        return {role: raw.values.get(name) for role, name in self.columns.items()}

    def _sample(self, raw: Raw) -> T:
        """The sample in a row.

        Raises:
            BadInput: it cannot be used; names the row.
        """
        values, where = self._values(raw), raw.where
        said = Row(self.kind.content(values, where, self.columns), where)
        kind = self.kind
        if kind.listed in values:
            images = several(kind, encoded_list(values[kind.listed], raw.base, where), where)
        else:
            images = several(kind, [encoded(values[role], raw.base, where) for role in kind.pictures], where)
        pictures = [Picture(*open_sized(image, self.size, where), self.size) for image in images]
        key = text_of(values.get("image_id"))
        if key is None:
            names = [hashlib.sha256(image).hexdigest()[:16] if isinstance(image, bytes) else str(image) for image in images]
            key = " ".join(names) if names else where
        return self.kind.item(str(key), pictures, [said])


def check_settings(config: Any) -> None:
    """What a stage that trains on a stream must be told, because the stream cannot.

    Raises:
        BadInput: naming everything that is missing, or a stage that does not train.
    """
    if not hasattr(config, "max_steps"):
        raise BadInput(f"data {config.data} is a stream", "nothing says where it ends", "measure on a file or folder")
    needed = {"--max-steps N": (config.max_steps, "length"), "--val DATA": (config.val, "held-out part")}
    if hasattr(config, "answers"):
        needed["--answers FILE"] = (config.answers, "list of answers")
    missing = {option: what for option, (given, what) in needed.items() if not given}
    if missing:
        why = "it has " + " and ".join(f"no {what}" for what in missing.values())
        raise BadInput(f"data {config.data} is a stream", why, f"give {', '.join(missing)}")
