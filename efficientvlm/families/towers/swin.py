"""Swin transformers: attention within windows of the image, in stages of fewer and wider tokens (Liu et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import Site
from efficientvlm.families.towers.attention import Attention, Cache, Maps, attend
from efficientvlm.families.towers.layers import Layer, Layers, Names, Size
from efficientvlm.families.towers.parts import NOTHING, Activation, Encoded, Named, Part

ELSEWHERE = -100.0
"""What is added to the scores of tokens that the shift has brought into a window from elsewhere: finite, as published."""


class WindowAttention(Attention):
    """Attention within windows of `window` by `window` tokens, with a learnt bias for every offset between two tokens of a window.

    The image has `grid` by `grid` tokens, and the windows are shifted by `shift` tokens to the right and downwards. The bias table is
    [(2 * window - 1)², heads]: a head has a column of it.
    """

    bias_table = Part[nn.Parameter]()

    def __init__(self, width: int, heads: int, head_dim: int, names: Names, *, grid: int, window: int, shift: int) -> None:
        super().__init__(width, width, heads, head_dim, fused=True, names=names)
        self.grid, self.window, self.shift = grid, window, shift
        if heads:
            self.put(bias_table=nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads)))

    def itself(self, x: Tensor, mask: Tensor | None = None, maps: Maps = None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """`x` [B, grid², W] attends within its windows; there is neither a mask nor a cache.

        Maps are [B * windows, H, window², window²], the windows of an image row by row.
        """
        windows, tokens = (self.grid // self.window) ** 2, self.window**2
        if not self.heads:
            if maps is not None:
                maps.append(x.new_zeros(len(x) * windows, 0, tokens, tokens))
            return cast(Tensor, self.out(x))
        q, k, v = self.qkv(self._split_up(x)).unflatten(-1, (3, self.heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        index = torch.from_numpy(_offsets(self.window)).to(x.device)
        by_head = self.bias_table.t().contiguous()  # numbers of one head lie together: read six times as fast
        bias = by_head.index_select(1, index).view(1, self.heads, tokens, tokens)
        if self.shift:  # the mask differs from window to window, and is the same for all images
            bias = bias + torch.from_numpy(_strangers(self.grid, self.window, self.shift)).to(bias)
        if self.shift and x.shape[0] > 1:  # only then are queries, keys and values copied
            q, k, v = (part.flatten(1, 2) for part in (q, k, v))
            bias, together = bias.flatten(0, 1)[None], (1, (windows, self.heads))
        else:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            together = (0, (-1, windows))
        found: Maps = None if maps is None else []
        heads = attend(q, k, v, bias, maps=found).unflatten(*together)  # [B, windows, H, window², D]
        if maps is not None and found:
            maps.append(found[0].reshape(-1, self.heads, tokens, tokens))
        return cast(Tensor, self.out(self._put_together(heads.transpose(2, 3)).flatten(2)))

    def sites(self, prefix: str, position: int, lender: str = "") -> tuple[Site, ...]:
        """Where the head at `position` lies; `prefix` is the name of this module."""
        *rows, out = super().sites(prefix, position)
        return (*rows, Site(f"{prefix}.{self.name_of('bias_table')}", 1, position, position + 1), out)

    def _split_up(self, x: Tensor) -> Tensor:
        """[B, grid², W] to [B, windows, window², W]."""
        x = x.unflatten(1, (self.grid, self.grid))
        x = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        along = (self.grid // self.window, self.window)
        return x.unflatten(2, along).unflatten(1, along).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _put_together(self, x: Tensor) -> Tensor:
        """[B, windows, window², ...] to [B, grid², ...]."""
        count = self.grid // self.window
        x = x.unflatten(2, (self.window, self.window)).unflatten(1, (count, count)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (x.roll((self.shift, self.shift), (1, 2)) if self.shift else x).flatten(1, 2)


class SwinBlock(Layer):
    """A layer of a Swin: norms in front of attention within windows and of neurons.

    Args:
        grid, window, shift: as :class:`WindowAttention` has them.
        drop: chance that a sample leaves out what attention, or what the neurons say, while it is trained (stochastic depth).
    """

    def __init__(
        self, size: Size, eps: float, activation: Activation, names: Names, *, grid: int, window: int, shift: int, drop: float
    ) -> None:
        super().__init__(size, activation, names)
        self.drop, windows = drop, {"grid": grid, "window": window, "shift": shift}
        self.put(attention_norm=nn.LayerNorm(size.width, eps))
        self.put(attention=WindowAttention(size.width, size.heads, size.head_width, self._of_attention, **windows))
        self.put(ffn_norm=nn.LayerNorm(size.width, eps))
        self._add_neurons()

    def beside(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        added = part(norm(x))
        if self.training and self.drop:
            added = added * added.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)
        return x + added


class Merge(Named):
    """Two by two tokens of one stage become a token of the next, of twice the width."""

    norm = Part[nn.LayerNorm]()
    reduction = Part[nn.Linear]()

    def __init__(self, width: int, eps: float, names: Names) -> None:
        super().__init__(names)
        self.put(norm=nn.LayerNorm(4 * width, eps), reduction=nn.Linear(4 * width, 2 * width, bias=False))

    def forward(self, x: Tensor, grid: int) -> Tensor:
        """[B, grid², W] to [B, (grid / 2)², 2 W]."""
        x = x.unflatten(1, (grid, grid))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return cast(Tensor, self.reduction(self.norm(torch.cat(corners, -1)))).flatten(1, 2)


class Swin(Named):
    """A Swin transformer. Its layers are numbered through all stages.

    Args:
        layers: of all stages.
        depths: how many of them each stage has.
        grid: tokens of the image on a side, of the first stage.
    """

    patch_embedding = Part[nn.Conv2d]()
    patch_norm = Part[nn.LayerNorm]()
    layers = Part[Layers]()
    merges = Part[nn.ModuleList]()
    post_norm = Part[nn.LayerNorm]()

    def __init__(
        self, layers: Sequence[SwinBlock], depths: Sequence[int], width: int, grid: int, patch_size: int, eps: float, names: Names
    ) -> None:
        super().__init__(names)
        self.depths, self.grid = tuple(depths), grid
        self.put(patch_embedding=nn.Conv2d(3, width, patch_size, patch_size), patch_norm=nn.LayerNorm(width, eps), layers=Layers(layers))
        self.put(merges=nn.ModuleList(Merge(width << stage, eps, names) for stage in range(len(depths) - 1)))
        self.put(post_norm=nn.LayerNorm(width << (len(depths) - 1), eps))

    def forward(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Normalised images [I, 3, H, W] to the states [I, T, W] of the last stage's patches, without the norm behind it.

        Regions of images take no passes of their own: see :meth:`finish`.
        """
        out = Encoded(self.patch_norm(self.patch_embedding(pixels.to(self.dtype)).flatten(2).transpose(1, 2)))
        first = 0
        for stage, depth in enumerate(self.depths):
            x = self.merges[stage - 1](out.states, self.grid >> (stage - 1)) if stage else out.states
            last = first + depth if stage + 1 < len(self.depths) else None
            out = self.layers.run(x, keep, after=out, first=first, last=last)
            first += depth
        return out

    def finish(self, states: Tensor, regions: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What other towers read of the last states [I, T, W]: normalised patches behind their mean, [I, 1 + T, W].

        With `regions` = (row → image [R], visible tokens [R, 1 + T]) the rows are [R + I, ...], regions first: a region's patches are those
        of its whole image, and its first token is the mean over the patches that it covers (X-VLM with Swin).
        """
        states = self.post_norm(states)
        whole = torch.cat([states.mean(1, keepdim=True), states], 1)
        if regions is None:
            return whole
        rows, visible = regions
        weights, patches = visible[:, None, 1:].to(states.dtype), states[rows]
        return torch.cat([torch.cat([weights @ patches / weights.sum(-1, keepdim=True), patches], 1), whole])

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype


def grids(depths: Sequence[int], grid: int, window: int) -> list[tuple[int, int, int]]:
    """Tokens on a side, window and shift of every layer: every second one of a stage is shifted, unless one window is all there is."""
    found = []
    for stage, depth in enumerate(depths):
        side = grid >> stage
        for block in range(depth):
            found.append((side, min(window, side), window // 2 if block % 2 and side > window else 0))
    return found


def depths_of(depths: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Layers left in each stage of a Swin of `depths` that keeps the layers `chosen`.

    Raises:
        BadInput: a stage keeps none, or a layer would have to shift its windows that does not, or the other way round.
    """
    found, first = [], 0
    for depth in depths:
        blocks = [layer - first for layer in chosen if first <= layer < first + depth]
        last = first + depth == sum(depths)
        if not blocks or len(blocks) % 2 or any(block % 2 != place % 2 for place, block in enumerate(blocks)):
            layers = f"vision layers {first} to {first + depth - 1}, a stage of this Swin"
            why = "a plain layer and a shifted one take turns in it" if blocks else "every stage has some"
            raise BadInput(f"{layers}, keep {[first + block for block in blocks] or 'none'}", why, "choose its layers in pairs")
        if blocks[-1] + 1 < depth and not last:
            why = "what it gives to the next stage is compared with what its teacher gives to it"
            raise BadInput(f"vision layer {first + depth - 1}, the last of a stage of this Swin, is left out", why, "keep that pair")
        found.append(len(blocks))
        first += depth
    return found


def keep_pairs(depths: Sequence[int], count: int) -> list[int]:
    """The layers of which a Swin of `count` is made: pairs of a plain and a shifted one; of 2/2/18/2, 12 are 2/2/6/2.

    Pairs are left out of the longest stage first; those of a stage that stay are spread evenly, its last one included.

    Raises:
        ValueError: an odd `count`, or one that leaves a stage empty.
    """
    pairs = [depth // 2 for depth in depths]
    if count % 2 or not len(depths) <= count // 2 <= sum(pairs):
        raise ValueError(f"{count} layers")
    wanted = list(pairs)
    while sum(wanted) > count // 2:
        wanted[wanted.index(max(wanted))] -= 1
    chosen, first = [], 0
    for depth, total, left in zip(depths, pairs, wanted, strict=True):
        for pair in ((number + 1) * total // left - 1 for number in range(left)):
            chosen += [first + 2 * pair, first + 2 * pair + 1]
        first += depth
    return chosen


def resize_bias_table(table: Tensor, side: int) -> Tensor:
    """A bias table [old², heads] for windows with `side` offsets in a direction, float32: [side², heads].

    Cubic splines on a geometric grid, on which the near offsets lie closer than the far ones, as BEiT and X-VLM do.
    """
    old = round(len(table) ** 0.5)
    if old == side:
        return table
    ratio = _ratio(old // 2, side // 2)
    steps = torch.tensor([ratio**power for power in range(old // 2)], dtype=torch.float64).cumsum(0)
    knots = torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])
    places = torch.arange(-(side // 2), side // 2 + 1, dtype=torch.float64).clamp(knots[0], knots[-1])
    spline = _spline(knots, places)
    square = table.double().unflatten(0, (old, old))
    return torch.einsum("ai,bj,ijh->abh", spline, spline, square).flatten(0, 1).float()


def _ratio(steps: int, reach: int) -> float:
    """The ratio of a geometric series whose `steps` terms add up to `reach`, between 1.01 and 1.5."""
    low, high = 1.01, 1.5
    middle = (low + high) / 2
    while high - low > 1e-6:
        middle = (low + high) / 2
        if (1 - middle**steps) / (1 - middle) > reach:
            high = middle
        else:
            low = middle
    return middle


def _spline(knots: Tensor, places: Tensor) -> Tensor:
    """Float64 [places, knots]: what a cubic spline through values at `knots` (at least four, not-a-knot ends) gives at `places`."""
    count, gaps = len(knots), knots.diff()
    system, right = torch.zeros(2, count, count, dtype=torch.float64)
    for i in range(1, count - 1):  # second derivatives of both sides agree
        before, after = gaps[i - 1], gaps[i]
        system[i, i - 1], system[i, i], system[i, i + 1] = before, 2 * (before + after), after
        right[i, i - 1], right[i, i], right[i, i + 1] = 6 / before, -6 / before - 6 / after, 6 / after
    system[0, :3] = torch.stack([gaps[1], -gaps[0] - gaps[1], gaps[0]])  # and third ones at the second knot from each end
    system[-1, -3:] = torch.stack([gaps[-1], -gaps[-2] - gaps[-1], gaps[-2]])
    curves = torch.linalg.solve(system, right)
    at = (torch.searchsorted(knots, places, right=True) - 1).clamp(0, count - 2)
    gap, eye = gaps[at, None], torch.eye(count, dtype=torch.float64)
    far = (places - knots[at])[:, None] / gap
    near = 1 - far
    bent = (near**3 - near) * curves[at] + (far**3 - far) * curves[at + 1]
    return near * eye[at] + far * eye[at + 1] + bent * gap**2 / 6


@lru_cache(maxsize=64)
def _offsets(window: int) -> NDArray[np.int64]:
    """Row of the bias table [window⁴] for every query and key of a window."""
    places = np.stack(np.divmod(np.arange(window**2), window), -1)
    rows, columns = np.moveaxis(places[:, None] - places[None] + window - 1, -1, 0)
    return (rows * (2 * window - 1) + columns).ravel().astype(np.int64)


@lru_cache(maxsize=64)
def _strangers(grid: int, window: int, shift: int) -> NDArray[np.float32]:
    """[windows, 1, window², window²]: 0 between tokens that lie side by side in the image, :data:`ELSEWHERE` between others."""
    count, part = grid // window, np.searchsorted([grid - window, grid - shift], np.arange(grid), side="right")
    regions = (3 * part[:, None] + part).reshape(count, window, count, window).swapaxes(1, 2).reshape(count**2, 1, -1)
    return np.where(regions[..., None] == regions[..., None, :], 0, ELSEWHERE).astype(np.float32)
