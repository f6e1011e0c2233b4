"""Multiply-accumulates of heads and neurons, counted in one pass of the network from which nothing was removed.

A unit's are those of its rows and columns in the matrices, once for every token they are applied to, and those of its attention. Everything
here is ours; the counts agree with :func:`accounting.count_macs` of whatever is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from efficientvlm.compression.accounting import counting, example_of, image_size_of
from efficientvlm.compression.anatomy import Anatomy, as_mask, tied
from efficientvlm.compression.costs import Cost, Towers
from efficientvlm.compression.surgery import whole
from efficientvlm.families.anatomy import NEURON, Unit


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one request to a whole network.

    `by_element` are those of each element of a tensor that units cut, for each of the groups that cut it in common (`lent`); `by_unit` are
    those of a unit of a group beside its matrices.
    """

    total: int
    by_element: Mapping[str, int]
    by_unit: Mapping[str, int]
    lent: frozenset[str]
    image_size: int
    text_length: int

    def matrices(self, units: Sequence[Unit], shapes: Mapping[str, Sequence[int]], aliases: Mapping[str, str]) -> Anatomy:
        """The units of a network as far as their matrices go, an element counted by its multiply-accumulates.

        A tensor that several groups cut in common is applied once for each of them: here each has one of its own.
        """
        shapes, weights, own = dict(shapes), dict.fromkeys(shapes, 0) | dict(self.by_element), []
        for unit in units:
            sites = []
            for site in unit.sites:
                name = aliases.get(site.tensor, site.tensor)
                if name in self.lent:
                    mine = f"{name} for {unit.group}"
                    shapes[mine], weights[mine] = shapes[name], self.by_element[name]
                    name = mine
                sites.append(site._replace(tensor=name))
            own.append(unit._replace(sites=tuple(sites)))
        return Anatomy(own, shapes, weights=weights)


class MultiplyAdds(Cost):
    """Multiply-accumulates of one image and one text of a stated length."""

    budget = "macs"

    def __init__(self, model: Any, *, text_length: int) -> None:
        with torch.device("meta"):
            dense = type(model)(model.config.with_kept(whole(model.config))).eval()
        work = measure(dense, text_length)
        before, now = _Counted(dense, work), _Counted(model, work)
        self._work, self._now = work, now
        self.whole, self.totals, self.costs = before.totals, now.totals, now.costs
        self.rest = work.total - sum(before.totals.values())

    def removed(self, removed: Any, towers: Towers = None) -> int:
        return int(self.path(removed, np.empty(0, dtype=np.int64), towers)[0])

    def path(self, removed: Any, order: NDArray[np.int64], towers: Towers = None) -> NDArray[np.int64]:
        return self._now.path(removed, order, towers)

    def opening(self, removed: Any, towers: Towers = None) -> NDArray[np.float64]:
        mask = as_mask(removed, len(self._now.attention))
        return self._now.matrices.opening_costs(mask, towers) + self._now.attention * mask * self._now.of(towers)

    def said(self, amount: int, what: str = "") -> str:
        return f"{amount:,} {what} multiply-adds" if what else f"{amount:,} multiply-adds"

    def facts(self) -> dict[str, Any]:
        return {"image_size": self._work.image_size, "text_length": self._work.text_length}


class _Counted:
    """The units of `model`, as shapes or not, with what each of them costs."""

    def __init__(self, model: Any, work: Work) -> None:
        tensors, units = model.state_dict(keep_vars=True), model.units()
        self.matrices = work.matrices(units, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tied(tensors))
        self.attention = np.array([work.by_unit.get(unit.group, 0) for unit in units], dtype=np.int64)
        self._towers = np.array([unit.tower for unit in units])
        self.costs = self.matrices.costs + torch.from_numpy(self.attention)
        everything, nothing = np.ones(len(units), dtype=bool), np.empty(0, dtype=np.int64)
        self.totals = {tower: int(self.path(everything, nothing, [tower])[0]) for tower in dict.fromkeys(unit.tower for unit in units)}

    def of(self, towers: Towers) -> NDArray[np.bool_]:
        return np.ones(len(self._towers), dtype=bool) if towers is None else np.isin(self._towers, list(towers))

    def path(self, removed: Any, order: NDArray[np.int64], towers: Towers) -> NDArray[np.int64]:
        towers = None if towers is None else list(towers)
        counted = self.attention * self.of(towers)
        mask = as_mask(removed, len(counted))
        later = np.where(mask[order], 0, counted[order])
        attention = int(counted[mask].sum()) + np.concatenate([[0], np.cumsum(later)]).astype(np.int64)
        path: NDArray[np.int64] = self.matrices.removed_path(mask, order, towers) + attention
        return path


