"""Tokens to guess: whole words, now and then a run of words (skip-gram), as X-VLM masks its captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RUN_PROBABILITY = 0.2
LONGEST_RUN = 3
MASKED, RANDOM = 0.8, 0.1  # the rest keeps its token
IGNORED = -100


def mask_tokens(
    ids: Tensor, mask: Tensor, tokenizer: Any, draws: Sequence[np.random.Generator], probability: float = 0.25, max_masks: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide `probability` of each row's tokens, at least one and at most `max_masks`; never a special token or padding.

    Words are hidden whole (one longer than the budget in part, if nothing else in its row fits); with p = 0.2 a run of 2 to 3 words. Of
    the hidden tokens 80 % become `[MASK]`, 10 % another token, 10 % stay.

    Args:
        ids, mask: int64 `[B, L]`.
        draws: the generator of each row.

    Returns:
        masked ids `[B, L]`; positions `[B, M]` (0 where padded); labels `[B, M]` (-100 where padded), M the most of any row, at least 1.
    """
    special, continues, ordinary = _vocabulary(tokenizer)
    rows, valid = ids.numpy(), mask.numpy().astype(bool)
    hideable = valid & ~special[rows]
    chosen = [_choose(hideable[row], continues[rows[row]], draws[row], probability, max_masks) for row in range(len(rows))]
    width = max(1, max(map(len, chosen), default=1))
    positions = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    masked = rows.copy()
    for row, places in enumerate(chosen):
        positions[row, : len(places)] = places
        labels[row, : len(places)] = rows[row, places]
    which, slot = np.nonzero(labels != IGNORED)
    where = positions[which, slot]
    dice = np.concatenate([np.empty(0), *(draws[row].random(len(places)) for row, places in enumerate(chosen))])
    other = ordinary[
        np.concatenate([np.empty(0, np.int64), *(draws[row].integers(len(ordinary), size=len(chosen[row])) for row in range(len(rows)))])
    ]
    replaced = np.where(dice < MASKED, tokenizer.mask_token_id, np.where(dice < MASKED + RANDOM, other, rows[which, where]))
    masked[which, where] = replaced
    return torch.from_numpy(masked), torch.from_numpy(positions), torch.from_numpy(labels)


def _choose(
    hideable: NDArray[np.bool_], continues: NDArray[np.bool_], rng: np.random.Generator, probability: float, limit: int
) -> list[int]:
    places = np.flatnonzero(hideable).tolist()
    if not places:
        return []
    words: list[list[int]] = []
    for place in places:
        if words and continues[place]:
            words[-1].append(place)
        else:
            words.append([place])
    budget = min(limit, max(1, round(probability * len(places))))
    order = rng.permutation(len(words)).tolist()
    runs = np.where(rng.random(len(words)) < RUN_PROBABILITY, rng.integers(2, LONGEST_RUN + 1, size=len(words)), 1).tolist()
    hidden: set[int] = set()
    for start, length in zip(order, runs, strict=True):
        if len(hidden) == budget:
            break
        for word in words[start : start + length]:
            if hidden.isdisjoint(word) and len(hidden) + len(word) <= budget:
                hidden.update(word)
            else:
                break
    return sorted(hidden) or words[order[0]][:budget]


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """For every id: is it special, does it continue a word; and the ids of ordinary tokens."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    size = max(vocab.values()) + 1
    special, continues = np.zeros(size, bool), np.zeros(size, bool)
    special[tokenizer.all_special_ids] = True
    continues[[index for token, index in vocab.items() if token.startswith("##")]] = True
    return special, continues, np.flatnonzero(~special)
