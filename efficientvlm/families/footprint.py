"""Bytes that a pass without gradients holds, by formula from the sizes of a network (ours), so that work is cut into blocks that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from efficientvlm.families.structure import Described

FLOAT = 4
LAYER = 20  # values of a token in units of the width: input, norm, queries, keys, values, a feed-forward network and its activation
BLOCK = {"cpu": 96 << 20}  # bytes; larger ones are no faster
ELSEWHERE = 1 << 30


def room(device: torch.device) -> int:
    """Bytes that a block of work may take on `device`."""
    return BLOCK.get(device.type, ELSEWHERE)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one image on its way to its states, of its states with what other towers keep of them (`seen`), of that which each row that
    attends to it copies, of one question token, and of one answer token; `vocabulary` are the logits of a token, `kept_token` are keys and
    values of one in a cache."""

    encoding: int
    seen: int
    attended: int
    question_token: int
    vocabulary: int
    answer_token: int
    kept_token: int

    @classmethod
    def of(cls, config: Described) -> Footprint:
        """For networks of `config`, pruned or not: as if nothing was removed."""
        sizes = config.sizes()
        layers = config.layers()
        vision = max(sizes.widths["vision"])
        text = max((width for tower, widths in sizes.widths.items() if tower != "vision" for width in widths), default=vision)
        tokens, readers = (sizes.image_size // sizes.patch_size) ** 2 + 1, sum(n for tower, n in layers.items() if tower != "vision")
        decoder = layers.get("decoder", 0)
        widest = tokens * vision
        if sizes.window is not None:  # a stage has four times the tokens of the next, and half of its columns
            widest = max(tokens * (vision // width) ** 2 * width for width in sizes.widths["vision"])
        return cls(
            encoding=FLOAT * (widest * LAYER + 9 * sizes.image_size**2),
            seen=FLOAT * tokens * (vision + 2 * text * readers),
            attended=FLOAT * tokens * 2 * text,
            question_token=FLOAT * text * (LAYER + 2 * decoder),
            vocabulary=FLOAT * 2 * sizes.vocab_size,
            answer_token=FLOAT * (2 * sizes.vocab_size + text * (LAYER + 2 * decoder)),
            kept_token=FLOAT * 2 * text * readers,
        )

    @property
    def image(self) -> int:
        """Of an image that is encoded and attended to."""
        return self.encoding + self.seen

    def question(self, tokens: int) -> int:
        """Of a question of `tokens` and the first token of its answer."""
        return tokens * self.question_token + self.attended + self.vocabulary

    def writing(self, tokens: int) -> int:
        """Of a text of `tokens` that is written token by token, with two sets of keys and values while it is copied."""
        return 2 * self.vocabulary + (LAYER + 2 * tokens) * self.kept_token

    def answer(self, tokens: int, question_tokens: int) -> int:
        """Of one candidate of `tokens` that attends to a question."""
        return tokens * self.answer_token + question_tokens * self.question_token // LAYER * 2


def spans(image_index: list[int], image: int, question: int, most: int) -> Iterator[tuple[int, int]]:
    """Runs of questions, start and stop, whose images and themselves take at most `most` bytes; at least one question each.

    Args:
        image_index: image of each question.
        image, question: bytes of one.
    """
    start, seen = 0, set[int]()
    for at, owner in enumerate(image_index):
        wanted = seen | {owner}
        if at > start and len(wanted) * image + (at + 1 - start) * question > most:
            yield start, at
            start, wanted = at, {owner}
        seen = wanted
    if start < len(image_index):
        yield start, len(image_index)


def tiles(rows: int, columns: int, one: int, most: int) -> Iterator[tuple[slice, slice]]:
    """A table of `rows` and `columns`, whose entries take `one` bytes each, in parts of at most `most`, as high as they can be."""
    fit = max(1, most // one)
    high = max(1, min(rows, fit))
    wide = max(1, min(columns, fit // high))
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield slice(top, min(rows, top + high)), slice(left, min(columns, left + wide))
