"""What a data source yields: plain dataclasses around NumPy arrays, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An RGB image, uint8 `[H, W, 3]`."""

Box = tuple[float, float, float, float]
"""Centre x, centre y, width, height, as fractions of the image."""


@dataclass(slots=True)
class Region:
    """A part of an image and what it shows."""

    phrase: str
    box: Box


@dataclass(slots=True)
class Question:
    """A question and its accepted answers with weights, which usually sum to 1; `annotators` have given them (0: not known)."""

    text: str
    answers: list[tuple[str, float]]
    annotators: int = 0


Item = TypeVar("Item", covariant=True)


class Source(Protocol[Item]):
    """A map-style data set: `source[i]` is deterministic and safe to call from several threads."""

    @property
    def name(self) -> str:
        """The specification it was opened with."""

    @property
    def licence(self) -> str:
        """Licence of the content, `unknown` if the source does not say."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content, or of the settings of a generator."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def texts(self) -> Iterator[str]:
        """Every string of the source (a sample of a generator), without decoding an image."""

    def contents(self) -> Iterator[list[Any]]:
        """What the rows of every sample say, as their kind reads them, without decoding an image (a sample of a generator)."""
