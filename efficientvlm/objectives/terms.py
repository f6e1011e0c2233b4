"""What a student is compared with its teacher on: terms as rows of a table, the distances they use, and which layers and heads meet.

Distances are computed in float32. Over several processes a mean is one over all their items, in the sense of `ranks.share_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.compression.layers import layer_map
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, SECOND_CROSS_HEAD
from efficientvlm.families.network import Record
from efficientvlm.families.structure import odd_layers
from efficientvlm.runtime import ranks


class Term(NamedTuple):
    """A row: what is compared, and how.

    `weight` is the setting that it is multiplied by; several rows may share one. `tap` is looked up in the records of student and teacher,
    `mask` (tokens or rows that count) in the student's; `pick` says what of either record is compared, by default all. Of hidden states
    those before `first` and from `last` on are left out. With
    `regions` one side may hold rows of regions that the other does not have; the rows of whole images come last in both. `loss` is the
    loss without which nothing is recorded there; empty where it always is. `skips_last`: the published release leaves out the last state.
    """

    weight: str
    tap: str
    distance: Distance
    mask: str = ""
    first: int = 0
    last: int | None = None
    regions: bool = False
    loss: str = ""
    skips_last: bool = False
    pick: Callable[[Any], Any] | None = None

    @property
    def tower(self) -> str:
        """The tower whose layers are compared; empty for outputs."""
        return self.tap.partition(".")[0] if "." in self.tap else ""


class Pairing(NamedTuple):
    """How two records meet at a tap: `layers` of its tower, the `mask` of what counts, and what softens logits."""

    layers: TowerMap
    mask: Tensor | None
    temperature: float = 1.0
    scale: bool = False


Distance = Callable[[Any, Any, Term, Pairing], Tensor]


@dataclass(frozen=True)
class TowerMap:
    """Pairs (student index, teacher index) of one tower; `heads[kind][i]` the positions of the heads both have at student layer i."""

    hidden: list[tuple[int, int]]
    attention: list[tuple[int, int]]
    heads: dict[str, list[tuple[list[int], list[int]]]]


NO_LAYERS = TowerMap([], [], {})


def compared(
    term: Term,
    ours: Record,
    theirs: Record,
    maps: Mapping[str, TowerMap],
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    scale: bool = False,
) -> Tensor:
    """The distance of a term, not weighted; `projection` is what the student's tensors go through first, each of a list."""
    mask = ours[term.mask] if term.mask else None
    mine, other = (record[term.tap] if term.pick is None else term.pick(record[term.tap]) for record in (ours, theirs))
    if projection is not None:
        mine = [projection(tensor) for tensor in mine] if isinstance(mine, list) else projection(mine)
    return term.distance(mine, other, term, Pairing(maps.get(term.tower, NO_LAYERS), mask, temperature, scale))


def hidden(ours: Sequence[Tensor], theirs: Sequence[Tensor], term: Term, pairing: Pairing) -> Tensor:
    """Squared error of hidden states, summed over the pairs of layers."""
    return hidden_mse(ours, theirs, pairing.layers.hidden[term.first : term.last], pairing.mask, regions=term.regions)


def attention(ours: Sequence[Tensor], theirs: Sequence[Tensor], term: Term, pairing: Pairing) -> Tensor:
    """Squared error of the maps of the heads that both have, summed over the pairs of layers."""
    layers, kind = pairing.layers, CROSS_HEAD if ".cross_attention" in term.tap else HEAD
    return attention_mse(ours, theirs, layers.attention, layers.heads[kind], pairing.mask, regions=term.regions)


