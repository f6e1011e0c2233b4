"""Errors a user can act on: what went wrong, why, and what to do about it."""

from __future__ import annotations

import re
from urllib.parse import unquote

MOST_QUOTED = 200
"""Characters of somebody's text that a message repeats at most."""
MOST_LINES = 50
LONGEST_LINE = 1000
# what a terminal obeys instead of showing: control characters, lone surrogates, marks that turn the direction of writing around
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

HIDDEN = "***"
LOGIN = re.compile(r"([a-z][a-z0-9+.-]{0,30})://[^\s/?#]*@", re.IGNORECASE)
PLACES = ("github", "git", "abfs", "abfss", "az", "wasb", "wasbs")  # what stands before the @ there is a repository or a container
PARAMETER = re.compile(r"""([?&;#](?:amp;)?)([^=&;#?\s'"<>]{1,100})=([^&;#\s'"<>]+)""")
SECRET = re.compile(
    r"token(?!iz|is|s$)|secret|passw|passphrase|signature|credential|apikey|accesskey|authkey|authoriz|oauth|jwt|bearer|googleaccessid"
    r"|^x(amz|goog|oss|ms|cos)|^q(sign|key|ak)|^(sig|sas|key|auth|pass|pwd|sid|session|sessionid|ticket|hmac|expires|policy|keypairid)$"
)
DATES = ("se", "st", "ske", "skt")  # of an address signed with `sig`


def without_secrets(text: str) -> str:
    """`text` as it may be written down: of every address in it the login before the host and what opens it in its query are left out.

    A parameter counts by its name: tokens, keys, passwords, signatures and what is renewed with them (dates, policies). Two addresses that
    differ in nothing else become the same text.
    """
    if "=" in text:
        signed = re.search(r"[?&;]sig=", text, re.IGNORECASE) is not None

        def hide(found: re.Match[str]) -> str:
            name = re.sub("[^a-z0-9]", "", unquote(found[2]).lower())
            secret = SECRET.search(name) or name.endswith("key") or (signed and name in DATES)
            return f"{found[1]}{found[2]}={HIDDEN}" if secret else found[0]

        text = PARAMETER.sub(hide, text)
    if "@" in text and "://" in text:
        text = LOGIN.sub(lambda found: found[0] if found[1].lower() in PLACES else f"{found[1]}://{HIDDEN}@", text)
    return text


def printable(text: object) -> str:
    """`text` as a terminal may get it, :func:`without_secrets`: what it would obey or cannot show stands there as its code.

    Line breaks and tabs stay.
    """
    shown = without_secrets(str(text))
    return UNSHOWN.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", shown)


def shorten(text: object, most: int = MOST_QUOTED) -> str:
    """`text` in one line for a message, :func:`printable`, of at most `most` characters: the middle is left out of a longer one."""
    whole = without_secrets(str(text))  # before any of it is left out: the rest of a secret could not be told any more
    line = " ".join(printable(whole[: 4 * most] + whole[4 * most :][-most:]).split())
    if len(line) <= most and len(whole) <= 5 * most:
        return line
    tail = most // 3
    return f"{line[: most - tail - 1]}…{line[-tail:]}"


def number_of(count: int, one: str, more: str = "") -> str:
    """`1 text` or `2,000 texts`: `count` things, of which one is called `one` and several `more`, by default with an s at the end."""
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def _lines(text: str) -> str:
    """A part of a message: words, lines and their number within bounds, however much of somebody's text got into it."""
    text = without_secrets(text)
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
