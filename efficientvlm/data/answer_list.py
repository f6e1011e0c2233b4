"""The file of a closed list of answers: one a line."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from efficientvlm.checkpoints.files import MIB, read_limited, resolve
from efficientvlm.data.cells import LONGEST_TEXT
from efficientvlm.data.text_tables import lines_of
from efficientvlm.errors import BadInput

LARGEST = 64 * MIB


@cache
def _content(path: Path) -> bytes:
    """Read once a process: a pipe gives what it holds only once."""
    return read_limited(path, LARGEST, "a list of answers")


def read_answers(path: Path, what: str = "answer") -> list[str]:
    """The answers (or `what` it is) in a file, or in a pipe that somebody writes into, each once and in order.

    A mark of the byte order is no part of any.

    Raises:
        BadInput: no file, larger than 64 MiB, not UTF-8, or without answers, or a line of more than
            100,000 characters.
    """
    content = read_limited(path, LARGEST, f"a list of {what}s") if path.is_file() else _content(path)
    try:
        lines = lines_of(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(
            f"cannot read the {what}s in {path}", f"{error.reason} at byte {error.start}", f"write one {what} a line, in UTF-8"
        ) from None
    if long := next(((number, len(line)) for number, line in enumerate(lines, 1) if len(line) > LONGEST_TEXT), None):
        why = f"line {long[0]:,} has {long[1]:,} characters, a line has at most {LONGEST_TEXT:,}"
        raise BadInput(f"cannot read the {what}s in {path}", why, f"write one {what} a line")
    answers = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not answers:
        raise BadInput(f"{path} holds no {what}s", "", f"write one {what} a line")
    return answers


def as_input(spec: str | None) -> str | None:
    """How a stage names the file among its inputs: by its path, or a pipe by the digest of what was in it."""
    if spec is None or (path := resolve(spec)).is_file() or path.is_dir():
        return spec
    return f"sha256:{hashlib.sha256(_content(path)).hexdigest()}"
