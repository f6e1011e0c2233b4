"""Standard output and error that no reader can break: who stops reading changes neither what is done nor the exit code."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Raw(io.RawIOBase):
    """A descriptor; what cannot be written to it is dropped, and the reason kept unless the reader has just gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, content: Any) -> int:
        while True:
            try:
                return os.write(self.descriptor, content)
            except BlockingIOError:  # a pipe that does not wait for its reader: this does
                select.select([], [self.descriptor], [])
            except BrokenPipeError:
                break
            except OSError as error:
                self.failure = self.failure or error
                break
        return len(memoryview(content).cast("B"))


@contextmanager
def unbreakable() -> Iterator[_Raw]:
    """`sys.stdout` and `sys.stderr` in the block; gives the raw standard output, whose `failure` says what went wrong, if anything.

    Characters that the encoding lacks are written as their codes. Descriptors that were closed lead nowhere: the next file that is opened
    would take their place, and what is printed would end in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    before = sys.stdout, sys.stderr
    out = _wrapped(sys.stdout, 1)
    error = _wrapped(sys.stderr, 2)
    sys.stdout, sys.stderr = out or sys.stdout, error or sys.stderr
    try:
        yield out.buffer.raw if out else _Raw(1)  # type: ignore[attr-defined]
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _wrapped(stream: Any, descriptor: int) -> io.TextIOWrapper | None:
    """None for a stream that stands for another place than its descriptor."""
    try:
        if stream is not None:
            stream.flush()
            if stream.fileno() != descriptor:
                return None
    except (OSError, ValueError, AttributeError):
        return None
    raw = _Raw(descriptor)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line_buffering = descriptor == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=line_buffering)
