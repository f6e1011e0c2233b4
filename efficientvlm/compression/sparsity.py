"""How much is to go: what may be pruned, the schedule, the expected sparsity, and the Lagrangian that enforces it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from efficientvlm.compression.anatomy import Anatomy, Groups, Mask
from efficientvlm.compression.costs import Cost, Elements
from efficientvlm.compression.reach import Pair
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.families.anatomy import CROSS_HEAD, KINDS, NEURON, SECOND_CROSS_HEAD, Unit


def target_at(step: int, warmup_steps: int, target: float, start: float = 0.0) -> float:
    """Sparsity asked for at `step`: linear from `start` to `target` over `warmup_steps` (EfficientVLM, published schedule)."""
    return target if step >= warmup_steps else start + (target - start) * step / warmup_steps


def lagrangian(
    expected: torch.Tensor, target: float | torch.Tensor, lambda1: float | torch.Tensor, lambda2: float | torch.Tensor
) -> torch.Tensor:
    """λ₁(ŝ − t) + λ₂(ŝ − t)², to be minimised by the gates and maximised by the multipliers (EfficientVLM)."""
    gap = expected - target
    return lambda1 * gap + lambda2 * gap**2


@dataclass(frozen=True)
class Target:
    """One budget: part `sparsity` of what can be removed of `towers`, `whole`, has to go; `gone` of it went before.

    `to` is what the whole network may cost, where that was asked for.
    """

    name: str
    towers: tuple[str, ...]
    sparsity: float
    whole: int
    gone: int
    to: int | None = None

    @property
    def need(self) -> int:
        """Least to remove now."""
        need = math.ceil(self.sparsity * self.whole)
        if need and (need - 1) / self.whole >= self.sparsity:  # 0.07 * 100 is a little more than 7
            need -= 1
        return max(need - self.gone, 0)


@dataclass(frozen=True)
class Scope:
    """What may be pruned and how much; see :meth:`of`. `active` is bool [units of the anatomy], `cost` is what the budgets count.

    Unless `allow_blind`, the last path of every input to every output stays open, as a floor beside the others: whatever chooses the units,
    one of each of the groups that the path goes through stays.
    """

    anatomy: Anatomy
    cost: Cost
    active: Mask
    targets: tuple[Target, ...]
    min_heads: int = 0
    min_neurons: int = 0
    round_to: int = 1
    allow_blind: bool = False

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        sparsity: float,
        *,
        kinds: Iterable[str] = KINDS,
        towers: Iterable[str] | None = None,
        tower_sparsity: Mapping[str, float] | None = None,
        min_heads: int = 0,
        min_neurons: int = 0,
        round_to: int = 1,
        allow_blind: bool = False,
        whole: Mapping[str, int] | None = None,
        cost: Cost | None = None,
        to: int | None = None,
    ) -> Scope:
        """One budget over all towers, or a budget of its own for each tower of `tower_sparsity` and one at `sparsity` for the others.

        Args:
            kinds, towers: what may be removed; cross-attention heads are those for either image. The sparsity is always a part of *all*
                prunable elements of the budget's towers.
            min_heads, min_neurons: floors of a layer and kind (no more than it has).
            round_to: the neurons a layer keeps are a multiple of this, or all of them.
            allow_blind: whether an input may be cut off from an output.
            whole: prunable elements by tower before anything was removed; by default those of `anatomy`.
            cost: what is counted instead of elements.
            to: what the whole network may cost, instead of a sparsity.

        Raises:
            BadInput: an unknown tower or kind, or a sparsity outside [0, 1]; the network costs no more than `to` already.
        """
        cost = cost or Elements(anatomy, whole)
        whole = dict(cost.whole)
        own = dict(tower_sparsity or {})
        if own and to is not None:
            raise BadInput("tower_sparsity beside what the whole network may cost", "that is one budget over all towers", "leave one out")
        allowed = set(whole if towers is None else towers)
        for wrong, known, what in ((allowed | set(own), whole, "tower"), (set(kinds), KINDS, "kind of unit")):
            if unknown := sorted(wrong - set(known)):
                raise BadInput(f"no such {what}: {', '.join(unknown)}", f"there are {', '.join(known)}", "use one of them")
        for value in (sparsity, *own.values()):
            if not 0 <= value <= 1:
                raise BadInput(f"sparsity {value}", "it is not between 0 and 1", "use e.g. 0.5")
        rest = tuple(tower for tower in whole if tower not in own)
        parts = [((tower,), tower, value) for tower, value in own.items()] + ([(rest, "+".join(rest), sparsity)] if rest else [])
        targets = []
        for names, name, value in parts:
            size = sum(whole[tower] for tower in names)
            gone = size - sum(cost.totals.get(tower, 0) for tower in names)
            if to is not None:
                value = (gone + _excess(cost, to)) / max(size, 1)
            targets.append(Target(name if own else "all", names, value, size, gone, to))
        chosen = {*kinds} | ({SECOND_CROSS_HEAD} if CROSS_HEAD in kinds else set())
        active = np.array([unit.tower in allowed and unit.kind in chosen for unit in anatomy.units], dtype=bool)
        return cls(anatomy, cost, active, tuple(targets), min_heads, min_neurons, round_to, allow_blind)

    @property
    def units(self) -> list[Unit]:
        """The units that have a gate, in the order of the anatomy."""
        return [unit for unit, active in zip(self.anatomy.units, self.active, strict=True) if active]

    def floor(self, group: str, paths: Collection[str] = ()) -> int:
        """Fewest units that are kept of `group`, when those of `paths` are needed as paths; all of them where it has no more than that."""
        least = int(group in paths)
        if group.endswith(NEURON):
            return math.ceil(max(self.min_neurons, least) / self.round_to) * self.round_to
        return max(self.min_heads, least)

    def cut_off(self, keep: Mask | torch.Tensor) -> frozenset[Pair]:
        """Inputs and the outputs that they no longer reach when only `keep` (bool [units of the anatomy]) stays."""
        reach = self.anatomy.reach
        return reach.pairs(set(self.anatomy.groups.names)) - reach.pairs(self.anatomy.standing(keep))

    def paths(self, values: NDArray[np.float64], wanted: Collection[Pair] | None = None, held: Collection[str] = ()) -> frozenset[str]:
        """The groups that must keep a unit so that all of `wanted` gets through (by default all that does now), `held` open as well.

        Of several ways the one with the units of highest `values` [units that have a gate].
        """
        reach, best = self.anatomy.reach, {}
        for name, part in Groups(self.units).slices.items():
            best[name] = values[part].max()
        always = {*held, *(name for name in self.anatomy.groups.names if name not in best or self.floor(name))}
        always |= self.anatomy.standing(~self.active)
        ranking = sorted((name for name in reach.groups if name in best), key=lambda name: -best[name])
        return reach.narrowest(reach.pairs(set(self.anatomy.groups.names)) if wanted is None else wanted, ranking, always)

    @property
    def cheapness(self) -> NDArray[np.float64]:
        """Minus the cost of each unit that has a gate: by these values :meth:`paths` are the cheapest."""
        costs: NDArray[np.float64] = -self.cost.costs.double().numpy()[self.active]
        return costs

    def achieved(self, keep: torch.Tensor) -> dict[str, float]:
        """Exact sparsity by budget when only `keep` (bool [units of the anatomy]) stays."""
        removed = self.anatomy.removed_mask(keep)
        return {t.name: (t.gone + self.cost.removed(removed, t.towers)) / max(t.whole, 1) for t in self.targets}

    def check_feasible(self) -> None:
        """Raise :class:`TargetMissed` when a budget cannot be met even with every unit gone that may go."""
        removed = self.active.copy()
        paths = frozenset() if self.allow_blind else self.paths(self.cheapness)
        for name, part in self.anatomy.groups.slices.items():
            removed[part][: self.floor(name, paths)] = False
        for target in self.targets:
            most = self.cost.removed(removed & self._of(target), target.towers)
            if most < target.need:
                raise self.missed(target, most, paths)

    def missed(self, target: Target, most: int, paths: Collection[str] = ()) -> TargetMissed:
        limits = [f"{len(self.units):,} of {len(self.anatomy.units):,} heads and neurons may be removed"]
        limits += [f"{name} {value}" for name, value in (("min_heads", self.min_heads), ("min_neurons", self.min_neurons)) if value]
        limits += [f"round_to {self.round_to}"] * (self.round_to > 1)
        limits += ["the last path of every input stays open"] * bool(paths)
        if target.to is not None:
            least, rest = self.cost.said(self.cost.now - most), self.cost.said(self.cost.rest)
            return TargetMissed(
                f"{self.cost.said(target.to)} cannot be reached",
                f"the least is {least}; {rest} are of what no cut removes ({', '.join(limits)})",
                "ask for that or more, lower the floors, or allow more towers and kinds",
            )
        best = math.floor(1e4 * (target.gone + most) / max(target.whole, 1)) / 1e4
        return TargetMissed(
            f"sparsity {target.sparsity:g} of {target.name} cannot be reached",
            f"at most {best:.4f} of its {self.cost.said(target.whole, 'prunable')} can go ({', '.join(limits)})",
            "lower the target or the floors, or allow more towers and kinds",
        )

    def _of(self, target: Target) -> Mask:
        return np.array([unit.tower in target.towers for unit in self.anatomy.units], dtype=bool)


def _excess(cost: Cost, to: int) -> int:
    """What a network costs beyond `to`; :class:`BadInput` where that is nothing."""
    if cost.now <= to:
        raise BadInput(f"{cost.said(to)} are asked for", f"the network has {cost.said(cost.now)} now", "ask for less than that")
    return cost.now - to


class Budget(nn.Module):
    """The Lagrangian of a scope over gates on `scope.units`; one pair of multipliers a budget, to be *ascended* (`maximize=True`).

    The expected sparsity is 1 − expected kept cost / whole (EfficientVLM). Costs are those of the scope: where units share tensors, or take
    time together, the expectation is an approximation, snapping is exact.
    """

    whole: torch.Tensor
    final: torch.Tensor

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.names = tuple(target.name for target in scope.targets)
        active = torch.from_numpy(scope.active)
        self.kept = nn.ModuleList(scope.cost.kept(active, torch.from_numpy(scope._of(target))) for target in scope.targets)
        self.register_buffer("whole", torch.tensor([max(target.whole, 1) for target in scope.targets]).float(), persistent=False)
        self.register_buffer("final", torch.tensor([target.sparsity for target in scope.targets]), persistent=False)
        self.lambda1 = nn.Parameter(torch.zeros(len(scope.targets)))
        self.lambda2 = nn.Parameter(torch.zeros(len(scope.targets)))

    def expected(self, p_open: torch.Tensor) -> torch.Tensor:
        """[budgets] expected sparsity for `p_open` [gates]."""
        return 1 - torch.stack([kept(p_open) for kept in self.kept]) / self.whole

    def target(self, step: int, warmup_steps: int, start: float | Sequence[float] | torch.Tensor = 0.0) -> torch.Tensor:
        """[budgets] sparsity asked for at `step`."""
        begin = torch.as_tensor(start, dtype=self.final.dtype, device=self.final.device)
        return begin + (self.final - begin) * target_at(step, warmup_steps, 1.0)

    def forward(self, p_open: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The Lagrangian term of the loss, summed over budgets (scalar)."""
        return lagrangian(self.expected(p_open), target, self.lambda1, self.lambda2).sum()
