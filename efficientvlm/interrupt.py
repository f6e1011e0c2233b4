"""A polite stop: the first Ctrl-C or SIGTERM sets a flag that the training loop polls, the second one ends the process at once.

Under `torchrun` only the first one counts: it passes on each signal that the terminal has already sent to every process, and after half a
minute ends what still runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from efficientvlm.ranks import launched


class StopFlag:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and launched() == 1:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGINT and SIGTERM while the block runs; off the main thread, where Python has no handlers, the flag stays down."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, flag._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt while the block runs, as Ctrl-C does; of several processes each is interrupted once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM,) if launched() == 1 else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_interrupted = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if launched() == 1 or not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt
