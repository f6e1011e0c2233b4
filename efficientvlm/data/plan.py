"""Which samples a step reads, as a pure function of (seed, step): resume is exact and needs no replay."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from efficientvlm.data.draw import generator
from efficientvlm.errors import BadInput


def plan_for(source: Any, batch_size: int, seed: int, world: int = 1, rank: int = 0) -> Plan:
    """How training reads `source`: in shuffled epochs, or as a stream gives it."""
    if getattr(source, "endless", False):
        return StreamPlan(batch_size, world, rank)
    return IndexPlan(len(source), batch_size, seed, world, rank)


class Plan(Protocol):
    """Which samples a step reads."""

    batches_per_epoch: int

    def batch(self, step: int) -> list[int]:
        """Indices that this process reads at `step` (from 0, over all epochs)."""


class StreamPlan:
    """Batches of a stream: indices only grow, and process `rank` has its slice of every batch.

    Raises:
        BadInput: a batch that the processes cannot share equally.
    """

    batches_per_epoch = 1 << 62  # one epoch without end

    def __init__(self, batch_size: int, world: int = 1, rank: int = 0) -> None:
        _check_share(batch_size, world, rank)
        self.batch_size, self.world, self.rank = batch_size, world, rank

    def batch(self, step: int) -> list[int]:
        """Positions in the stream that this process reads at `step`."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return list(range(start, start + share))


class IndexPlan:
    """Shuffled batches of indices into a map-style source.

    Every epoch is a new permutation. The last, incomplete batch of an epoch is dropped; a source smaller than one batch gives one batch of
    everything it has. `batch_size` counts the samples of all processes together, of which process `rank` reads an equal slice.

    Raises:
        BadInput: an empty source, or a batch that the processes cannot share equally.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: int = 1, rank: int = 0) -> None:
        if length < 1:
            raise BadInput("the training data is empty", "", "check --data, --limit and --val-fraction")
        _check_share(batch_size, world, rank)
        self.length, self.batch_size, self.seed, self.world, self.rank = length, batch_size, seed, world, rank
        self.batches_per_epoch = max(1, length // batch_size)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int) -> list[int]:
        """Indices that this process reads at `step` (from 0, over all epochs)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        order = self._permutation(epoch)
        chosen: list[int] = order[position * self.batch_size : (position + 1) * self.batch_size].tolist()
        if len(chosen) % self.world:
            missing = -len(chosen) % self.world
            chosen = chosen + [chosen[i % len(chosen)] for i in range(missing)]
        share = len(chosen) // self.world
        return chosen[self.rank * share : (self.rank + 1) * share]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, generator(self.seed, "plan", epoch).permutation(self.length).astype(np.int64)
        return self._order


def _check_share(batch_size: int, world: int, rank: int) -> None:
    if batch_size < 1 or batch_size % world:
        raise BadInput(f"batch_size {batch_size}", f"{world} processes cannot share it equally", f"use a multiple of {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
