"""Amounts with a unit, as `30M` parameters, `1.5G` multiply-accumulates or `20ms`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator

FORM = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)")
COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
TIMES = {"us": 10**3, "ms": 10**6, "s": 10**9}
MOST = 10**18


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Amount = Annotated[str, BeforeValidator(_text)]
"""A number and a unit. A plain number is one too."""


def amount_of(budget: str, text: str) -> int:
    """`text` as a whole number of what `budget` counts, rounded down; of `latency` nanoseconds.

    Raises:
        ValueError: saying what is wrong with it.
    """
    units, example = (
        (TIMES, "20ms, with us, ms or s") if budget == "latency" else (COUNTS, "30M, with k, M, G or T; a time ends in us, ms or s")
    )
    form = FORM.fullmatch(text.strip())
    if form is None or form[2] not in units:
        raise ValueError(f"{text!r} is no {'time' if budget == 'latency' else f'number of {budget}'}; write e.g. {example}")
    amount = int(Decimal(form[1]) * units[form[2]])
    if amount < 1 and budget != "latency":
        raise ValueError(f"{text!r} is less than one; give what is to be left, e.g. 30M, or as a share what is to go: --sparsity")
    if not 1 <= amount <= MOST:
        raise ValueError(f"{text!r} is not between 1 and 10^18{' ns' if budget == 'latency' else ''}")
    return amount


def is_time(text: object) -> bool:
    """Whether `text` is an amount of time."""
    form = FORM.fullmatch(text.strip()) if isinstance(text, str) else None
    return form is not None and form[2] in TIMES
