"""The batches of a run's steps, one step after another, made ahead of their use by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from efficientvlm.data.ahead import Ahead
from efficientvlm.data.batch import Batch
from efficientvlm.runtime import ranks

Job = tuple[int, dict[str, list[int]]]
"""A step, and by source the indices of the samples that this process reads at it."""


class Feed:
    """Called with a step, its batches; steps come one after another.

    Batches follow from a step alone, and counts are taken over with them, so they, the sample that stops a run, and what a resumed run
    reads are the same for any number of workers.

    Args:
        indices: what this process reads at a step; asked in this process.
        make: the batches of a step, in a worker.
        settled: what all processes of a run learn together of these; asked in this process, as they may communicate.
        pin: results go to a GPU.
    """

    def __init__(
        self,
        indices: Callable[[int], dict[str, list[int]]],
        make: Callable[[Job], Sequence[Batch]],
        settled: Callable[[Sequence[Batch], int], Sequence[Batch]],
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.indices, self.make, self.settled, self.workers, self.pin = indices, make, settled, workers, pin
        self._made: Iterator[Any] = iter(())

    @contextmanager
    def begun(self, step: int, steps: int) -> Iterator[None]:
        """Make the batches from `step` to the last of `steps` while the block runs; no worker outlives it."""
        jobs = ((number, self.indices(number)) for number in range(step, steps))
        with Ahead(self.make, jobs, min(self.workers, steps - step), pin=self.pin) as self._made:
            yield

    def __call__(self, step: int) -> Sequence[Batch]:
        """The batches of the step that is due, `step`; an error of one process is raised by all."""
        return self.settled(ranks.together(lambda: next(self._made)), step)
