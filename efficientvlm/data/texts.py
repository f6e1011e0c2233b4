"""Strings to padded token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientvlm.data.cells import LONGEST_TEXT
from efficientvlm.data.ledger import Book
from efficientvlm.data.tokenizer import ends_of, guarded
from efficientvlm.errors import BadInput, shorten

CACHED_TEXTS = 200_000
PLAIN_IDS = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
"""Without a word about long texts: what is cut is counted and said here."""
AT_A_TIME = 1_000_000  # characters: what a tokenizer makes of them takes about 100 bytes each


class Texts(Book):
    """Strings to padded token ids, each distinct string tokenised once.

    A text begins with `cls` and ends with `sep`: BERT's [CLS] and [SEP], or the tokens that another tokenizer puts there; `cls` is None
    where it puts nothing in front.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 40) -> None:
        super().__init__()
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.cls, self.sep = ends_of(tokenizer)
        self._head = [] if self.cls is None else [self.cls]
        self.pad: int = tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}
        self.special = frozenset(tokenizer.all_special_ids)
        unknown = tokenizer.unk_token_id  # byte-level tokenizers have none, or call the end of a text so
        self.unknown: int | None = None if unknown in (self.cls, self.sep, self.pad) else unknown
        self.read, self.unread = 0, 0
        """Tokens of all distinct strings so far, and how many of them are unknown."""
        self.cut: set[str] = set()
        self.longest = 0
        """Strings that were cut to `max_tokens` (at most 200,000 of them), and the most tokens one of them has."""

    @property
    def start(self) -> int:
        """The token in front of a text, from which a decoder goes on."""
        if self.cls is None:
            raise ValueError("this tokenizer puts nothing in front of a text")
        return self.cls

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each string, without special tokens, not truncated.

        Raises:
            BadInput: a string of more than 100,000 characters, or one on which the tokenizer fails.
        """
        known, new = self._new(texts)
        for some in _portions(new) if new else ():
            with guarded("the tokenizer", "check the texts, and the folder of the tokenizer"):
                encoded = self.tokenizer(some, **PLAIN_IDS)
            self._learn(known, some, encoded["input_ids"])
        found = [known[text] for text in texts]
        self.tell("ids", list(texts), found)
        return found

    def _new(self, texts: Sequence[str]) -> tuple[dict[str, list[int]], list[str]]:
        """The ids that are known, and those of `texts` that are not there; where all would be too many, what was known is forgotten."""
        known = self._ids
        new = list({text for text in texts if text not in known})
        if new and len(known) + len(new) > CACHED_TEXTS:
            known = self._ids = {}  # a new one: another thread may be reading the old
            new = list(set(texts))
        return known, new

    def _learn(self, known: dict[str, list[int]], texts: Sequence[str], found: Sequence[list[int]]) -> None:
        known.update(zip(texts, found, strict=True))
        self.read += sum(map(len, found))
        self.unread += 0 if self.unknown is None else sum(ids.count(self.unknown) for ids in found)

    def enter(self, *entry: Any) -> None:
        if entry[0] == "ids":
            given = dict(zip(entry[1], entry[2], strict=True))
            known, new = self._new(entry[1])
            self._learn(known, new, [given[text] for text in new])
        else:
            self._keep_cut(entry[1])

    def identities(self, texts: Sequence[str]) -> list[tuple[int, ...] | None]:
        """What each string is to the tokenizer, equal where case and spacing alone differ; None for a string that it cannot read: one
        that has an unknown or a special token in it, or leaves no token at all."""
        return [tuple(ids) if ids and self.special.isdisjoint(ids) else None for ids in self.ids(texts)]

    def room(self, max_tokens: int | None = None, *, double_sep: bool = False) -> int:
        """Tokens of a text that fit between its ends."""
        return (max_tokens or self.max_tokens) - len(self._head) - 1 - double_sep

    def batch(
        self, texts: Sequence[str], max_tokens: int | None = None, *, double_sep: bool = False, prompt: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, both int64 `[B, L]`, padded to the longest; at most `max_tokens`, the closing token always kept.

        `double_sep` closes every text with two separators (a quirk of the published release); `prompt` are tokens in front of every text,
        which are never cut.
        """
        tail = [self.sep] * (1 + double_sep)
        room = max(0, self.room(max_tokens, double_sep=double_sep) - len(prompt))
        known = self.ids(texts)
        if max_tokens is None:
            self._note_cut(texts, known, room)
        rows = [[*self._head, *prompt, *ids[:room], *tail] for ids in known]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = int(lengths.max(initial=0))
        mask = np.arange(width) < lengths[:, None]
        out = np.full((len(rows), width), self.pad, np.int64)
        out[mask] = np.fromiter((token for row in rows for token in row), np.int64, int(lengths.sum()))
        return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))

    def _note_cut(self, texts: Sequence[str], known: Sequence[list[int]], room: int) -> None:
        if cut := [(text, len(ids) + self.max_tokens - room) for text, ids in zip(texts, known, strict=True) if len(ids) > room]:
            self.tell("cut", cut)
            self._keep_cut(cut)

    def _keep_cut(self, cut: Sequence[tuple[str, int]]) -> None:
        for text, length in cut:
            if len(self.cut) < CACHED_TEXTS:
                self.cut.add(text)
                self.longest = max(self.longest, length)


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in lists of at most a million characters, or of one text; :class:`BadInput` for a text that is too long."""
    some: list[str] = []
    size = 0
    for text in texts:
        if len(text) > LONGEST_TEXT:
            why = f"it has {len(text):,} characters, at most {LONGEST_TEXT:,} are read"
            raise BadInput(f"the text '{shorten(text, 40)}' is too long", why, "shorten it")
        if some and size + len(text) > AT_A_TIME:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    yield some
