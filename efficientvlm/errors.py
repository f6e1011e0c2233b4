"""Errors a user can act on: what went wrong, why, and what to do about it."""

from __future__ import annotations

import re

MOST_QUOTED = 200
"""Characters of somebody's text that a message repeats at most."""
MOST_LINES = 50
LONGEST_LINE = 1000
# what a terminal obeys instead of showing: control characters, lone surrogates, marks that turn the direction of writing around
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` as a terminal may get it: what it would obey or cannot show stands there as its code; line breaks and tabs stay."""
    return UNSHOWN.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", str(text))


def shorten(text: object, most: int = MOST_QUOTED) -> str:
    """`text` in one line for a message, :func:`printable`, of at most `most` characters: the middle is left out of a longer one."""
    line = " ".join(printable(str(text)[: 4 * most] + str(text)[4 * most :][-most:]).split())
    if len(line) <= most and len(str(text)) <= 5 * most:
        return line
    tail = most // 3
    return f"{line[: most - tail - 1]}…{line[-tail:]}"


def _lines(text: str) -> str:
    """A part of a message: words, lines and their number within bounds, however much of somebody's text got into it."""
    lines = [re.sub(rf"\S{{{MOST_QUOTED + 1},}}", lambda word: shorten(word[0]), line[: 8 * LONGEST_LINE]) for line in text.split("\n")]
    lines = [printable(line) if len(line) <= LONGEST_LINE else shorten(line, LONGEST_LINE) for line in lines]
    more = len(lines) - MOST_LINES
    return "\n".join([*lines[:MOST_LINES], f"  and {more} more"] if more > 1 else lines)


class EvlmError(Exception):
    """Base of every error the command line prints as three short lines."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = _lines(what), _lines(why), _lines(fix)
        super().__init__(": ".join(part for part in (self.what, self.why) if part))


class BadInput(EvlmError):
    """A path, file, option or data set that cannot be used."""

    exit_code = 3


class Diverged(EvlmError):
    """Training that came to numbers which are none, or infinite."""

    exit_code = 3


class OutOfMemory(EvlmError):
    """The machine has not the memory that was asked for."""

    exit_code = 3


class TargetMissed(EvlmError):
    """A sparsity or accuracy target that cannot be met."""

    exit_code = 4


class Interrupted(EvlmError):
    """Stopped on request after a resumable state was written."""

    exit_code = 75
