"""The attention of every tower: any number of heads, fused or with maps, keys and values that are shared, projected once, or cached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.families.anatomy import Site
from efficientvlm.families.towers.parts import Named, Part, projection, take

KeyValue = tuple[Tensor, Tensor]
Maps = list[Tensor] | None
PADDING = 1.25  # slots a row: beyond this, copying keys and values costs less


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, maps: Maps = None) -> Tensor:
    """Attention of queries [B, H, T, D] to keys and values [B, H, S, D], any H: [B, H, T, D].

    `mask` is True where attention may go, or is added to the scores. With `maps` the softmax is explicit and the probabilities before
    dropout are appended to it.
    """
    if maps is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # no backward pass reads the scores
    elif mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1)
    maps.append(probabilities)
    return (F.dropout(probabilities, dropout) if dropout else probabilities) @ v


def causal(length: int, before: int, device: torch.device) -> Tensor:
    """bool [length, before + length]: each of `length` tokens sees the `before` ones, those up to it, and itself."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


@dataclass(frozen=True)
class Sharing:
    """How rows [B] that attend to the same of `entries` lie side by side: in `most` slots an entry, row i in slot `place[i]`.

    Keys and values are then read where they are instead of copied for every row. `place` is None where the rows fill all slots in order.
    """

    entries: int
    most: int
    place: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, entries: int) -> Sharing | None:
        """For rows that attend to the entries `rows` [B]; None where it would not pay, in graphs that are exported included."""
        if rows.device.type != "cpu" or torch.compiler.is_compiling() or not len(rows):
            return None  # on a GPU, copying costs less than waiting for the counts
        counts = rows.bincount(minlength=entries)
        most = int(counts.max())
        if entries * most > PADDING * len(rows):
            return None
        if len(rows) == entries * most and bool((rows.diff() >= 0).all()):
            return cls(entries, most, None)
        order = rows.argsort(stable=True)
        rank = torch.empty_like(rows)
        rank[order] = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]]
        return cls(entries, most, rows * most + rank)

    def together(self, x: Tensor, filler: float = 0) -> Tensor:
        """[B, T, W] to [entries, most * T, W]; slots without a row hold `filler`."""
        if self.place is not None:
            x = x.new_full((self.entries * self.most, *x.shape[1:]), filler).index_copy(0, self.place, x)
        return x.reshape(self.entries, self.most * x.shape[1], *x.shape[2:])

    def apart(self, x: Tensor) -> Tensor:
        """[entries, most * T, W] to [B, T, W]."""
        x = x.reshape(self.entries * self.most, x.shape[1] // self.most, *x.shape[2:])
        return x if self.place is None else x.index_select(0, self.place)


@dataclass
class Context:
    """Keys and values of what a tower cross-attends to, projected once; `rows` [B] maps each query row to an entry of it.

    With `sharing`, rows of one entry read its keys and values together; `rows` says the same.
    """

    kv: list[KeyValue | None]
    mask: Tensor | None = None
    rows: Tensor | None = None
    sharing: Sharing | None = None

    def of(self, rows: Tensor) -> Context:
        """For queries that attend to the entries `rows` [B]; where these are a run of entries, no key or value is copied."""
        kv, mask = self.kv, None if self.mask is None else self.mask[rows]
        if rows.device.type != "cpu" or torch.compiler.is_compiling() or not len(rows):
            return Context(kv, mask, rows)
        first, last = int(rows.min()), int(rows.max()) + 1
        kv, rows = [pair and (pair[0][first:last], pair[1][first:last]) for pair in kv], rows - first
        return Context(kv, mask, rows, Sharing.of(rows, last - first))


class Shared(NamedTuple):
    """Keys and values of `stored` heads that the cross-attentions of several layers have in common, as one of the layers sees them.

    They lie in layer `at`, which is the layer itself if `here`; `reads` are the places of its own heads among them.
    """

    at: int
    here: bool
    stored: int
    reads: tuple[int, ...]


class Second(NamedTuple):
    """What a cross-attention has for the second of two images: `heads`, and whether what both give is `merged` by a Linear or averaged."""

    heads: int
    merged: bool


class Cache:
    """Keys and values of the tokens decoded so far, layer by layer."""

    def __init__(self) -> None:
        self.length = 0
        self.kv: dict[int, KeyValue] = {}
        self.first = 0

    def behind(self, layers: int) -> Cache:
        """The same for a tower that goes on after `layers` layers of another one."""
        view = Cache()
        view.kv, view.length, view.first = self.kv, self.length, self.first + layers
        return view

    def select(self, rows: Tensor) -> Cache:
        """A cache whose row i continues row `rows[i]` of this one."""
        chosen = Cache()
        chosen.length = self.length
        chosen.kv = {layer: (take(k, rows), take(v, rows)) for layer, (k, v) in self.kv.items()}
        return chosen

    def extend(self, layer: int, new: KeyValue) -> KeyValue:
        """Keys and values of all tokens, those of `new` last; they are kept."""
        layer += self.first
        if layer in self.kv:
            old = self.kv[layer]
            new = (torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2))
        self.kv[layer] = new
        return new


