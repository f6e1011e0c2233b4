"""Sentences alone, which need not say anything of a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficientvlm.data.cells import check_size, shown
from efficientvlm.data.kinds.kind import Kind, Picture, Row
from efficientvlm.data.shapes import Shapes
from efficientvlm.errors import BadInput


@dataclass(slots=True)
class SentenceItem:
    """A text; its id follows from the text alone, blanks squeezed, so that equal sentences have one id wherever they stand."""

    id: str
    text: str


def sentence(text: str) -> SentenceItem:
    """`text` with its id."""
    said = " ".join(text.split())
    return SentenceItem(hashlib.blake2b(said.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest(), text)


class Sentences(Kind[SentenceItem, str]):
    """Role sentence; of a plain text file a line."""

    name, holds, pictures, plain = "sentences", "sentences", (), True
    roles = {"sentence": ("sentence", "text", "caption")}
    required = ("sentence",)

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> str:
        text = values.get("sentence")
        if not isinstance(text, str) or not text.strip():
            raise BadInput(where, f"its {columns['sentence']} is no text ({shown(text)})", "write a text, or remove the row")
        check_size([text], where, columns["sentence"])
        return text.strip()

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[str]]) -> SentenceItem:
        return sentence(rows[0].content)

    def texts(self, contents: Sequence[str]) -> Iterator[str]:
        yield from contents

    def drawn(self, shapes: Shapes[SentenceItem], index: int, key: str) -> SentenceItem:
        return sentence(self.contents_at(shapes, index)[0])

    def contents_at(self, shapes: Shapes[SentenceItem], index: int) -> list[str]:
        said = shapes.captions(shapes.scene(index)[1], shapes.words(index, "pair"))
        return [said[index % len(said)]]


SENTENCES = Sentences()
