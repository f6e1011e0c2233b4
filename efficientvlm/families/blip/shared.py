"""BLIP's decoder in pre-training: all that it has of its own is self-attention, the norm behind that, and the head that says tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from efficientvlm.families.towers.bert import Bert
from efficientvlm.families.towers.layers import Layer, Names, PostNormLayer, Size

LENT = ("cross_attention", "cross_attention_norm", "fc1", "fc2", "ffn_norm")
"""Roles of what a layer of the decoder takes from the same layer of the encoder."""


class BorrowingLayer(PostNormLayer):
    """A layer whose cross-attention and neurons are those of another one, which alone holds their weights and gates.

    Source: BLIP (Li et al. 2022), section 3.1; the published files repeat the shared tensors, ours have them once.
    """

    def __init__(self, lender: PostNormLayer, size: Size, eps: float, names: Names, *, attention_dropout: float) -> None:
        Layer.__init__(self, size, lender.activation, names)
        self._lender = (lender,)  # not a part of this module
        self.put(attention=self._attention(size.heads, size.width, attention_dropout))
        self.put(attention_norm=nn.LayerNorm(size.width, eps))
        self.dropout = nn.Dropout(lender.dropout.p)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lender[0], name) if name in LENT else super().__getattr__(name)


class BorrowingBert(Bert):
    """Layers that read the tokens with the embeddings of another tower."""

    def __init__(self, lender: Bert, layers: Sequence[PostNormLayer], names: Names) -> None:
        super().__init__(layers, None, names)
        self._lender = (lender,)

    def __getattr__(self, name: str) -> Any:
        return self._lender[0].embeddings if name == "embeddings" else super().__getattr__(name)