def measure(dense: Any, text_length: int) -> Work:
    """Count one request to `dense`, a network on the meta device from which nothing was removed.

    Raises:
        RuntimeError: the work of a layer cannot be shared out among its units.
    """
    batch, tensors, units = example_of(dense, text_length), dense.state_dict(keep_vars=True), dense.units()
    heads = Counter(dense.get_submodule(gate.module) for unit in units if unit.kind != NEURON for gate in unit.gates)
    with counting(dense) as counter, _Watch(dense, heads, counter) as watch:
        dense.run(batch)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    matrices: Counter[str] = Counter()
    for module, flops in watch.matrices.items():
        matrices[first.get(id(module._parameters["weight"]), "")] += flops // 2
    attention: Counter[nn.Module] = Counter()
    for flops, outputs in watch.attentions:
        share = _divided(flops // 2, sum(heads[module] for module in outputs), "attention")
        for module in outputs:
            attention[module] += share
    by_unit = {unit.group: sum(attention[dense.get_submodule(gate.module)] for gate in unit.gates) for unit in units if unit.kind != NEURON}
    cut, lent = _cut(units, tensors, tied(tensors))
    by_element = {name: _divided(matrices[name], tensors[name].numel() * count, name) for name, count in cut.items()}
    return Work(counter.get_total_flops() // 2, by_element, by_unit, lent, image_size_of(batch), text_length)


class _Watch:
    """What `counter` has counted in each module with a matrix, and between them, right before the outputs of `heads`: their attention.

    `attentions` are the operations and the outputs that follow one another, as those of two images for which attention is computed at once.
    """

    def __init__(self, model: nn.Module, heads: Counter[nn.Module], counter: FlopCounterMode) -> None:
        self.matrices: Counter[nn.Module] = Counter()
        self.attentions: list[tuple[int, list[nn.Module]]] = []
        self._heads, self._counter, self._seen, self._open, self._handles = heads, counter, 0, False, []
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() > 1:
                self._handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def _new(self) -> int:
        total = self._counter.get_total_flops()
        new, self._seen = total - self._seen, total
        return new

    def _enter(self, module: nn.Module, *_: Any) -> None:
        between = self._new()
        if module not in self._heads:
            self._open = False
        elif between:
            self.attentions.append((between, [module]))
            self._open = True
        elif self._open:
            self.attentions[-1][1].append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self.matrices[module] += self._new()

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _cut(units: Iterable[Unit], tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> tuple[dict[str, int], frozenset[str]]:
    """Tensors that units cut → how many groups have the same entries of it; and those of which that are several."""
    users: dict[tuple[str, int], dict[str, NDArray[np.bool_]]] = {}
    for unit in units:
        for site in unit.sites:
            name = aliases.get(site.tensor, site.tensor)
            own = users.setdefault((name, site.dim), {})
            taken = own.setdefault(unit.group, np.zeros(tensors[name].shape[site.dim], dtype=bool))
            taken[site.start : site.stop] = True
    counts: dict[str, int] = {}
    for (name, _), own in users.items():
        counts[name] = max(counts.get(name, 1), int(np.sum(list(own.values()), axis=0).max()))
    return counts, frozenset(name for name, count in counts.items() if count > 1)


def _divided(amount: int, parts: int, what: str) -> int:
    share, left = divmod(amount, parts)
    if left:
        raise RuntimeError(f"the multiply-accumulates of {what} ({amount:,}) are not alike in its {parts:,} parts")
    return share
