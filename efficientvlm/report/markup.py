"""Markup that cannot be forgotten to be escaped: text becomes markup only through these functions."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

VOID = {"meta", "br"}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Html(str):
    """Finished markup. A plain `str` is text, and is escaped wherever it meets markup."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"


def escape(text: str) -> Html:
    """Text as markup; characters that no page may hold become U+FFFD."""
    return text if isinstance(text, Html) else Html(html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)))


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, text escaped, None left out."""
    parts = []
    for child in children:
        if isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. A final underscore of an attribute's name is dropped, others become hyphens; None and False leave it out."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            text = value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            words.append(f'{key}="{html.escape(CONTROL.sub(" ", text))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], numeric: Iterable[int] = (), **attributes: str) -> Html:
    """A table whose first column names the rows; columns in `numeric` are aligned right. It scrolls by itself where it is too wide."""
    right = set(numeric)

    def style(column: int) -> str | None:
        return "number" if column in right else None

    titles = [tag("th", child, class_=style(column), scope="col") for column, child in enumerate(head)]
    lines = []
    for row in rows:
        cells = [
            tag("td" if column else "th", child, class_=style(column), scope=None if column else "row") for column, child in enumerate(row)
        ]
        lines.append(tag("tr", cells))
    content = tag("table", tag("thead", tag("tr", titles)), tag("tbody", lines), **attributes)
    return tag("div", content, class_="wide", tabindex="0", role="group")
