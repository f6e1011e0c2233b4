"""Transformer layers of any number of heads and neurons, and the one loop over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, NEURON, SECOND_CROSS_HEAD, Site
from efficientvlm.families.towers.attention import Attention, Cache, Context, Maps, PairAttention, Second, Shared
from efficientvlm.families.towers.parts import (
    CROSS_ATTENTION,
    HIDDEN,
    NOTHING,
    SELF_ATTENTION,
    Activation,
    Encoded,
    Named,
    Part,
    projection,
)

Names = Mapping[str, str]


class Size(NamedTuple):
    """Sizes of one layer: its columns, those of a head, what is left of its heads and neurons.

    `cross_heads` is None where there is no cross-attention; it attends to states of `context_width` columns, with keys and values of its
    own or `shared` ones. With `second`, `cross_heads` are those for the first of two images.
    """

    width: int
    head_width: int
    heads: int
    neurons: int
    cross_heads: int | None = None
    context_width: int = 0
    shared: Shared | None = None
    second: Second | None = None

    @classmethod
    def of(cls, kept: Mapping[str, list[int]], group: str, width: int, heads: int, context_width: int = 0) -> Size:
        """Of layer `group` (`text.3`), of which `kept` units are left and which had `heads` heads on `width` columns."""
        counts = {kind: len(kept[f"{group}.{kind}"]) for kind in (HEAD, NEURON)}
        cross = len(kept[f"{group}.{CROSS_HEAD}"]) if context_width else None
        return cls(width, width // heads, counts[HEAD], counts[NEURON], cross, context_width)

    @classmethod
    def of_tower(cls, kept: Mapping[str, list[int]], tower: str, layers: int, width: int, heads: int, context_width: int = 0) -> list[Size]:
        """Of all `layers` of a tower in which they are alike."""
        return [cls.of(kept, f"{tower}.{layer}", width, heads, context_width) for layer in range(layers)]

    @classmethod
    def sharing(cls, kept: Mapping[str, list[int]], tower: str, sizes: Sequence[Size], together: int) -> list[Size]:
        """`sizes` of `tower` where `together` layers in a row share keys and values: the first has those that any of them needs."""
        found = []
        for layer, size in enumerate(sizes):
            at = layer - layer % together
            own = kept[f"{tower}.{layer}.{CROSS_HEAD}"]
            stored = sorted({head for other in range(at, at + together) for head in kept[f"{tower}.{other}.{CROSS_HEAD}"]})
            found.append(size._replace(shared=Shared(at, layer == at, len(stored), tuple(map(stored.index, own)))))
        return found


class Layer(Named):
    """What layers of both orders share; roles are those below, and of the attentions those of :class:`Attention` after a colon."""

    attention = Part[Attention]()
    attention_norm = Part[nn.LayerNorm]()
    cross_attention = Part[Attention]()
    cross_attention_norm = Part[nn.LayerNorm]()
    fc1 = Part[nn.Linear]()
    fc2 = Part[nn.Linear]()
    ffn_norm = Part[nn.LayerNorm]()

    def __init__(self, size: Size, activation: Activation, names: Names) -> None:
        super().__init__({"fc1": "ffn.fc1", "fc2": "ffn.fc2"} | {role: name for role, name in names.items() if ":" not in role})
        self.size, self.activation = size, activation
        self._of_attention = {role.partition(":")[2]: name for role, name in names.items() if ":" in role}

    def _attention(self, heads: int, context_width: int, dropout: float, **sharing: Any) -> Attention:
        return Attention(self.size.width, context_width, heads, self.size.head_width, dropout, names=self._of_attention, **sharing)

    def _add_neurons(self) -> None:
        if self.size.neurons:
            self.put(fc1=nn.Linear(self.size.width, self.size.neurons))
        self.put(fc2=projection(self.size.neurons, self.size.width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Context | None = None,
        layer: int = 0,
        cache: Cache | None = None,
        maps: tuple[Maps, Maps] = (None, None),
    ) -> Tensor:
        """`x` [B, T, W] through self-attention, cross-attention where there is any and something to attend to, and neurons."""
        x = self.beside(x, self.attention_norm, lambda h: self.attention.itself(h, mask, maps[0], cache, layer))
        if context is not None and self.size.cross_heads is None and maps[1] is not None:
            maps[1].append(x.new_zeros(x.shape[0], 0, x.shape[1], 0))
        elif context is not None and self.size.cross_heads is not None:
            given, seen, rows, sharing = context.kv[layer], context.mask, context.rows, context.sharing
            x = self.beside(x, self.cross_attention_norm, lambda h: self.cross_attention(h, given, seen, rows, maps[1], sharing))
        return self.beside(x, self.ffn_norm, self.feed)

    def beside(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """`x` with what `part` of the layer adds to it, normalised as the order of the layer is."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """`x` [B, T, W] through the neurons; without any, what is left of them."""
        return self.fc2(self.activation(self.fc1(x)) if self.size.neurons else x)

    def sites(self, prefix: str, kind: str, position: int) -> tuple[Site, ...]:
        """Where the unit of `kind` at `position` lies; a gate multiplies each of its columns. `prefix` is the name of this layer."""
        if kind != NEURON:
            role = "attention" if kind == HEAD else "cross_attention"
            attention: Attention = getattr(self, role)
            name = self.name_of(role)
            if isinstance(attention, PairAttention):
                image = "second" if kind == SECOND_CROSS_HEAD else "first"
                of_image: Attention = getattr(attention, image)
                return of_image.sites(f"{prefix}.{name}.{image}", position)
            if kind == HEAD or self.size.shared is None:
                return attention.sites(f"{prefix}.{name}", position)
            return attention.sites(f"{prefix}.{name}", position, f"{prefix.rpartition('.')[0]}.{self.size.shared.at}.{name}")
        fc1, fc2 = (f"{prefix}.{self.name_of(role)}" for role in ("fc1", "fc2"))
        rows = (Site(f"{fc1}.{part}", 0, position, position + 1) for part in ("weight", "bias"))
        return (*rows, Site(f"{fc2}.weight", 1, position, position + 1))


class PreNormLayer(Layer):
    """A layer of a vision transformer: norms in front of self-attention and neurons."""

    def __init__(self, size: Size, eps: float, activation: Activation, names: Names, *, dropout: float = 0.0, fused: bool = False) -> None:
        super().__init__(size, activation, names)
        self.put(attention_norm=nn.LayerNorm(size.width, eps))
        self.put(attention=self._attention(size.heads, size.width, dropout, fused=fused))
        self.put(ffn_norm=nn.LayerNorm(size.width, eps))
        self._add_neurons()

    def beside(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + part(norm(x))


class PostNormLayer(Layer):
    """A layer of BERT: norms behind self-attention, cross-attention where it has any, and neurons."""

    def __init__(self, size: Size, eps: float, activation: Activation, names: Names, *, dropout: float, attention_dropout: float) -> None:
        super().__init__(size, activation, names)
        self.put(attention=self._attention(size.heads, size.width, attention_dropout))
        self.put(attention_norm=nn.LayerNorm(size.width, eps))
        if size.cross_heads is not None and size.second is not None:
            sizes = (size.width, size.context_width, size.cross_heads, size.head_width, attention_dropout)
            self.put(cross_attention=PairAttention(*sizes, second=size.second, names=self._of_attention))
            self.put(cross_attention_norm=nn.LayerNorm(size.width, eps))
        elif size.cross_heads is not None:
            self.put(cross_attention=self._attention(size.cross_heads, size.context_width, attention_dropout, shared=size.shared))
            self.put(cross_attention_norm=nn.LayerNorm(size.width, eps))
        self._add_neurons()
        self.put(ffn_norm=nn.LayerNorm(size.width, eps))
        self.dropout = nn.Dropout(dropout)

    def beside(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        normalised: Tensor = norm(x + self.dropout(part(x)))
        return normalised


class Layers(nn.ModuleList):
    """The layers of a tower, and the loop over them that keeps what is wanted."""

    def run(
        self,
        x: Tensor,
        keep: frozenset[str] = NOTHING,
        mask: Tensor | None = None,
        context: Context | None = None,
        cache: Cache | None = None,
        *,
        after: Encoded | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Encoded:
        """States [B, T, W] through the layers `first` to `last` (all by default); `mask` is True where attention may go.

        A pass that changes something on its way runs some layers, then goes on `after` what these gave.
        """
        out = Encoded(x) if after is None else after
        for i in range(first, len(self) if last is None else last):
            if HIDDEN in keep:
                out.hidden.append(x)
            x = self[i](x, mask, context, i, cache, (out.maps(SELF_ATTENTION, keep, i), out.maps(CROSS_ATTENTION, keep, i)))
        if HIDDEN in keep and last is None:
            out.hidden.append(x)
        out.states = x
        return out

    def context(self, states: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of `states` [C, S, W] for the cross-attention of every layer, None for one without.

        Layers that share them attend to a part of `states` each, in turn: of two, the first to the first half. A layer with heads for two
        images attends to both halves.
        """
        found: list[tuple[Tensor, Tensor] | None]
        parts, found = states.unflatten(0, (self.contexts, -1)), []  # `chunk` would fix the number of images of an exported graph
        for number, layer in enumerate(cast(Iterable[Layer], self)):
            if layer.size.cross_heads is None:
                found.append(None)
                continue
            shared = layer.size.shared
            lender = layer if shared is None else cast(Layer, self[shared.at])
            part = parts if layer.size.second else parts[0 if shared is None else number - shared.at]
            found.append(layer.cross_attention.project(part, lender.cross_attention))
        return found

    @property
    def contexts(self) -> int:
        """How many sets of states the layers attend to."""
        sizes = [layer.size for layer in cast(Iterable[Layer], self)]
        places = [number - size.shared.at for number, size in enumerate(sizes) if size.shared is not None]
        return 1 + max([*places, *(1 for size in sizes if size.second)], default=0)
