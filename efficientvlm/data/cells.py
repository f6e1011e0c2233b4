"""What a cell of a row holds, whatever wrote it: a text, a number, a list; for the kinds of samples to judge."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from decimal import Decimal
from itertools import pairwise
from typing import Any

from efficientvlm.errors import BadInput, shorten

MOST_LISTED = 1000  # answers, captions or regions of a row
LONGEST_TEXT = 100_000  # characters
MOST_IN_A_CELL = 1_000_000  # characters of all texts in a cell together
LONGEST_LIST = 10_000_000  # characters of a list that is written as text
PLAIN_LIST = re.compile(r"""\[\s*(?:[bru]?['"{\[(]|\]$|array\()|\[[\d\s.,eE+-]*\]$|(?:np\.|numpy\.)?array\(\s*\[""")
PLAIN_GROUP = re.compile(r"""[({]\s*[bru]?['"]""")
OPENS = tuple("[({an")  # a list, or array( and np.array(
LARGEST_NUMBER = 10**100
LEFT_OUT = ("", "none")
"""Names that a role's column is given to leave the role out."""


def listed(value: Any, where: str, column: str) -> Any:
    """`value`, or the list that its text plainly is: in JSON, or as Python prints one, which is what `to_csv` of pandas writes.

    Raises:
        BadInput: the text is plainly a list and can be read as none; names `where` and `column`.
    """
    if not isinstance(value, str) or len(value) > LONGEST_LIST or (text := value.strip())[:1] not in OPENS:
        return value
    plain = PLAIN_LIST.match(text) is not None
    if not plain and not (text[0] == "[" and text[-1] == "]") and not PLAIN_GROUP.match(text):
        return value
    for read in (json.loads, _literal):
        try:
            found = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(found, list | tuple | set | dict):
            if not _is_unicode(found):
                break
            return found if isinstance(found, list | dict) else sorted(found, key=str) if isinstance(found, set) else list(found)
    if plain:
        why = f"its {column} looks like a list and is none that can be read ({shown(value)})"
        raise BadInput(where, why, 'write it as JSON: ["one", "two"]')
    return value


def _literal(text: str) -> Any:
    """A Python literal. Strings side by side, as NumPy prints an array, would be one string to Python: they are refused."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    if any(first == second == tokenize.STRING for first, second in pairwise(kinds)):
        raise ValueError("no comma between two strings")
    return ast.literal_eval(text)


def _is_unicode(found: Any) -> bool:
    try:
        repr(found).encode()
        return not re.search(r"\\ud[89a-f]", repr(found))
    except UnicodeEncodeError:
        return False


def check_size(texts: list[str], where: str, column: str) -> None:
    if len(texts) > MOST_LISTED:
        raise BadInput(where, f"its {column} lists {len(texts):,}, at most {MOST_LISTED:,} are read", "spread them over several rows")
    check_length(texts, where, column)


def check_length(texts: list[str], where: str, column: str) -> None:
    if (size := sum(map(len, texts))) > MOST_IN_A_CELL:
        raise BadInput(where, f"its {column} has {size:,} characters in all, at most {MOST_IN_A_CELL:,} are read", "shorten it")
    longest = max(map(len, texts), default=0)
    if longest > LONGEST_TEXT:
        raise BadInput(
            where, f"its {column} has {longest:,} characters, at most {LONGEST_TEXT:,} are read", "shorten it, or remove the row"
        )


def is_missing(value: Any) -> bool:
    """Whether an optional cell is empty: null, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: Any) -> str | None:
    """A cell as text: a text without spaces around it, true as yes, a number with all its digits; None if it is empty or something else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < LARGEST_NUMBER else None
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)
    if isinstance(value, Decimal):
        return f"{value.normalize():f}" if value.is_finite() else None
    return value.strip() or None if isinstance(value, str) else None


def number(value: Any) -> float | None:
    """A finite number, also one written as text (all that a CSV file has)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def shown(value: Any) -> str:
    return shorten(repr(value), 80)
