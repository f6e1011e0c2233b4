"""BERT: token embeddings, post-norm layers that may attend to images or to another text, the head that says tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.families.towers.attention import Cache, Context, Sharing, causal
from efficientvlm.families.towers.layers import Layers, Names, PostNormLayer
from efficientvlm.families.towers.parts import NOTHING, Activation, Encoded, Named, Part


class Embeddings(Named):
    """Tokens and their positions; `type_vocab_size` 0 leaves out the table of token types, of which only the first is read."""

    word = Part[nn.Embedding]()
    position = Part[nn.Embedding]()
    token_type = Part[nn.Embedding]()
    norm = Part[nn.LayerNorm]()

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        width: int,
        eps: float,
        dropout: float,
        *,
        type_vocab_size: int = 0,
        padding: int | None = None,
        names: Names | None = None,
    ) -> None:
        super().__init__(names)
        self.typed = type_vocab_size > 0
        self.put(word=nn.Embedding(vocab_size, width, padding_idx=padding), position=nn.Embedding(max_positions, width))
        if self.typed:
            self.put(token_type=nn.Embedding(type_vocab_size, width))
        self.put(norm=nn.LayerNorm(width, eps))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        """Token ids [B, L], from position `offset` on, to states [B, L, W]."""
        x = self.word(ids)
        if self.typed:
            x = x + self.token_type.weight[0]
        return self.dropout(self.norm(x + self.position.weight[offset : offset + ids.shape[1]]))


class Bert(Named):
    """The layers of a text, fusion or decoder tower, with embeddings where it reads tokens itself."""

    embeddings = Part[Embeddings]()
    layers = Part[Layers]()

    def __init__(self, layers: Sequence[PostNormLayer], embeddings: Embeddings | None = None, names: Names | None = None) -> None:
        super().__init__(names)
        if embeddings is not None:
            self.put(embeddings=embeddings)
        self.put(layers=Layers(layers))

    def context(self, states: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Context:
        """Project `states` [C, S, W] for every layer; `mask` [B, S] (rows already applied), 1 = token.

        Where layers share keys and values, `states` are those of all first entries, then of all second ones; `rows` names pairs of them.
        """
        sharing = None if rows is None else Sharing.of(rows, states.shape[0] // self.layers.contexts)
        return Context(self.layers.context(states), None if mask is None else mask.bool()[:, None, None], rows, sharing)

    def forward(
        self, x: Tensor, mask: Tensor | None, context: Context | None = None, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> Encoded:
        """States [B, L, W] through the layers, attending to `context` where there is one; `mask` is True where attention may go."""
        return self.layers.run(x, keep, mask, context, cache)

    def read(self, ids: Tensor, mask: Tensor, context: Context | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Token ids and mask [B, L] (1 = token) to states [B, L, W]."""
        return self(self.embeddings(ids), mask.bool()[:, None, None], context, keep=keep)

    def follow(
        self, ids: Tensor, mask: Tensor | None, context: Context | None, cache: Cache | None, keep: frozenset[str] = NOTHING
    ) -> Encoded:
        """Tokens [B, L] to states [B, L, W], each seeing those up to it; with a `cache`, `ids` are the tokens that follow those in it."""
        offset = cache.length if cache else 0
        out = self(self.embeddings(ids, offset), earlier(ids, mask, cache), context, cache, keep)
        if cache is not None:
            cache.length += ids.shape[1]
        return out


def earlier(ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
    """True where a token of `ids` [B, L] may attend to: itself and those before it, in `cache` too, as far as `mask` [B, L] has them."""
    seen = causal(ids.shape[1], cache.length if cache else 0, ids.device)
    return seen if mask is None else seen & mask.bool()[:, None, None]


class LanguageHead(Named):
    """BERT's prediction head; the output matrix is the word embedding it is called with, unless it has its `own`.

    Files may hold that matrix and the bias a second time, as those of `tied`: the same tensors under the names of a Linear.
    """

    dense = Part[nn.Linear]()
    norm = Part[nn.LayerNorm]()
    bias = Part[nn.Parameter]()
    output_weight = Part[nn.Parameter]()
    output_bias = Part[nn.Parameter]()

    def __init__(
        self,
        width: int,
        vocab_size: int,
        eps: float,
        activation: Activation = F.gelu,
        names: Names | None = None,
        tied: nn.Embedding | None = None,
        own: bool = False,
    ) -> None:
        super().__init__(names)
        self.activation, self.own = activation, own
        self.put(dense=nn.Linear(width, width), norm=nn.LayerNorm(width, eps), bias=nn.Parameter(torch.zeros(vocab_size)))
        if own:
            self.put(output_weight=nn.Parameter(torch.zeros(vocab_size, width)), output_bias=nn.Parameter(torch.zeros(vocab_size)))
        elif tied is not None:
            self.put(output_weight=cast(nn.Parameter, tied.weight), output_bias=self.bias)

    def forward(self, states: Tensor, embeddings: Embeddings) -> Tensor:
        """States [B, L, W] to the logits [B, L, V] of tokens."""
        weight, bias = (self.output_weight, self.output_bias) if self.own else (embeddings.word.weight, self.bias)
        return F.linear(self.norm(self.activation(self.dense(states))), weight, bias)
