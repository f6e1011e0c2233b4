"""Where a training step's time goes: the part spent in the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType


class Stopwatch:
    """Adds up the seconds spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0
        self.settle: Callable[[], None] = lambda: None  # waits for a device that works behind our back

    def __enter__(self) -> None:
        self.settle()
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.settle()
        self.seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds so far, and start again from 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


TEACHER = Stopwatch()
