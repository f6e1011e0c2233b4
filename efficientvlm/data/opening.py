"""Opens data by name: `easy-vqa`, `shapes[:key=value,...]`, a path to the user's own, `hub:...`, `stream:...`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from efficientvlm.data.draw import generator, some_of
from efficientvlm.data.items import Item, Source
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.skips import Skips
from efficientvlm.errors import BadInput, without_secrets

T = TypeVar("T")
SPLITS = ("train", "val", "test")
BUILT_IN = ("easy-vqa", "shapes")
INSTEAD = 20190719  # seed of what stands in the place of a sample that cannot be read
ATTEMPTS = 1000
HUB, STREAM = "hub:", "stream:"


def open_data(
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
    shuffle_buffer: int = 1000,
) -> Source[T]:
    """Samples of `kind`.

    Args:
        spec: `easy-vqa`, `shapes[:key=value,...]`, a file, a pattern of shards or a folder, `hub:NAME`, or `stream:` before any of these
            but the built-in ones; a stream is for training only. Sentences may also be plain text, one a line.
        split: train, val or test; without a validation file of its own, val is `val_fraction` of the training images, always the same ones.
        columns: role → column of the user's own data.
        limit: at most so many images, drawn at random with `seed`; of a stream the first.
        seed: of that draw, and of the order of a stream.
        max_bad: samples that may be skipped because they cannot be used; by default 1 in 100, of a stream 100.
        shuffle_buffer: samples that a stream draws from at random.
        image_size: how pictures are prepared, or the side of a square they are squeezed to; by default 64 px for the built-in data, the
            pictures' own size otherwise. What `shapes` draws has the side that comes out, and needs no preparing.

    Raises:
        BadInput: unknown data, data that hold nothing of this kind, an unreadable file, a missing column.
    """
    _check(spec, split)
    if spec == "easy-vqa":
        return _easy_vqa(kind, split, val_fraction=val_fraction, limit=limit, image_size=image_size)
    if spec.partition(":")[0] == "shapes":
        from efficientvlm.data.shapes import Shapes

        return drawn(Shapes(kind, split, image_size=image_size, spec=spec), limit)
    own: dict[str, Any] = {"columns": columns, "limit": limit, "seed": seed, "image_size": image_size, "max_bad": max_bad}
    if spec.startswith(STREAM):
        from efficientvlm.data.stream import Stream

        return Stream(kind, spec, shuffle_buffer=shuffle_buffer, **own)
    if kind.plain and not spec.startswith(HUB):
        from efficientvlm.data.lines import Lines, text_files

        if text_files(spec, split, Skips(spec)):
            if columns:
                raise BadInput(f"data {spec}", "a plain text file has no columns", "leave --column out")
            return Lines(kind, spec, split, val_fraction=val_fraction, limit=limit, seed=seed, max_bad=max_bad)
    from efficientvlm.data.files import Files

    return Files(kind, spec, split, val_fraction=val_fraction, **own)


def _easy_vqa(kind: Kind[Any, Any], split: str, **options: Any) -> Source[Any]:
    from efficientvlm.data.easy_vqa import EasyVQA
    from efficientvlm.data.kinds.questions import QUESTIONS

    source = EasyVQA(split, **options)
    if kind is QUESTIONS:
        return source
    seen: Source[Any] = Seen(kind, source)
    return seen


class Over(Source[Item]):
    """What is made of the samples of another source."""

    source: Source[Any]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def licence(self) -> str:
        return self.source.licence

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint


class Seen(Over[Item]):
    """The pictures of a source of questions, as samples of a kind that needs no more."""

    def __init__(self, kind: Kind[Item, Any], source: Source[Any]) -> None:
        """:class:`BadInput` if `kind` needs more."""
        self.kind, self.source = kind, source
        if kind.shown("", np.zeros((1, 1, 3), np.uint8)) is None:
            raise BadInput(f"data {source.name}", f"it has questions but no {kind.holds}", f"use shapes, or {kind.holds} of your own")

    @property
    def notes(self) -> list[str]:
        return notes(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        item = self.source[index]
        found = self.kind.shown(item.id, item.image)
        assert found is not None
        return found

    def texts(self) -> Iterator[str]:
        return iter(())

    def contents(self) -> Iterator[list[Any]]:
        for _ in range(len(self)):
            yield [None]

    def ids(self) -> Iterator[str | None]:
        return ids(self.source)


class Subset(Over[Item]):
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: Source[Item], indices: list[int] | range) -> None:
        self.source, self.indices = source, indices

    @property
    def origin(self) -> str:
        return origin(self.source)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[index])]

    @property
    def workers(self) -> int:
        return int(getattr(self.source, "workers", 0))

    @workers.setter
    def workers(self, workers: int) -> None:
        own: Any = self.source
        own.workers = workers

    @property
    def notes(self) -> list[str]:
        return [*notes(self.source), f"{len(self):,} of {len(self.source):,} images, drawn at random (seed 0)"]

    def usable(self, indices: Sequence[int]) -> list[Item]:
        return usable(self.source, [int(self.indices[index]) for index in indices])

    def texts(self) -> Iterator[str]:
        return self.source.texts()

    def contents(self) -> Iterator[list[Any]]:
        """Those of the whole source, like its texts."""
        return self.source.contents()

    def ids(self) -> Iterator[str | None]:
        known = list(ids(self.source))
        return (known[index] for index in self.indices)


class Chosen(Subset[Item]):
    """Some samples of a source and no others: in the place of one that cannot be read another of them is. `note` says what is left out."""

    def __init__(self, source: Source[Item], indices: Any, note: str) -> None:
        super().__init__(source, indices)
        self.note = note

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("__"):
            raise AttributeError(name)  # of an object that is being copied
        return getattr(self.source, name)

    @property
    def notes(self) -> list[str]:
        return notes(self.source)

    def __getitem__(self, index: int) -> Item:
        place = index = range(len(self))[index]
        for attempt in range(ATTEMPTS):
            if found := self.usable([place]):
                return found[0]
            place = int(generator(INSTEAD, "instead", index, attempt).integers(len(self)))
        raise BadInput(f"data {self.name}", f"of {ATTEMPTS} samples drawn none could be read", "mend the data")


def drawn(source: Source[Item], limit: int | None) -> Source[Item]:
    """`source`, or `limit` of its samples, drawn at random and always the same."""
    return source if limit is None or limit >= len(source) else Subset(source, some_of(len(source), limit))


def notes(source: Source[Any]) -> list[str]:
    """How a source was read where that was a guess or a part of it, a sentence each."""
    own: Any = source
    return list(own.skips.notes if hasattr(own, "skips") else getattr(own, "notes", ()))


def origin(source: Source[Any]) -> str:
    """sha256 (hex) of what the samples come from, whatever split or part of it is read and in whatever form.

    Of pictures in files of their own the names and the numbers of bytes count.
    """
    own: Any = source
    return str(getattr(own, "origin", None) or source.fingerprint)


def is_built_in(spec: str) -> bool:
    """Whether `spec` is data of this project, with English texts and no writing in its pictures."""
    return spec.partition(":")[0] in BUILT_IN


def texts(source: Source[Any]) -> Iterator[str]:
    """Every string of `source` for training a tokenizer, without decoding an image; of `shapes` a sample of 5,000 scenes."""
    return source.texts()


def usable(source: Source[Item], indices: Sequence[int]) -> list[Item]:
    """The samples of `indices`, without those that cannot be read: for measuring, where none may stand for another."""
    own: Any = getattr(source, "usable", None)
    return own(indices) if own else [source[index] for index in indices]


def open_texts(spec: str, *, columns: Mapping[str, str] | None = None) -> Source[Any]:
    """Data whose texts a tokenizer is trained on: pairs, or where they have no captions, questions or statements about two pictures.

    Raises:
        BadInput: it can be opened as none of them; what is wrong with the form that fits best.
    """
    from efficientvlm.data.kinds.pairs import PAIRS
    from efficientvlm.data.kinds.questions import QUESTIONS
    from efficientvlm.data.kinds.statements import STATEMENTS

    if spec == "easy-vqa":
        return open_data(QUESTIONS, spec, "train", columns=columns)
    every: tuple[Kind[Any, Any], ...] = (PAIRS, QUESTIONS, STATEMENTS)
    first: BadInput | None = None
    for kind in [kind for kind in every if set(columns or {}) <= kind.roles.keys()] or every:
        try:
            return open_data(kind, spec, "train", columns=columns)
        except BadInput as error:
            if "no column for" not in error.what or spec.partition(":")[0] in BUILT_IN:
                raise error from None
            first = first or error
    assert first is not None
    raise first


def record(source: Source[Any], split: str) -> dict[str, Any]:
    """What the manifest says about a source: name, split, count of images, fingerprint, licence, samples skipped, how it was read."""
    skips: Any = getattr(source, "skips", None)
    columns = ", ".join(f"{role}={name}" for role, name in getattr(source, "columns", {}).items())
    chosen = [source.note] if isinstance(source, Chosen) else []
    return {
        "name": without_secrets(source.name),
        "split": split,
        "count": len(source),
        "fingerprint": source.fingerprint,
        "licence": source.licence,
        "skipped": skips.count if skips else 0,
        "read_as": [*([f"columns: {columns}"] if columns else []), *map(without_secrets, [*notes(source), *chosen])],
    }


def ids(source: Source[Any]) -> Iterator[str | None]:
    """The id of every sample in order, without decoding a picture; None where it is known that a sample cannot be used."""
    own: Any = source
    yield from own.ids()


def _check(spec: str, split: str) -> None:
    if split not in SPLITS:
        raise BadInput(f"there is no split {split}", "", f"use {', '.join(SPLITS)}")
    if not spec:
        raise BadInput("no data given", "", f"--data takes {', '.join(BUILT_IN)} or a path")
    if spec.startswith(STREAM) and split != "train":
        raise BadInput(f"data {spec} is a stream", f"it has no {split} split", "measure on a file or folder")
    check_spec(spec)


def check_spec(spec: str) -> None:
    """:class:`BadInput` if `spec` is neither built-in data, of the hub, nor a path or pattern that exists; nothing is read."""
    from efficientvlm.data.forms import PATTERN, exists, paths_of

    plain = spec.removeprefix(STREAM)
    if plain.startswith(HUB) or (plain.partition(":")[0] in BUILT_IN and plain == spec) or (plain != spec and "://" in plain):
        return
    if not exists(plain):
        if PATTERN.search(plain):
            paths_of(plain)  # says which file is missing
        raise _unknown(plain)


def _unknown(spec: str) -> BadInput:
    near = difflib.get_close_matches(spec.partition(":")[0], BUILT_IN, n=1, cutoff=0.5)
    known = "built-in are easy-vqa and shapes[:key=value,...]; own data is a file (.jsonl, .csv, .parquet, .tar), a folder, or hub:NAME"
    hint = f"; did you mean {near[0]}?" if near else ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec):
        hint = f"; data of the hub is given as hub:{spec}"
    return BadInput(f"no data called {spec}", f"there is no such file or folder{hint}", known)
