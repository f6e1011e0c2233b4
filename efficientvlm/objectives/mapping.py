"""Which teacher layer, hidden state and head each of the student's is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from efficientvlm.compression.layers import layer_map, odd_layers
from efficientvlm.families.base import CROSS_HEAD, HEAD


@dataclass(frozen=True)
class TowerMap:
    """Pairs (student index, teacher index) of one tower; `heads[kind][i]` the positions of the heads both have at student layer i."""

    hidden: list[tuple[int, int]]
    attention: list[tuple[int, int]]
    heads: dict[str, list[tuple[list[int], list[int]]]]


def tower_maps(family: Any, student_config: Any, teacher_config: Any) -> dict[str, TowerMap]:
    """The layer map of every tower that both networks have.

    Student layer i stands for teacher layer s(i): the layer it was shrunk from, or with equal spacing (i + 1) * T // S - 1. Hidden state 0
    is the input on both sides, hidden i + 1 pairs with s(i) + 1, attention i with s(i) (EfficientVLM: b*i and b*i + b - 1 for T = b*S).
    """
    ours, theirs = family.layer_counts(student_config), family.layer_counts(teacher_config)
    source = getattr(student_config, "layer_source", None) or {}
    source_of = getattr(student_config, "layer_source_of", None) or {}
    kept, teacher_kept = family.kept(student_config), family.kept(teacher_config)
    maps = {}
    for tower in family.towers:
        if not ours[tower] or not theirs[tower]:
            continue
        if source_of.get(tower) == theirs[tower] and len(source[tower]) == ours[tower]:
            layers = list(source[tower])
        else:
            layers = [max(0, layer) for layer in odd_layers(theirs[tower], ours[tower])]  # a student may be deeper than its teacher
        heads: dict[str, list[tuple[list[int], list[int]]]] = {}
        for kind in (HEAD, CROSS_HEAD):
            if f"{tower}.0.{kind}" in kept:
                heads[kind] = [
                    _shared(kept[f"{tower}.{i}.{kind}"], teacher_kept[f"{tower}.{layer}.{kind}"]) for i, layer in enumerate(layers)
                ]
        hidden, attention = layer_map(layers)
        maps[tower] = TowerMap(list(hidden.items()), list(attention.items()), heads)
    return maps


def of_teacher(want: Iterable[str], maps: Mapping[str, TowerMap]) -> frozenset[str]:
    """What of `want` the teacher has to record: maps only of layers that are compared, nothing of towers that are not."""
    taps: set[str] = set()
    for tap in want:
        tower, _, kind = tap.partition(".")
        if kind == "hidden" or tower not in maps:
            taps |= {tap} if tower in maps else set()
        else:
            taps |= {f"{tap}.{layer}" for _, layer in maps[tower].attention}
    return frozenset(taps)


def _shared(ours: list[int], theirs: list[int]) -> tuple[list[int], list[int]]:
    place = {index: at for at, index in enumerate(theirs)}
    pairs = [(at, place[index]) for at, index in enumerate(ours) if index in place]
    return [a for a, _ in pairs], [b for _, b in pairs]
