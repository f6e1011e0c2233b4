"""Text that is written token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efficientvlm.families.network import Record, kinds_of
from efficientvlm.families.towers.attention import Cache, Context, Sharing
from efficientvlm.families.towers.parts import NOTHING, Encoded, tap


class Writing:
    """What networks that write have in common, which :class:`families.network.Writes` describes."""

    def follow(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Tokens [B, L] to next-token logits [B, L, V], causal; with a `cache`, `ids` are the tokens that follow those in it."""
        raise NotImplementedError

    def decode(self, context: Context, ids: Tensor, mask: Tensor | None, rows: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.follow(ids, mask, context if rows is None else context.of(rows), cache)[0]

    def new_cache(self) -> Cache:
        return Cache()

    def answer(self, batch: dict[str, Any], context: Context, wanted: frozenset[str], record: Record) -> None:
        """Put the `logits` [A, L, V] of the answers of a `vqa_batch` into `record`, and what is `wanted` of the decoder."""
        rows, keep = batch["answer_index"], kinds_of(wanted, "decoder")
        sharing = Sharing.of(rows, len(batch["question_ids"]))
        seen = Context(context.kv, None if context.mask is None else context.mask[rows], rows, sharing)
        record["logits"], out = self.follow(batch["answer_ids"], batch["answer_mask"], seen, keep=keep)
        tap(record, "decoder", out, keep)


def greedy(step: Callable[[Tensor], Tensor], ids: Tensor, end: int, filler: int, most: int) -> Tensor:
    """The likeliest token after `ids` [B, L], the likeliest after that, and so on: [B, <= `most`], the given ones not among them.

    Args:
        step: next-token logits [B, L, V] of the tokens [B, L] that follow those of the calls before; it keeps the cache.
        end: token that ends a text; what stands behind it is `filler`.
    """
    said = [ids[:, :0]]
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(most):
        ids = step(ids)[:, -1:].argmax(-1).masked_fill(done[:, None], filler)
        said.append(ids)
        done |= ids[:, 0] == end
        if bool(done.all()):
            break
    return torch.cat(said, 1)
