"""Embeddings that lie on disk, as a stage reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Protocol

import numpy as np

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.checkpoints.store import Store
from efficientvlm.errors import BadInput
from efficientvlm.selection.rules import Array
from efficientvlm.selection.search import Vectors

ROWS = 16_384


def loaded_array(path: Path) -> Array:
    """The table in an .npy file, which stays on disk; :class:`BadInput` for another file, or objects that would have to be unpickled."""
    fix = "give a table of numbers as numpy.save writes it"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, OverflowError) as error:
        raise BadInput(f"{path} cannot be read", str(error).lower(), fix) from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise BadInput(f"{path} cannot be read", "it is an archive of tables", fix)
    return found


class Rows(Protocol):
    """Vectors by the number of their row."""

    @property
    def count(self) -> int: ...
    @property
    def width(self) -> int: ...
    def rows(self, numbers: Array) -> Array: ...


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


def stored_vectors(spec: str, side: str, model: str | None = None) -> Vectors:
    """The embeddings of `side` that `spec` names: a store, or an .npy file.

    Raises:
        BadInput: they cannot be read, or are a store by another checkpoint than `model`.
    """
    path = resolve(spec)
    if path.suffix.lower() == ".npy":
        return ArrayFile(path)
    if not path.is_dir():
        raise BadInput(f"{path} holds no embeddings of {side}", "it is no .npy file", "give one, or a folder that evlm embed wrote")
    store = Store.open(path)
    store.check(side=side, teacher=fingerprint(model) if model else None)
    return store


def sentence_vectors(spec: str) -> Rows:
    """The embeddings of sentences that `spec` names, a row a row of the pile.

    Raises:
        BadInput: they cannot be read.
    """
    path = resolve(spec)
    if path.suffix.lower() != ".npy":
        raise BadInput(f"{path} holds no embeddings of sentences", "it is no .npy file", "give one")
    return ArrayFile(path)
