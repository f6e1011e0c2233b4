"""A polite stop: the first Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) sets a flag that the training loop polls, the second one ends
the process at once. A SIGHUP that was to be ignored when the process began (`nohup`) is ignored.

Under `torchrun` only the first one counts: it passes on each signal that the terminal has already sent to every process, and after half a
minute ends what still runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from efficientvlm.runtime.ranks import launched


def _heard() -> list[signal.Signals]:
    """The signals that ask for a stop."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


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
    """Catch SIGINT, SIGTERM and SIGHUP while the block runs; off the main thread, where Python has no handlers, the flag stays down.

    Raises:
        KeyboardInterrupt: an earlier signal was lost.
    """
    flag = StopFlag()
    raise_lost()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, flag._handle) for number in _heard()}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt while the block runs, as Ctrl-C does; of several processes each is interrupted once.

    Raises:
        KeyboardInterrupt: on entry, an earlier signal was lost.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raise_lost()
    previous = {number: signal.signal(number, _interrupt) for number in _heard()}
    try:
        yield
    except KeyboardInterrupt:
        _interrupted = launched() > 1
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_lost() -> None:
    """KeyboardInterrupt if a signal has raised one that went no further: Python drops what is raised in callbacks of an import."""
    global _interrupted
    if _interrupted and launched() == 1:
        _interrupted = False
        raise KeyboardInterrupt


def deaf() -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP from now on: the work is done and the process ends with its own code."""
    if threading.current_thread() is threading.main_thread():
        for number in _heard():
            signal.signal(number, signal.SIG_IGN)


_interrupted = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if launched() == 1 or not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt
