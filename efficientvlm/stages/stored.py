"""Embeddings that lie on disk, as a stage reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Protocol

import numpy as np

from efficientvlm.checkpoints.files import expanded, resolve
from efficientvlm.checkpoints.store import SENTENCES, Store
from efficientvlm.data.kinds.sentences import sentence
from efficientvlm.errors import BadInput
from efficientvlm.selection.rules import Array
from efficientvlm.selection.search import Vectors, unit
from efficientvlm.stages.workspace import Workspace

ROWS = 16_384


def loaded_array(path: Path) -> Array:
    """The table in an .npy file, which stays on disk; :class:`BadInput` for another file, or objects that would have to be unpickled."""
    fix = "give a table of numbers as numpy.save writes it"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, OverflowError) as error:
        objects = "pickle" in str(error)
        why = "it holds objects of Python, which are never unpickled" if objects else str(error).lower()
        raise BadInput(f"{path} cannot be read", why, fix) from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise BadInput(f"{path} cannot be read", "it is an archive of tables", fix)
    return found


class ArrayFile:
    """The vectors [N, E] of an .npy file, which stay on disk; samples are called by their number."""

    def __init__(self, path: Path) -> None:
        """:class:`BadInput` unless it holds vectors."""
        self.vectors = vectors = loaded_array(path)
        if vectors.ndim != 2 or vectors.dtype.kind != "f" or not vectors.size:
            why = f"it has {vectors.dtype} in the form {vectors.shape}"
            raise BadInput(f"{path} holds no embeddings", why, "give floating-point numbers, a row a sample")
        self.count, self.width = (int(size) for size in self.vectors.shape)
        self.ids = range(self.count)

    def blocks(self) -> Iterator[Array]:
        for begin in range(0, self.count, ROWS):
            yield np.asarray(self.vectors[begin : begin + ROWS])

    def rows(self, numbers: Array) -> Array:
        return np.asarray(self.vectors[numbers])


class Said(Protocol):
    """Vectors of the sentences of a pile."""

    @property
    def count(self) -> int | None:
        """How many rows the pile has to have; None where they are known by what they say."""

    @property
    def width(self) -> int: ...

    @property
    def teacher(self) -> str | None:
        """Digest of the manifest of the checkpoint whose vectors they are; None where nobody knows."""

    def of(self, numbers: Array, sentences: Sequence[str]) -> tuple[Array, Array]:
        """Unit vectors [n, E] of the rows `numbers` [N] of the pile, which say `sentences`, and of which of them there is one [N]."""


class ByRow:
    """Sentences whose vectors are in a file, row by row."""

    def __init__(self, file: ArrayFile) -> None:
        self.file, self.width = file, file.width
        self.count: int | None = file.count
        self.teacher: str | None = None

    def of(self, numbers: Array, sentences: Sequence[str]) -> tuple[Array, Array]:
        return unit(self.file.rows(numbers)), np.ones(len(numbers), bool)


class ByText:
    """Sentences whose vectors are in a store."""

    count = None

    def __init__(self, store: Store) -> None:
        self.store, self.width, self.teacher = store, store.width, store.teacher

    def of(self, numbers: Array, sentences: Sequence[str]) -> tuple[Array, Array]:
        names = [sentence(text).id for text in sentences]
        there = self.store.has(names)
        return unit(self.store.rows([name for name, known in zip(names, there, strict=True) if known])), there


def stored_vectors(spec: str, side: str, workspace: Workspace, teacher: str | None = None) -> Vectors:
    """The embeddings of `side` that `spec` names: a store, or an .npy file.

    Args:
        teacher: digest of the manifest of the checkpoint whose vectors they should be.

    Raises:
        BadInput: they cannot be read, or are a store by another checkpoint.
    """
    path = expanded(spec)
    if path.suffix.lower() == ".npy":
        return ArrayFile(resolve(spec))
    if path.is_file():
        raise BadInput(f"{path} holds no embeddings of {side}", "it is no .npy file", "give one, or a folder that evlm embed wrote")
    store: Store = workspace.store(spec)
    store.check(side=side, teacher=teacher)  # a teacher that nobody knows is told by who asks
    return store


def sentence_vectors(spec: str, workspace: Workspace, teacher: str | None = None) -> Said:
    """The embeddings of sentences that `spec` names: a store, or an .npy file with a row a row of the pile; otherwise as above."""
    found = stored_vectors(spec, SENTENCES, workspace, teacher)
    return ByRow(found) if isinstance(found, ArrayFile) else ByText(found)  # type: ignore[arg-type]
