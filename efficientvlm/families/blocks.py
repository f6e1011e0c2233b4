"""Parts that every family builds its networks from: attention of any head count, key/value caches, what a pass keeps for distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.families.base import Record

HIDDEN, SELF_ATTENTION, CROSS_ATTENTION = "hidden", "self_attention", "cross_attention"
KeyValue = tuple[Tensor, Tensor]
QUICK = 1.702
PADDING = 1.25  # slots a row: beyond this, copying keys and values costs less


@dataclass
class Encoded:
    """States of one pass and what was asked to be kept.

    `hidden[i]` is the input of layer i (the last is the output), [B, T, W]; maps are softmax probabilities before dropout, [B, H, T, S], or
    an empty tensor for a layer of which none is wanted.
    """

    states: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    self_attention: list[Tensor] = field(default_factory=list)
    cross_attention: list[Tensor] = field(default_factory=list)

    def maps(self, kind: str, keep: frozenset[str], layer: int) -> list[Tensor] | None:
        """Where `layer` puts its maps of `kind`: nowhere unless `keep` has `kind` (of all layers) or `kind.layer`."""
        found: list[Tensor] = getattr(self, kind)
        if kind in keep or f"{kind}.{layer}" in keep:
            return found
        if any(wanted.startswith(kind) for wanted in keep):
            found.append(self.states.new_empty(0))
        return None

    def spread(self, rows: Tensor) -> Encoded:
        """Row `rows[i]` of everything as row i."""
        kept = (
            [take(tensor, rows) if len(tensor) else tensor for tensor in tensors]
            for tensors in (self.hidden, self.self_attention, self.cross_attention)
        )
        return Encoded(take(self.states, rows), *kept)


class Bias(nn.Module):
    """What is left of an output projection whose inputs are all gone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, maps: list[Tensor] | None = None) -> Tensor:
    """Attention of queries [B, H, T, D] to keys and values [B, H, S, D], any H: [B, H, T, D].

    `mask` is True where attention may go. With `maps` the softmax is explicit and the probabilities before dropout are appended to it.
    """
    if maps is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # no backward pass reads the scores
    probabilities = scores.softmax(-1)
    maps.append(probabilities)
    return (F.dropout(probabilities, dropout) if dropout else probabilities) @ v


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_add_(0, rows, grad.contiguous()), None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Row `rows[i]` of `x` as row i; its gradient is added up by whole rows, where `index_select` scatters number by number."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Take.apply(x, rows)
    return x.index_select(0, rows)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * QUICK
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / QUICK)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702·x) of any shape; its backward pass is one kernel and keeps one tensor."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuickGELU.apply(x)
    return x * torch.sigmoid(QUICK * x)


def no_maps(x: Tensor, mask: Tensor | None, maps: list[Tensor] | None) -> None:
    """Append the map [B, 0, T, S] of an attention without heads, if maps are kept."""
    if maps is not None:
        maps.append(x.new_zeros(x.shape[0], 0, x.shape[1], mask.shape[-1] if mask is not None else x.shape[1]))


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


class Cache:
    """Keys and values of the answer tokens decoded so far, layer by layer."""

    def __init__(self) -> None:
        self.length = 0
        self.kv: dict[int, KeyValue] = {}

    def select(self, rows: Tensor) -> Cache:
        """A cache whose row i continues row `rows[i]` of this one."""
        chosen = Cache()
        chosen.length = self.length
        chosen.kv = {layer: (k[rows], v[rows]) for layer, (k, v) in self.kv.items()}
        return chosen

    def extend(self, layer: int, new: KeyValue | None) -> KeyValue | None:
        if new is None:
            return None
        if layer in self.kv:
            old = self.kv[layer]
            new = (torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2))
        self.kv[layer] = new
        return new


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] to normalised floats of `dtype`; floats are taken as normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    centre = pixels.new_tensor(mean, dtype=torch.float32)[:, None, None]
    spread = pixels.new_tensor(std, dtype=torch.float32)[:, None, None]
    return ((pixels.float() / 255 - centre) / spread).to(dtype)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Position embedding [1 + old², W] for `grid` x `grid` patches (bicubic, as X-VLM does for fine-tuning); the CLS row stays."""
    old = math.isqrt(len(table) - 1)
    patches = table[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)[0]
    return torch.cat([table[:1], resized.flatten(1).T])


def tap(record: Record, tower: str, out: Encoded, keep: frozenset[str]) -> None:
    """Put what `out` kept into `record` as `tower.kind`."""
    for kind in {name.partition(".")[0] for name in keep}:
        record[f"{tower}.{kind}"] = getattr(out, kind)
