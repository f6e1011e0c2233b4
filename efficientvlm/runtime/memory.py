"""Memory that ran out, as far as Python or torch notices, and what to lower in the phase in which it happened; garbage that can wait."""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from efficientvlm.errors import EvlmError, OutOfMemory

SIGNS = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "alloc_failed",
    "bad_alloc",
    "unable to allocate shared memory",
)
WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([\w ]+)|exited unexpectedly(?: with exit code (\d+))?)"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, ONNX Runtime or a library in C says that there is no more memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, Exception) and not isinstance(error, EvlmError) and any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def enough_memory(phase: str, lower: str, more: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say in which phase memory ran out, and what to lower; `more` is asked then for the end of that line.

    Raises:
        OutOfMemory: the block needs more memory than there is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and (died := WORKER.search(str(error))):
            how = f"signal: {died[1].strip()}" if died[1] else f"exit code {died[2]}" if died[2] else "it is gone"
            why = f"{how}; the system does that where memory is short, shared memory too"
            fix = f"run the same command again, with fewer workers (0: none); or {lower}{more()}"
            raise OutOfMemory("a process that reads pictures was killed", why, fix) from None
        if not out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory in {phase}", reason(error), lower + more()) from error


def reason(error: BaseException) -> str:
    """What the error says, in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    at = min((at for sign in SIGNS if (at := text.lower().find(sign)) >= 0), default=0)
    return text[text.rfind(". ", 0, at) + 1 :].strip()[:200] or "the machine has no more"


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside. Loading torch and transformers makes very many objects, which stay, and would be looked through again
    and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
