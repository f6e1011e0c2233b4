"""From open probabilities or importance scores to the units that stay, so that the budget is met exactly once and not exceeded.

The rule (ours; the published one ends after step 1, wherever that leads):

1. Per layer and kind the count is the rounded sum of the open probabilities, the kept units are those of highest probability.
2. While too little is removed, the open unit of lowest probability is closed.
3. While a closed unit can be opened without missing the budget, the one of highest probability is opened.

Hence achieved ≥ target, and no single closed unit can come back without missing it: with neurons closed, the excess is less than a neuron.
Ties go by tower, layer, kind, index: the earlier unit stays. With `round_to` a "unit" of steps 2 and 3 is a block of so many neurons.

Where that would cut an input off from an output, it is done again with the best unit of every group on the best path held open. Where the
scope allows that (`allow_blind`), the path goes instead, for good: what reaches nothing any more then goes before anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efficientvlm.compression.anatomy import Groups, Mask
from efficientvlm.compression.costs import Cost
from efficientvlm.compression.sparsity import Scope, Target
from efficientvlm.errors import Diverged, TargetMissed
from efficientvlm.families.anatomy import NEURON

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def snap(p_open: torch.Tensor, scope: Scope) -> torch.Tensor:
    """bool [units of the anatomy]: the units that stay, for open probabilities `p_open` [scope.units].

    Raises:
        TargetMissed: a budget cannot be met within the floors, kinds and towers of `scope`.
    """
    return _cut(_values(p_open, scope), scope, round_counts=True)


def snap_scores(scores: torch.Tensor, scope: Scope) -> torch.Tensor:
    """As :func:`snap` for importance scores [scope.units], comparable between groups: steps 2 and 3 from everything open.

    Raises:
        TargetMissed: a budget cannot be met within the floors, kinds and towers of `scope`.
    """
    return _cut(_values(scores, scope), scope, round_counts=False)


def _values(values: torch.Tensor, scope: Scope) -> Floats:
    result = values.detach().cpu().double().numpy()
    if result.shape != (int(scope.active.sum()),):
        raise ValueError(f"expected {int(scope.active.sum())} values, got {result.shape}")
    if np.isnan(result).any():
        why = "the gates diverged, or the model's gradients are not finite"
        raise Diverged("a probability or score is not a number", why, "try a smaller --lr or gates.lr, or another --method")
    return result


@dataclass
class _Blocks:
    """Units that open and close together, ordered by group and falling value; `members[starts[b]:starts[b + 1]]` are those of block b."""

    members: Ints
    starts: Ints
    ranking: Ints
    locked: Mask
    opened: Mask
    ragged: Ints  # for a block that is smaller than the others of its group: first block of the group, else -1

    def expand(self, blocks: Ints) -> tuple[Ints, Ints]:
        """The units of `blocks` in that order, and how many of them each prefix of `blocks` holds."""
        sizes = self.starts[blocks + 1] - self.starts[blocks]
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], sizes)
        return self.members[np.repeat(self.starts[blocks], sizes) + within], ends


@dataclass(frozen=True)
class _Course:
    """What is decided before units are counted: groups that keep their best unit, and groups that lose all of theirs."""

    held: frozenset[str] = frozenset()
    shut: frozenset[str] = frozenset()


def _make_blocks(values: Floats, scope: Scope, round_counts: bool, course: _Course) -> _Blocks:
    positions = np.flatnonzero(scope.active)
    members, starts, falling, locked, opened, ragged = [], [0], [], [], [], []
    for name, part in Groups(scope.units).slices.items():
        kind = name.rpartition(".")[2]
        size = scope.round_to if kind == NEURON else 1
        row = values[part]
        order = np.argsort(-row, kind="stable")
        edges = np.arange(0, len(row), size)
        lengths = np.diff(np.append(edges, len(row)))
        # Rounding must not let the mean of a later block exceed that of an earlier one.
        falling.append(np.minimum.accumulate(np.add.reduceat(row[order], edges) / lengths))
        fixed = edges < scope.floor(name, course.held)
        count = max(0, int(np.floor(row.sum() / size + 0.5))) if round_counts else len(edges)
        first = len(starts) - 1
        ragged.append(np.where(lengths < size, first, -1))
        members.append(positions[part][order])
        starts.extend((starts[-1] + np.cumsum(lengths)).tolist())
        locked.append(fixed | (name in course.shut))
        opened.append(fixed | ((np.arange(len(edges)) < count) & (name not in course.shut)))
    if not members:
        nothing = np.empty(0, dtype=np.int64)
        return _Blocks(nothing, np.zeros(1, dtype=np.int64), nothing, nothing.astype(bool), nothing.astype(bool), nothing)
    return _Blocks(
        np.concatenate(members),
        np.array(starts, dtype=np.int64),
        np.argsort(-np.concatenate(falling), kind="stable"),
        np.concatenate(locked),
        np.concatenate(opened),
        np.concatenate(ragged),
    )


def _cut(values: Floats, scope: Scope, round_counts: bool) -> torch.Tensor:
    try:
        return _best_cut(values, scope, round_counts)
    except TargetMissed:  # the best of a group may cost more than its first, as heads do that share keys and values with others
        return _best_cut(_first_best(values, scope), scope, round_counts)


def _first_best(values: Floats, scope: Scope) -> Floats:
    """`values` with those of a group that :meth:`Scope.check_feasible` counts as kept, its first, as high as its highest."""
    raised = values.copy()
    for name, part in Groups(scope.units).slices.items():
        raised[part][: max(1, scope.floor(name))] = values[part].max()
    return raised


def _best_cut(values: Floats, scope: Scope, round_counts: bool) -> torch.Tensor:
    course = _Course()
    keep = _meet(values, scope, round_counts, course)
    try:
        while not scope.allow_blind and (lost := scope.cut_off(keep)):
            course = _Course(course.held | scope.paths(values, lost, course.held))
            keep = _meet(values, scope, round_counts, course)
    except TargetMissed:  # the best paths cost too much: the cheapest
        keep = _meet(values, scope, round_counts, _Course(scope.paths(scope.cheapness)))
    if scope.cut_off(keep):
        values, course = _unreachable_last(values, scope, keep)
        keep = _meet(values, scope, round_counts, course)
    return torch.from_numpy(keep)


def _unreachable_last(values: Floats, scope: Scope, keep: Mask) -> tuple[Floats, _Course]:
    """`values` with units that reach nothing under `keep` below all others, and the paths that `keep` has cut shut for good."""
    standing = scope.anatomy.standing(keep)
    dead = np.isin([unit.tower for unit in scope.units], scope.anatomy.reach.dead_towers(standing))
    return np.where(dead, min(values.min(), 0.0) - 1, values), _Course(shut=scope.anatomy.reach.closed(standing))


def _meet(values: Floats, scope: Scope, round_counts: bool, course: _Course) -> Mask:
    blocks = _make_blocks(values, scope, round_counts, course)
    keep = np.ones(len(scope.anatomy.units), dtype=bool)
    keep[blocks.expand(np.flatnonzero(~blocks.opened))[0]] = False
    towers = np.array([unit.tower for unit in scope.anatomy.units])
    for target in scope.targets:
        movable = np.isin(towers[blocks.members[blocks.starts[:-1]]], target.towers) & ~blocks.locked
        _close(keep, blocks, movable, scope, target, course)
        _open(keep, blocks, movable, scope.cost, target)
    return keep


def _close(keep: Mask, blocks: _Blocks, movable: Mask, scope: Scope, target: Target, course: _Course) -> None:
    is_open = keep[blocks.members[blocks.starts[:-1]]]
    lowest_first = blocks.ranking[::-1]
    lowest_first = lowest_first[(is_open & movable)[lowest_first]]
    units, ends = blocks.expand(lowest_first)
    path = scope.cost.path(~keep, units, target.towers)[ends]
    closed = int(np.searchsorted(path, target.need))
    if closed == len(path):
        raise scope.missed(target, int(path[-1]), course.held)
    keep[units[: ends[closed]]] = False


def _open(keep: Mask, blocks: _Blocks, movable: Mask, cost: Cost, target: Target) -> None:
    refused = np.zeros(len(movable), dtype=bool)
    while True:
        slack = cost.removed(~keep, target.towers) - target.need
        is_open = keep[blocks.members[blocks.starts[:-1]]]
        prices = np.add.reduceat(_padded(cost.opening(~keep, target.towers)[blocks.members]), blocks.starts)[:-1]
        fits = movable & ~is_open & ~refused & (prices <= slack)
        for block in np.flatnonzero(fits & (blocks.ragged >= 0)):
            fits[block] = is_open[blocks.ragged[block] : block].all()  # else the layer would keep no multiple of round_to
        candidates = blocks.ranking[fits[blocks.ranking]]
        if not len(candidates):
            return
        units, ends = blocks.expand(candidates)
        removed = ~keep
        removed[units] = False
        path = cost.path(removed, units[::-1].copy(), target.towers)[::-1][ends]
        opened = int((path >= target.need).sum()) - 1
        refused[candidates[0]] = opened == 0
        if opened:
            refused[:] = False
            keep[units[: ends[opened]]] = True


def _padded(values: Any) -> Any:
    return np.append(values, 0.0)