def logits(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """KL divergence of the teacher's distribution and the student's, a mean over rows."""
    return logit_kl(ours, theirs, temperature=pairing.temperature, scale=pairing.scale, valid=pairing.mask)


def contrast(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """The same of similarities [I, T] that all processes hold, by rows and by columns."""
    softened: dict[str, Any] = {"temperature": pairing.temperature, "scale": pairing.scale, "same_rows": True}
    return (logit_kl(ours, theirs, **softened) + logit_kl(ours.T, theirs.T, **softened)) / 2


def of_fused(mask: str) -> tuple[Term, ...]:
    """The rows of the layers of a network that fuses texts with images; `mask` is the record's that says which tokens count."""
    return (
        Term("text_hidden", "text.hidden", hidden, mask),
        Term("text_self_attention", "text.self_attention", attention, mask),
        Term("vision_hidden", "vision.hidden", hidden),
        Term("vision_self_attention", "vision.self_attention", attention),
        Term("fusion_hidden", "fusion.hidden", hidden, mask, first=1),  # its input is the last state of text
        Term("fusion_self_attention", "fusion.self_attention", attention, mask),
        Term("fusion_cross_attention", "fusion.cross_attention", attention, mask),
    )


def logit_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale: bool = False, valid: Tensor | None = None, same_rows: bool = False
) -> Tensor:
    """KL(teacher ‖ student) over the last axis, averaged over rows (EfficientVLM: `batchmean`, no T² factor unless `scale`).

    `student`, `teacher` [..., C]; `valid` [...] keeps only the rows that are True. `same_rows`: every process holds the rows of all.
    """
    if valid is not None:
        student, teacher = student[valid.bool()], teacher[valid.bool()]
    count = student.shape[:-1].numel()
    rows = max(1, count) if same_rows else ranks.share_of(count)
    log_p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    divergence = F.kl_div(log_p, q, reduction="sum", log_target=True) / rows
    return divergence * temperature**2 if scale else divergence


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    mask: Tensor | None = None,
    *,
    regions: bool = False,
) -> Tensor:
    """Sum over layer `pairs` (student index, teacher index) of the mean squared error of states [B, T, W]; `mask` [B, T] keeps tokens.

    `regions`: only the last rows that both have are compared.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t in pairs:
        ours, theirs = _whole_images(student[s], teacher[t]) if regions else (student[s], teacher[t])
        error = (ours.float() - theirs.float()).square()
        total = total + (ranks.mean(error) if mask is None else _token_mean(error.mean(-1), mask))
    return total


def attention_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    heads: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    mask: Tensor | None = None,
    *,
    regions: bool = False,
) -> Tensor:
    """Sum over layer `pairs` of the mean squared error of attention maps [B, H, T, S], times the number of keys S.

    `heads[i]` are the positions in the student's and in the teacher's map of the heads they share at student layer i (all, in order, by
    default); `mask` [B, T] keeps queries. Masked keys have probability 0 in both maps. `regions`: only the last rows that both have are
    compared.
    """
    total = torch.zeros((), device=student[0].device if student else None)
    for s, t in pairs:
        ours, theirs = _whole_images(student[s], teacher[t]) if regions else (student[s], teacher[t])
        if heads is not None:
            mine, same = heads[s]
            if len(mine) < ours.shape[1]:
                ours = ours.index_select(1, _positions(tuple(mine), ours.device))
            if len(same) < theirs.shape[1]:
                theirs = theirs.index_select(1, _positions(tuple(same), theirs.device))
        if not ours.shape[1]:
            continue
        error = (ours.float() - theirs.float()).square().sum(-1)
        total = total + (ranks.mean(error) if mask is None else _token_mean(error.mean(1), mask))
    return total


def _token_mean(error: Tensor, mask: Tensor) -> Tensor:
    keep = mask.float()
    return (error * keep).sum() / ranks.share_of(keep.sum())


def _whole_images(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    count = min(len(ours), len(theirs))
    return ours[-count:], theirs[-count:]


@lru_cache(maxsize=1024)
def _positions(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used where gradients are needed
        return torch.tensor(heads, dtype=torch.long, device=device)


def tower_maps(student_config: Any, teacher_config: Any) -> dict[str, TowerMap]:
    """The layer map of every tower that both networks have.

    Student layer i stands for teacher layer s(i): the layer it was shrunk from, or with equal spacing (i + 1) * T // S - 1. Hidden state 0
    is the input on both sides, hidden i + 1 pairs with s(i) + 1, attention i with s(i) (EfficientVLM: b*i and b*i + b - 1 for T = b*S).
    """
    ours, theirs = student_config.layers(), teacher_config.layers()
    source = getattr(student_config, "layer_source", None) or {}
    source_of = getattr(student_config, "layer_source_of", None) or {}
    kept, teacher_kept = _used(student_config), _used(teacher_config)
    maps = {}
    for tower in ours:
        if not ours[tower] or not theirs.get(tower):
            continue
        if source_of.get(tower) == theirs[tower] and len(source[tower]) == ours[tower]:
            layers = list(source[tower])
        else:
            layers = [max(0, layer) for layer in _spread(teacher_config, tower, ours[tower])]
        heads: dict[str, list[tuple[list[int], list[int]]]] = {}
        for kind in (HEAD, CROSS_HEAD):
            pairs = [
                (heads_of(kept, f"{tower}.{i}", kind), heads_of(teacher_kept, f"{tower}.{layer}", kind)) for i, layer in enumerate(layers)
            ]
            if any(ours is not None and theirs is not None for ours, theirs in pairs):  # else there is no such attention
                heads[kind] = [_shared(ours or [], theirs or []) for ours, theirs in pairs]
        hidden, attention = layer_map(layers)
        maps[tower] = TowerMap(list(hidden.items()), list(attention.items()), heads)
    return maps


def _used(config: Any) -> dict[str, list[int]]:
    """Indices still present, also by the name of a group whose units are those of another."""
    kept: dict[str, list[int]] = config.kept_indices()
    return kept | {group: kept[owner] for group, owner in config.borrowed().items()}


def heads_of(kept: Mapping[str, Sequence[int]], layer: str, kind: str) -> list[tuple[int, int]] | None:
    """Of each head in a map of `layer` (`text.3`) the image that it attends to, 0 or 1, and its original index; None: there is no such map.

    A map of cross-attention to two images has the heads for the first in front.
    """
    if f"{layer}.{kind}" not in kept:
        return None
    return [(image, head) for image, one in enumerate(kinds_of_map(kind)) for head in kept.get(f"{layer}.{one}", ())]


def kinds_of_map(kind: str) -> tuple[str, ...]:
    """The kinds of heads in a map of `kind`, by image."""
    return (CROSS_HEAD, SECOND_CROSS_HEAD) if kind == CROSS_HEAD else (kind,)


def _spread(teacher_config: Any, tower: str, count: int) -> list[int]:
    """Which layers of the teacher `count` layers stand for, where the student does not say; it may be deeper than its teacher."""
    total = teacher_config.layers()[tower]
    with suppress(BadInput):
        if count <= total:
            chosen: list[int] = teacher_config.choose(tower, count)
            return chosen
    return odd_layers(total, count)


def has_layers(term: Term, maps: Mapping[str, TowerMap]) -> bool:
    """Whether what `term` compares is there in both networks: outputs always are."""
    if not term.tower:
        return True
    return term.tower in maps and (".cross_attention" not in term.tap or CROSS_HEAD in maps[term.tower].heads)


def of_teacher(terms: Iterable[Term], maps: Mapping[str, TowerMap]) -> frozenset[str]:
    """The taps of `terms` that the teacher has to record: of attention maps only those of layers that are compared."""
    return frozenset(tap for term in terms for tap in _by_layer(term, [layer for _, layer in _layers(term, maps)]))


def of_student(terms: Iterable[Term], maps: Mapping[str, TowerMap]) -> frozenset[str]:
    """The taps of `terms` that the student has to record: of attention maps all, unless some layers are compared with none."""
    taps: set[str] = set()
    for term in terms:
        layers = [layer for layer, _ in _layers(term, maps)]
        taps |= {term.tap} if layers == list(range(len(layers))) else _by_layer(term, layers)
    return frozenset(taps)


def _layers(term: Term, maps: Mapping[str, TowerMap]) -> list[tuple[int, int]]:
    """Pairs of layers whose maps `term` compares; none of what is recorded as a whole."""
    return [] if term.tower == "" or term.tap.partition("@")[0].endswith(".hidden") else maps[term.tower].attention


def _by_layer(term: Term, layers: Sequence[int]) -> set[str]:
    tap, at, run = term.tap.partition("@")
    return {f"{tap}.{layer}{at}{run}" for layer in layers} or {term.tap}


def _shared(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    place = {index: at for at, index in enumerate(theirs)}
    pairs = [(at, place[index]) for at, index in enumerate(ours) if index in place]
    return [a for a, _ in pairs], [b for _, b in pairs]
