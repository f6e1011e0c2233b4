"""Text that is written token by token: what a network with a decoder has for it, and how the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.network import Record, Writes, kinds_of
from efficientvlm.families.towers.attention import Cache, Context, Sharing
from efficientvlm.families.towers.parts import NOTHING, Encoded, tap

LengthRule = Literal["published", "generated"]
NEVER = float("-inf")


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


Step = Callable[[Tensor, Tensor | None], Tensor]
"""The tokens [B, L] that follow those of the calls before, and which row of the call before each row goes on (None: the same one) → their
next-token logits [B, L, V]."""
Choose = Callable[[Tensor, int], Tensor]
"""Scores [B, V] of the next token, and its number from 0 on → the token of each row [B]."""


class Rules(NamedTuple):
    """When a text ends: `end` is the token that ends it, `filler` stands behind it.

    It has at most `most` tokens, `end` counted, and at least `least` before `end`; given ones are not counted. `repetition` above 1 makes
    tokens that are there already less likely (Keskar et al. 2019, as transformers does).
    """

    end: int
    filler: int
    most: int
    least: int = 0
    repetition: float = 1.0

    def adjusted(self, scores: Tensor, before: Tensor, number: int) -> Tensor:
        """Scores [B, V] of token `number` behind all tokens `before` [B, L], as these rules have them."""
        if self.repetition != 1:
            seen = scores.gather(1, before)
            scores = scores.scatter(1, before, torch.where(seen < 0, seen * self.repetition, seen / self.repetition))
        if number < self.least:
            scores = scores.index_fill(1, torch.tensor([self.end], device=scores.device), NEVER)
        return scores


def stepping(model: Writes, context: Any, rows: Tensor | None = None) -> Step:
    """Steps of `model`, with a key/value cache, on texts that belong to the entries `rows` of `context` at first, by default in order."""
    cache = model.new_cache()

    def step(ids: Tensor, goes_on: Tensor | None) -> Tensor:
        nonlocal cache, rows
        if goes_on is not None:
            cache, rows = cache.select(goes_on), goes_on if rows is None else rows[goes_on]
        return model.decode(context, ids, None, rows, cache)

    return step


def likeliest(scores: Tensor, number: int) -> Tensor:
    """The likeliest token: greedy decoding."""
    return scores.argmax(-1)


def drawn(uniform: Tensor, *, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> Choose:
    """Tokens drawn by their probabilities.

    Args:
        uniform: [B, T] numbers in [0, 1), one a token: the same numbers draw the same tokens, whatever is decoded beside them.
        top_k: only the likeliest so many are drawn; 0: any.
        top_p: only the likeliest that together have this probability, the one that reaches it included.
        temperature: divides the logits.
    """

    def choose(scores: Tensor, number: int) -> Tensor:
        chances, tokens = (scores.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        if top_k:
            chances = chances * (torch.arange(chances.shape[1], device=chances.device) < top_k)
            chances = chances / chances.sum(1, keepdim=True)
        before = chances.cumsum(1) - chances
        chances = chances * (before < top_p)
        reached = chances.cumsum(1)
        wanted = uniform[:, number, None].to(reached) * reached[:, -1:]
        last = (chances > 0).sum(1, keepdim=True) - 1
        place = (reached <= wanted).sum(1, keepdim=True)  # rounding must not lead beyond what may be drawn
        return tokens.gather(1, torch.minimum(place, last))[:, 0]

    return choose


def continued(step: Step, ids: Tensor, rules: Rules, choose: Choose = likeliest) -> Tensor:
    """What follows `ids` [B, L], each token as `choose` takes it, by default the likeliest: [B, <= most], the given ones not among them."""
    said, last = ids, ids
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for number in range(rules.most):
        scores = rules.adjusted(step(last, None)[:, -1], said, number)
        last = choose(scores, number).masked_fill(done, rules.filler)[:, None]
        said = torch.cat([said, last], 1)
        done |= last[:, 0] == rules.end
        if number >= rules.least and bool(done.all()):
            break
    return said[:, ids.shape[1] :]


class Found(NamedTuple):
    """Texts [B, K, <= most] that a search found for each row, best first, the given tokens not among them; and their `scores` [B, K]."""

    ids: Tensor
    scores: Tensor


def beam(step: Step, ids: Tensor, rules: Rules, beams: int, *, length_rule: LengthRule = "published", length_penalty: float = 1.0) -> Found:
    """What follows `ids` [B, L] with the largest log-probability per token, as far as `beams` texts kept a row show it.

    A finished text is scored by its log-probability, that of its end included, divided by its length to the power `length_penalty`.
    `published` counts as its length the tokens given and found, its end not, as do the versions of transformers that X-VLM and BLIP ask
    for; `generated` counts those that were found, its end included, as newer versions do: other texts come out. The search of a row ends
    when no text that is being written can become better than the worst of `beams` finished ones, judged by its present length.

    Source: Wu et al. 2016 for the search; transformers' for its details.
    """
    rows, given = ids.shape
    places = torch.arange(2 * beams, device=ids.device)
    base = torch.arange(rows, device=ids.device)[:, None]
    alive = torch.full((rows, beams), NEVER, device=ids.device)
    alive[:, 0] = 0  # all begin alike
    ended = torch.full((rows, beams), NEVER, device=ids.device)
    texts = ids.new_full((rows, beams, rules.most), rules.filler)
    said = ids[:, None].expand(rows, beams, given)
    done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    last, goes_on = ids, None
    for number in range(rules.most):
        logits = step(last, goes_on)[:, -1].float()
        if number == 0:
            logits = logits.repeat_interleave(beams, 0)
        scores = rules.adjusted(logits.log_softmax(-1), said.flatten(0, 1), number).unflatten(0, (rows, beams))
        words = scores.shape[-1]
        best, at = (alive[..., None] + scores).flatten(1).topk(2 * beams)
        parents, tokens = at // words, at % words
        grown = torch.cat([said.gather(1, parents[..., None].expand(-1, -1, said.shape[-1])), tokens[..., None]], -1)
        ends = tokens == rules.end
        length = (given + number if length_rule == "published" else number + 1) ** length_penalty
        fresh = best.masked_fill(~ends | (places >= beams) | done[:, None], NEVER) / length
        whole = F.pad(grown[..., given:], (0, rules.most - number - 1), value=rules.filler)
        ended, texts = _best(torch.cat([ended, fresh], 1), torch.cat([texts, whole], 1), beams)
        done |= (ended[:, -1] > NEVER) & (ended[:, -1] >= best[:, 0] / length)
        chosen = ends.long().argsort(dim=1, stable=True)[:, :beams]
        alive, said = best.gather(1, chosen), grown.gather(1, chosen[..., None].expand(-1, -1, grown.shape[-1]))
        goes_on = (base * (beams if number else 1) + (parents.gather(1, chosen) if number else 0)).expand(-1, beams).flatten()
        last = said[..., -1].flatten()[:, None]
        if bool(done.all()):
            break
    else:  # what is still being written when there is no more room counts as it is
        length = (given + rules.most if length_rule == "published" else rules.most) ** length_penalty
        unfinished = alive.masked_fill(done[:, None], NEVER) / length
        ended, texts = _best(torch.cat([ended, unfinished], 1), torch.cat([texts, said[..., given:]], 1), beams)
    return Found(texts, ended)


def _best(scores: Tensor, texts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, best first."""
    found, at = scores.topk(count)
    return found, texts.gather(1, at[..., None].expand(-1, -1, texts.shape[-1]))
