"""The end of a program that writes some files and is not part of the command line: a script of `benchmarks/`, or `python -m`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from efficientvlm.errors import EvlmError


def run_script(work: Callable[[], Iterable[Path]]) -> int:
    """Print the files that `work` writes, or the three lines of its error; the exit code."""
    try:
        written = work()
    except EvlmError as error:
        print("\n".join(filter(None, (f"error: {error.what}", error.why, error.fix))), file=sys.stderr)
        return error.exit_code
    print(*written, sep="\n")
    return 0
