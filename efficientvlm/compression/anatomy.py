"""Index arithmetic over a family's units: what a set of removed heads and neurons frees, and how many elements that is.

Everything here is ours. A tensor index may be listed by several units (a key/value head shared by query heads): it is freed only when all
of them are gone. A tensor may be cut along several dimensions: the freed elements are the union. Tied tensors are one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efficientvlm.compression.reach import Reach
from efficientvlm.families.anatomy import Flow, Unit

Mask = NDArray[np.bool_]


class Groups:
    """The groups (`tower.layer.kind`) of a list of units, in order, with the slice each takes of a flat vector over the units.

    Raises:
        ValueError: the units of a group are not consecutive.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.slices: dict[str, slice] = {}
        self.of_unit = np.empty(len(units), dtype=np.int64)
        previous = None
        for position, unit in enumerate(units):
            key = (unit.tower, unit.layer, unit.kind)
            if key != previous:
                name, previous = unit.group, key
                if name in self.slices:
                    raise ValueError(f"the units of group {name} are not consecutive")
                self.slices[name] = slice(position, position)
            self.slices[name] = slice(self.slices[name].start, position + 1)
            self.of_unit[position] = len(self.slices) - 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.slices)

    @property
    def sizes(self) -> list[int]:
        return [part.stop - part.start for part in self.slices.values()]

    def split(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`values` [units] as one tensor a group."""
        return dict(zip(self.slices, values.split(self.sizes), strict=True))


class Anatomy:
    """The units of one model with the shapes of the tensors they cut.

    Args:
        units: every unit that is present, the units of a group consecutive.
        shapes: shape of every tensor the sites name (more are allowed).
        aliases: name → canonical name, for tied tensors.
        flows: how inputs reach outputs through the groups; without any, nothing is known of that.
        weights: what an element of a tensor counts for; 1 by default.

    Attributes:
        costs: LongTensor [units], the elements each unit accounts for. Exact for units that share nothing; what is shared (an index with
            several users, an element cut along several dimensions) is divided so that all costs add up to `total`.
        totals: prunable elements by tower; a tensor counts for the tower of the first unit that cuts it.

    Raises:
        ValueError: a site names an unknown tensor or lies outside it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        shapes: Mapping[str, Sequence[int]],
        aliases: Mapping[str, str] | None = None,
        flows: Sequence[Flow] = (),
        weights: Mapping[str, int] | None = None,
    ) -> None:
        self.units = tuple(units)
        self._weights = dict(weights or {})
        self.reach = Reach(flows)
        self.groups = Groups(self.units)
        self.aliases = dict(aliases or {})
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._index_sites()
        everything = np.ones(len(self.units), dtype=bool)
        self.totals = {tower: self.removed_elements(everything, [tower]) for tower in dict.fromkeys(unit.tower for unit in self.units)}
        self.total = sum(self.totals.values())
        self.costs = self._unit_costs()

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """The anatomy of `model`; works on the meta device too."""
        tensors = model.state_dict(keep_vars=True)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(model.units(), shapes, tied(tensors), model.config.flows())

    def _index_sites(self) -> None:
        axes: dict[tuple[str, int], int] = {}
        rows = [
            (number, axes.setdefault((self.aliases.get(tensor, tensor), dim), len(axes)), start, stop)
            for number, unit in enumerate(self.units)
            for tensor, dim, start, stop in unit.sites
        ]
        unit, axis, start, stop = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        self._axes = list(axes)
        for tensor, _ in self._axes:
            if tensor not in self._shapes:
                raise ValueError(f"a unit names tensor {tensor}, which the model does not have")
        sizes = np.array([self._shapes[tensor][dim] for tensor, dim in self._axes], dtype=np.int64)
        if len(rows) and ((start < 0) | (stop <= start) | (stop > sizes[axis])).any():
            wrong = int(np.argmax((start < 0) | (stop <= start) | (stop > sizes[axis])))
            raise ValueError(f"{self.units[unit[wrong]].group} cuts {start[wrong]}:{stop[wrong]} of {self._axes[axis[wrong]]}")
        # A slot is one index along one dimension of one tensor; an entry says that a unit uses a slot.
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._slots = int(self._offsets[-1])
        lengths = stop - start
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        entries = np.unique(np.repeat(unit, lengths) * max(self._slots, 1) + np.repeat(self._offsets[axis] + start, lengths) + within)
        self._entry_unit, self._entry_slot = np.divmod(entries, max(self._slots, 1))
        self._users = np.bincount(self._entry_slot, minlength=self._slots)

        towers = list(dict.fromkeys(unit.tower for unit in self.units))
        owner: dict[str, int] = {}
        by_tensor: dict[str, list[int]] = {}
        for number, first in zip(*np.unique(axis, return_index=True), strict=True):
            tensor = self._axes[number][0]
            owner.setdefault(tensor, towers.index(self.units[unit[first]].tower))
            by_tensor.setdefault(tensor, []).append(int(number))
        self._towers = towers
        self._slot_tower = np.repeat(np.array([owner[tensor] for tensor, _ in self._axes], dtype=np.int64), sizes)
        numel = np.array([int(np.prod(self._shapes[tensor])) for tensor, _ in self._axes], dtype=np.int64)
        crossed = np.array([len(by_tensor[tensor]) > 1 for tensor, _ in self._axes], dtype=bool)
        weights = np.array([self._weights.get(tensor, 1) for tensor, _ in self._axes], dtype=np.int64)
        self._rest = np.repeat(weights * (numel // np.maximum(sizes, 1)), sizes)  # elements of the tensor at one index of this dimension
        self._plain = ~np.repeat(crossed, sizes)
        self._crossed = [(owner[tensor], numbers) for tensor, numbers in by_tensor.items() if len(numbers) > 1]

    def _axis(self, number: int) -> slice:
        return slice(int(self._offsets[number]), int(self._offsets[number + 1]))

    def _unit_costs(self) -> torch.Tensor:
        share = self._rest.astype(np.float64)
        for _, numbers in self._crossed:
            sizes = [self._axis(number).stop - self._axis(number).start for number in numbers]
            owned = [int((self._users[self._axis(number)] > 0).sum()) for number in numbers]
            for here, number in enumerate(numbers):
                # Coefficient j: fraction of the elements at an index here that j other dimensions cut as well.
                others = np.array([1.0])
                for there in range(len(numbers)):
                    if there != here:
                        others = np.polymul(others, [owned[there] / sizes[there], 1 - owned[there] / sizes[there]])
                share[self._axis(number)] *= sum(part / (1 + j) for j, part in enumerate(others[::-1]))
        exact = np.bincount(self._entry_unit, (share / np.maximum(self._users, 1))[self._entry_slot], minlength=len(self.units))
        whole = np.floor(exact + 1e-6).astype(np.int64)
        left = self.total - int(whole.sum())
        whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
        return torch.from_numpy(whole)

    def freed(self, removed: Any) -> dict[str, dict[int, Mask]]:
        """Indices that nobody uses once the units of `removed` (bool [units]) are gone, by tensor and dimension.

        Tensors of which nothing is freed are left out; tied tensors appear under every name.
        """
        free = self._free_slots(as_mask(removed, len(self.units)))
        result: dict[str, dict[int, Mask]] = {}
        for number, (tensor, dim) in enumerate(self._axes):
            if free[self._axis(number)].any():
                result.setdefault(tensor, {})[dim] = free[self._axis(number)]
        for alias, tensor in self.aliases.items():
            if tensor in result:
                result[alias] = result[tensor]
        return result

    def _free_slots(self, removed: Mask) -> Mask:
        kept_users = np.bincount(self._entry_slot, ~removed[self._entry_unit], minlength=self._slots)
        return (self._users > 0) & (kept_users == 0)

    def removed_elements(self, removed: Any, towers: Iterable[str] | None = None) -> int:
        """Elements that go with the units of `removed` (bool [units]), of all towers or of the given ones."""
        return int(self.removed_path(removed, np.empty(0, dtype=np.int64), towers)[0])

    def removed_path(self, removed: Any, order: NDArray[np.int64], towers: Iterable[str] | None = None) -> NDArray[np.int64]:
        """int64 [len(order) + 1]: removed elements after `removed` and the first k units of `order` are gone, exactly."""
        last = len(order) + 1
        time = np.full(len(self.units), last, dtype=np.int64)
        time[order] = np.arange(1, last)
        time[as_mask(removed, len(self.units))] = 0
        slot_time = np.where(self._users > 0, 0, last)
        np.maximum.at(slot_time, self._entry_slot, time[self._entry_unit])
        wanted = set(self._towers if towers is None else towers)
        counted = np.array([tower in wanted for tower in self._towers], dtype=bool)
        chosen = self._plain & counted[self._slot_tower]
        path = np.bincount(slot_time[chosen], self._rest[chosen], minlength=last + 1)[:last].cumsum().astype(np.int64)
        for owner, numbers in self._crossed:
            if counted[owner]:
                kept, whole = np.ones(last, dtype=np.int64), 1
                for number in numbers:
                    times = slot_time[self._axis(number)]
                    kept *= len(times) - np.bincount(times, minlength=last + 1)[:last].cumsum()
                    whole *= len(times)
                path += (whole - kept) * (int(self._rest[self._axis(numbers[0])][0]) * len(slot_time[self._axis(numbers[0])]) // whole)
        return path

    def opening_costs(self, removed: Any, towers: Iterable[str] | None = None) -> NDArray[np.float64]:
        """float64 [units]: elements that come back when a unit of `removed` alone is opened again.

        Exact, except that an element cut along two dimensions by the same unit is missed.
        """
        free = self._free_slots(as_mask(removed, len(self.units)))
        weight = self._rest * free.astype(np.float64)
        for _, numbers in self._crossed:
            kept = [1 - free[self._axis(number)].mean() for number in numbers]
            for here, number in enumerate(numbers):
                weight[self._axis(number)] *= np.prod([part for there, part in enumerate(kept) if there != here])
        if towers is not None:
            wanted = set(towers)
            weight *= np.array([tower in wanted for tower in self._towers], dtype=bool)[self._slot_tower]
        return np.bincount(self._entry_unit, weight[self._entry_slot], minlength=len(self.units)).astype(np.float64)

    def standing(self, keep: Any) -> set[str]:
        """The groups of which `keep` (bool [units]) leaves at least one unit."""
        kept = as_mask(keep, len(self.units))
        return {name for name, part in self.groups.slices.items() if kept[part].any()}

    def removed_mask(self, keep: Any) -> Mask:
        """bool [units] of what is removed when `keep` stays: a bool vector over the units, or a collection of units."""
        if isinstance(keep, Collection) and not isinstance(keep, torch.Tensor | np.ndarray) and all(isinstance(u, Unit) for u in keep):
            wanted = {(unit.group, unit.index) for unit in keep}
            mask = np.array([(unit.group, unit.index) not in wanted for unit in self.units], dtype=bool)
            if len(wanted) != len(self.units) - int(mask.sum()):
                raise ValueError("some of the units to keep are not in the model")
            return mask
        return ~as_mask(keep, len(self.units))


def as_mask(values: Any, size: int) -> Mask:
    """`values` as bool [size]; ValueError where they are none."""
    mask = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if mask.dtype != bool or mask.shape != (size,):
        raise ValueError(f"expected {size} booleans, got {mask.dtype} {mask.shape}")
    return mask


def tied(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of a `state_dict(keep_vars=True)` that are the same tensor as an earlier name → that earlier name."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(tensor), name)) for name, tensor in tensors.items())
    return {name: canonical for name, canonical in names if name != canonical}
