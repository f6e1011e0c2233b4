"""What a network says of a few pictures when it always takes what is likeliest: forms of one network are compared by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficientvlm.data.batch import stack
from efficientvlm.data.opening import usable
from efficientvlm.loaded import Loaded


class Choice(NamedTuple):
    """What was said, and how much more likely it was than what came closest: the smallest difference of two scores, of the largest score
    where that is above 1."""

    said: str
    margin: float


class Agreement(NamedTuple):
    """Of `of` choices that two forms made, `same` are equal; the others could go either way (`tied`) or are `different`, both of a pair."""

    same: int
    tied: int
    of: int
    different: list[tuple[str, str]]

    @classmethod
    def between(cls, one: Sequence[Choice], other: Sequence[Choice], allowed: float) -> Agreement:
        """`one` is what is right; it could go either way where its margin is at most `allowed`."""
        apart = [(wanted, got) for wanted, got in zip(one, other, strict=True) if wanted.said != got.said]
        different = [(wanted.said, got.said) for wanted, got in apart if wanted.margin > allowed]
        return cls(len(one) - len(apart), len(apart) - len(different), len(one), different)


class Likeliest:
    """Always the likeliest token; `margins` [B] says how close any token of a row came until it ended."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.margins = torch.empty(0)
        self._ended = torch.empty(0, dtype=torch.bool)

    def __call__(self, scores: Tensor, number: int) -> Tensor:
        tokens = scores.argmax(-1)
        margins = margin(scores)
        if number == 0:
            self.margins, self._ended = torch.full_like(margins, float("inf")), torch.zeros_like(tokens, dtype=torch.bool)
        self.margins = torch.where(self._ended, self.margins, torch.minimum(self.margins, margins))
        self._ended = self._ended | (tokens == self.end)
        return tokens


def margin(scores: Tensor) -> Tensor:
    """How far the best of `scores` [..., K] is ahead of the second, of the largest where that is above 1: [...]."""
    best = scores.float().topk(min(2, scores.shape[-1]), -1).values
    scale = scores.masked_fill(scores.isinf(), 0).float().abs().amax(-1).clamp(min=1)
    return (best[..., 0] - best[..., -1]) / scale if best.shape[-1] > 1 else torch.full_like(scale, float("inf"))


def pictures(loaded: Loaded, source: Any, count: int, seed: int) -> tuple[Tensor, list[Any]]:
    """Pictures [N, 3, H, W] in bytes of the first `count` samples of `source`, and these; without a source random ones, and none."""
    items = usable(source, range(min(count, len(source)))) if source else []
    if items:
        return stack([item.image for item in items]), items
    draw, side = torch.Generator().manual_seed(seed), loaded.sizes.image_size
    return torch.randint(256, (count, 3, side, side), generator=draw, dtype=torch.uint8), []
