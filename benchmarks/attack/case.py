"""What a bad input is: a command, and a place that was prepared for it. Kinds register themselves, in files by what is spoilt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attack.damage import Draw
from attack.process import Place
from attack.stock import Stock

ONE_STEP = ["--max-steps", "1", "--batch-size", "2", "--limit", "8", "--set", "eval_limit=2", "-q"]


@dataclass
class Case:
    """What to run in a place that was prepared, where it writes, what may change, and what it may print as it is (beside its arguments)."""

    argv: list[str]
    what: str
    out: str | None = None
    mutable: tuple[str, ...] = ()
    printed: str = ""


Kind = Callable[[Draw, Stock, Place], Case]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def words(text: str) -> list[str]:
    return text.split()
