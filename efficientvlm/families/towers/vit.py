"""Vision transformers: patches, positions, pre-norm layers; and pooling by a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import HEAD, NEURON, Site, Unit
from efficientvlm.families.towers.layers import Layers, Names, PreNormLayer
from efficientvlm.families.towers.parts import NOTHING, Activation, Encoded, Named, Part

SLOWEST = 10_000.0
"""Of the waves of positions, how many times slower than the first the last would be, as published."""


class Vit(Named):
    """A ViT, or the CLIP, SigLIP and BLIP kinds of it.

    Args:
        layers: the first one's width is that of the embeddings, the last one's that of the norm behind them.
        class_token: whether a token stands in front of the patches.
        pre_norm: whether the embeddings are normalised too (CLIP).
        patch_bias: whether the patch embedding has a bias.
        batch_axis: whether class token and positions are stored with an axis of one in front.
        local_layers: how many of the last layers run on regions of images, where there are any (X-VLM).
    """

    class_embedding = Part[nn.Parameter]()
    patch_embedding = Part[nn.Conv2d]()
    position_embedding = Part[nn.Parameter]()
    pre_norm = Part[nn.LayerNorm]()
    layers = Part[Layers]()
    post_norm = Part[nn.LayerNorm]()

    def __init__(
        self,
        layers: Sequence[PreNormLayer],
        width: int,
        image_size: int,
        patch_size: int,
        eps: float,
        names: Names,
        *,
        class_token: bool = True,
        pre_norm: bool = False,
        patch_bias: bool = False,
        batch_axis: bool = False,
        local_layers: int = 0,
    ) -> None:
        super().__init__(names)
        self.class_token, self.has_pre_norm, self.local_layers = class_token, pre_norm, local_layers
        lead, positions = (1,) if batch_axis else (), (image_size // patch_size) ** 2 + class_token
        if class_token:
            self.put(class_embedding=nn.Parameter(torch.zeros(*lead, *lead, width)))
        self.put(patch_embedding=nn.Conv2d(3, width, patch_size, patch_size, bias=patch_bias))
        self.put(position_embedding=nn.Parameter(torch.zeros(*lead, positions, width)))
        if pre_norm:
            self.put(pre_norm=nn.LayerNorm(width, eps))
        self.put(layers=Layers(layers))
        self.put(post_norm=nn.LayerNorm(layers[-1].size.width if layers else width, eps))

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to the input [B, T, W] of the first layer."""
        x = self.patch_embedding(pixels.to(self.dtype)).flatten(2).transpose(1, 2)
        if self.class_token:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
        x = x + self.position_embedding
        return self.pre_norm(x) if self.has_pre_norm else x

    def forward(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Normalised images [I, 3, H, W] to the states [I, T, W] of the last layer, without the norm behind it.

        With `regions` = (row → image [R], visible tokens [R, T]) the last `local_layers` run on the regions and on the whole images, and
        the states are [R + I, ...], regions first (X-VLM, multi-grained encoding).
        """
        x = self.embed(pixels)
        if regions is None:
            return self.layers.run(x, keep)
        (rows, visible), local = regions, len(self.layers) - self.local_layers
        out = self.layers.run(x, keep, last=local)
        x = torch.cat([out.states[rows], out.states])
        mask = torch.cat([visible.bool(), visible.new_ones(out.states.shape[:2]).bool()])[:, None, None]
        return self.layers.run(x, keep, mask, after=out, first=local)

    def finish(self, states: Tensor, regions: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What other towers read of the last states [B, T, W], those of regions among them: the same, normalised."""
        return self.post_norm(states)

    @torch.no_grad()
    def place_(self) -> None:
        """Positions as waves (:func:`waves`), as strong as what the patch embedding says of pixels of variance one; a class token has none.

        Raises:
            BadInput: a width that four does not divide.
        """
        patches = self.position_embedding.shape[-2] - self.class_token
        table = waves(math.isqrt(patches), self.position_embedding.shape[-1])
        table *= self.patch_embedding.weight.square().sum((1, 2, 3)).mean().sqrt() / table.std()
        self.position_embedding[..., self.class_token :, :] = table
        self.position_embedding[..., : self.class_token, :] = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype


def waves(side: int, width: int) -> Tensor:
    """Where each of side x side patches lies, as sines and cosines of its column and of its row [side², width] (MoCo v3, MAE).

    Raises:
        BadInput: a width that four does not divide.
    """
    if width % 4:
        raise BadInput(f"positions of width {width}", "sines and cosines of row and column have equal parts of it", "use a multiple of 4")
    rates = SLOWEST ** -(torch.arange(width // 4) / (width // 4))
    phases = torch.arange(side)[:, None] * rates
    line = torch.cat([phases.sin(), phases.cos()], 1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)


class Pooling(Named):
    """SigLIP's pooling of an image: a probe that attends to all its states, and an MLP; it is never pruned."""

    fc1 = Part[nn.Linear]()
    fc2 = Part[nn.Linear]()

    def __init__(self, width: int, heads: int, neurons: int, eps: float, activation: Activation) -> None:
        super().__init__({"fc1": "mlp.fc1", "fc2": "mlp.fc2"})
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps)
        self.put(fc1=nn.Linear(width, neurons), fc2=nn.Linear(neurons, width))
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """States [B, T, W] to one vector each [B, W]."""
        x = self.attention(self.probe.expand(states.shape[0], -1, -1), states, states, need_weights=False)[0]
        return (x + self.fc2(self.activation(self.fc1(self.layernorm(x)))))[:, 0]

    def units(self, prefix: str, tower: str, layer: int) -> list[Unit]:
        """Its heads and neurons as those of a `layer` of `tower`; `prefix` is the name of this module. No gate multiplies them."""
        width, heads = self.attention.embed_dim, self.attention.num_heads
        each, found = width // heads, []
        for head in range(heads):
            start = head * each
            rows = [
                Site(f"{prefix}.attention.in_proj_{kind}", 0, part + start, part + start + each)
                for kind in ("weight", "bias")
                for part in (0, width, 2 * width)
            ]
            out = Site(f"{prefix}.attention.out_proj.weight", 1, start, start + each)
            found.append(Unit(tower, layer, HEAD, head, (*rows, out), ()))
        fc1, fc2 = (f"{prefix}.{self.name_of(role)}" for role in ("fc1", "fc2"))
        for neuron in range(self.fc1.out_features):
            rows = [Site(f"{fc1}.{kind}", 0, neuron, neuron + 1) for kind in ("weight", "bias")]
            found.append(Unit(tower, layer, NEURON, neuron, (*rows, Site(f"{fc2}.weight", 1, neuron, neuron + 1)), ()))
        return found
