"""Texts through pre-norm layers, as CLIP and SigLIP read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficientvlm.families.towers.layers import Layers, Names, PreNormLayer
from efficientvlm.families.towers.parts import NOTHING, Encoded, Named, Part


class Text(Named):
    """Tokens and positions, pre-norm layers, a norm, and a Linear `head` to `outputs` columns where there are any (SigLIP)."""

    token_embedding = Part[nn.Embedding]()
    position_embedding = Part[nn.Parameter]()
    layers = Part[Layers]()
    post_norm = Part[nn.LayerNorm]()
    head = Part[nn.Linear]()

    def __init__(
        self,
        layers: Sequence[PreNormLayer],
        vocab_size: int,
        max_positions: int,
        width: int,
        eps: float,
        names: Names,
        outputs: int | None = None,
    ) -> None:
        super().__init__(names)
        self.put(token_embedding=nn.Embedding(vocab_size, width))
        self.put(position_embedding=nn.Parameter(torch.zeros(max_positions, width)))
        self.put(layers=Layers(layers), post_norm=nn.LayerNorm(width, eps))
        if outputs is not None:
            self.put(head=nn.Linear(width, outputs))

    def forward(self, ids: Tensor, mask: Tensor | None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Token ids [B, L] to the states of the last layer; `mask` is True where attention may go."""
        return self.layers.run(self.token_embedding(ids) + self.position_embedding[: ids.shape[1]], keep, mask)