class Attention(Named):
    """Multi-head attention with any number of heads, none included.

    Queries, keys and values come from a Linear each (roles `q`, `k`, `v`), or with `fused` from one (`qkv`), which attends to itself only.
    Keys and values that are `shared` with others may lie in another attention.
    """

    q = Part[nn.Linear]()
    k = Part[nn.Linear]()
    v = Part[nn.Linear]()
    qkv = Part[nn.Linear]()
    out = Part[nn.Linear]()

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        *,
        fused: bool = False,
        shared: Shared | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(names)
        self.heads, self.head_dim, self.dropout, self.fused, self.shared = heads, head_dim, dropout, fused, shared
        inner, stored = heads * head_dim, (heads if shared is None else shared.stored * shared.here) * head_dim
        if heads and fused:
            self.put(qkv=nn.Linear(width, 3 * inner))
        elif heads:
            self.put(q=nn.Linear(width, inner))
        if stored and not fused:
            self.put(k=nn.Linear(context_width, stored), v=nn.Linear(context_width, stored))
        self.put(out=projection(inner, width))

    def project(self, context: Tensor, lender: Attention | None = None) -> KeyValue | None:
        """Keys and values [B, H, S, D] of `context` [B, S, W], by projections that lie in `lender` or here; None where no head is left."""
        source = lender or self
        return (self._project(source.k, context), self._project(source.v, context)) if self.heads else None

    def _project(self, stored: nn.Linear, context: Tensor) -> Tensor:
        """`context` by the rows of `stored` that belong to the heads of this attention."""
        if self.shared is None or len(self.shared.reads) == self.shared.stored:
            return self._split(stored(context))
        spans = [(place * self.head_dim, self.head_dim) for place in self.shared.reads]
        weight, bias = (torch.cat([tensor.narrow(0, *span) for span in spans]) for tensor in (stored.weight, stored.bias))
        return self._split(F.linear(context, weight, bias))

    def itself(self, x: Tensor, mask: Tensor | None = None, maps: Maps = None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """`x` [B, T, W] attends to itself, with a `cache` also to the tokens before it; `mask` is True where attention may go."""
        if not self.heads:
            return self._nothing(x, mask, maps)
        if self.fused:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        else:
            k, v = self._split(self.k(x)), self._split(self.v(x))
            q = self._split(self.q(x))
        if cache is not None:
            k, v = cache.extend(layer, (k, v))
        return self._out(attend(q, k, v, mask, self.dropout if self.training else 0.0, maps))

    def forward(
        self,
        x: Tensor,
        kv: KeyValue | None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        maps: Maps = None,
        sharing: Sharing | None = None,
    ) -> Tensor:
        """`x` [B, T, W] attends to `kv`; `rows` [B] picks the entry of `kv` for each row; `mask` is True where attention may go.

        With `sharing`, which says the same as `rows`, `kv` is not copied; `mask` is then [B, 1, 1, S].
        """
        if kv is None:
            return self._nothing(x, mask, maps)
        return self.out(self._gathered(self.q(x), kv, mask, rows, maps, sharing))

    def sites(self, prefix: str, position: int, lender: str = "") -> tuple[Site, ...]:
        """Where the head at `position` lies; `prefix` is the name of this module, `lender` of the one that has its keys and values."""
        start = position * self.head_dim
        if self.fused:  # the rows of all queries, then of all keys, then of all values
            parts = [(f"{prefix}.{self.name_of('qkv')}", (part * self.heads + position) * self.head_dim) for part in range(3)]
        else:
            place = start if self.shared is None else self.shared.reads[position] * self.head_dim
            parts = [(f"{prefix}.{self.name_of('q')}", start)]
            parts += [(f"{lender or prefix}.{self.name_of(role)}", place) for role in "kv"]
        rows = tuple(Site(f"{name}.{kind}", 0, at, at + self.head_dim) for name, at in parts for kind in ("weight", "bias"))
        return (*rows, Site(f"{prefix}.{self.name_of('out')}.weight", 1, start, start + self.head_dim))

    def _gathered(self, q: Tensor, kv: KeyValue, mask: Tensor | None, rows: Tensor | None, maps: Maps, sharing: Sharing | None) -> Tensor:
        """What queries [B, T, H * D] of all heads get of `kv`, as :meth:`forward` says: [B, T, H * D]."""
        dropout = self.dropout if self.training else 0.0
        if sharing is not None:
            return sharing.apart(self._share(q, kv, mask, dropout, maps, sharing))
        k, v = kv if rows is None else (take(kv[0], rows), take(kv[1], rows))
        return attend(self._split(q), k, v, mask, dropout, maps).transpose(1, 2).flatten(2)

    def _share(self, q: Tensor, kv: KeyValue, mask: Tensor | None, dropout: float, maps: Maps, sharing: Sharing) -> Tensor:
        seen = None if mask is None else sharing.together(mask[:, 0].expand(-1, q.shape[1], -1), True)[:, None]
        found: Maps = None if maps is None else []
        out = attend(self._split(sharing.together(q)), *kv, seen, dropout, found).transpose(1, 2).flatten(2)
        if maps is not None and found:
            maps.append(sharing.apart(found[0].transpose(1, 2)).transpose(1, 2))
        return out

    def _nothing(self, x: Tensor, mask: Tensor | None, maps: Maps) -> Tensor:
        """What an attention without heads gives."""
        return self.out(self._empty(x, mask, maps))

    def _empty(self, x: Tensor, mask: Tensor | None, maps: Maps) -> Tensor:
        """`x`, and the map [B, 0, T, S] of an attention without heads."""
        if maps is not None:
            maps.append(x.new_zeros(x.shape[0], 0, x.shape[1], mask.shape[-1] if mask is not None else x.shape[1]))
        return x

    def _out(self, heads: Tensor) -> Tensor:
        """[B, H, T, D] to [B, T, W]."""
        return self.out(heads.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class PairAttention(Attention):
    """Cross-attention to two images at once: heads for the first and heads for the second, and what both give together.

    Its keys and values, and its maps, are those of the heads for the first image and behind them those for the second; the images have as
    many tokens. With `merged` one Linear makes one of both outputs (role `merge`), else they are averaged.

    Source: BLIP (Li et al. 2022), NLVR2.
    """

    first = Part[Attention]()
    second = Part[Attention]()
    merge = Part[nn.Linear]()

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        *,
        second: Second,
        names: Mapping[str, str] | None = None,
    ) -> None:
        Named.__init__(self)
        self.heads, self.head_dim, self.dropout, self.fused, self.shared = heads + second.heads, head_dim, dropout, False, None
        self.merged, self.counts = second.merged, (heads, second.heads)
        self.put(first=Attention(width, context_width, heads, head_dim, dropout, names=names))
        self.put(second=Attention(width, context_width, second.heads, head_dim, dropout, names=names))
        if second.merged:
            self.put(merge=nn.Linear(2 * width, width))

    def project(self, context: Tensor, lender: Attention | None = None) -> KeyValue | None:
        """As the base says, for `context` [2, B, S, W] of the first and second images."""
        found = [kv for part, states in zip(self._parts, context, strict=True) if (kv := part.project(states)) is not None]
        return (torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1)) if found else None

    def forward(
        self,
        x: Tensor,
        kv: KeyValue | None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        maps: Maps = None,
        sharing: Sharing | None = None,
    ) -> Tensor:
        if kv is None:
            given = [self._empty(x, mask, maps)] * 2
        else:
            q = torch.cat([part.q(x) for part in self._parts if part.heads], -1)
            given = list(self._gathered(q, kv, mask, rows, maps, sharing).split([count * self.head_dim for count in self.counts], -1))
        outputs = [part.out(heads if part.heads else x) for part, heads in zip(self._parts, given, strict=True)]
        return self.merge(torch.cat(outputs, -1)) if self.merged else (outputs[0] + outputs[1]) / 2

    @property
    def _parts(self) -> tuple[Attention, Attention]:
        return self.first, self.second
