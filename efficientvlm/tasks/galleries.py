"""The images of a source as retrieval reads them: a batch after another, and any of them again by its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import stack
from efficientvlm.data.opening import usable
from efficientvlm.errors import BadInput


class Pictures:
    """The first `count` images of a source with their captions, in order, and any of them again by number.

    Images that :meth:`read` leaves out, here those that cannot be read or have no caption, have no number.
    """

    def __init__(self, source: Any, count: int, batch_size: int) -> None:
        self.source, self.count, self.batch_size = source, count, batch_size
        self.places: list[tuple[int, int]] = []  # where the batch of an image starts, and its place in it
        self._last: tuple[int, list[Any]] | None = None

    def batches(self, progress: Any) -> Iterator[tuple[Sequence[str], Tensor, Sequence[Any]]]:
        """Ids, pixels [B, 3, H, W] and captions."""
        starts = range(0, self.count, self.batch_size)
        for start, items in zip(starts, self.ahead(starts), strict=True):
            self._last = start, items
            if items:
                self.places += [(start, at) for at in range(len(items))]
                yield [item.id for item in items], stack([item.image for item in items]), [item.captions for item in items]
            progress(min(self.count, start + self.batch_size))
        if not self.places:
            raise self.nothing()

    def __call__(self, numbers: Tensor) -> Tensor:
        """Pixels of images by number."""
        places = [self.places[number] for number in numbers.tolist()]
        return stack([self.items(start)[at].image for start, at in places])

    def items(self, start: int) -> list[Any]:
        """Those of the batch that begins there."""
        if self._last is None or self._last[0] != start:
            self._last = start, self.read(range(start, min(self.count, start + self.batch_size)))
        return self._last[1]

    def ahead(self, starts: range) -> Iterator[list[Any]]:
        """What :meth:`read` gives of each batch, by the workers of the source."""
        for found in usable_batches(self.source, starts, self.count):
            yield [item for item in found if item.captions]

    def read(self, numbers: range) -> list[Any]:
        return [item for item in usable(self.source, numbers) if item.captions]

    def nothing(self) -> BadInput:
        """What to say where no image is left."""
        why = "retrieval needs at least one image with a text"
        return BadInput(f"{self.source.name} has no captions", why, "use another --data or --split")
