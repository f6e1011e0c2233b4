"""What a budget counts: the cost of each head and neuron, of any set of them, and of what no cut removes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.errors import number_of

Towers = Iterable[str] | None


class Cost(ABC):
    """Costs of the units of one network, whole numbers, which add up exactly.

    Attributes:
        whole: by tower, all that could be removed before anything was.
        totals: by tower, what can be removed now.
        rest: of the whole network, what no cut removes.
        costs: LongTensor [units], what each unit accounts for; they add up to all of `totals`.
    """

    budget: ClassVar[str]
    whole: Mapping[str, int]
    totals: Mapping[str, int]
    rest: int
    costs: torch.Tensor

    @property
    def now(self) -> int:
        """Of the whole network as it is."""
        return self.rest + sum(self.totals.values())

    @abstractmethod
    def removed(self, removed: Any, towers: Towers = None) -> int:
        """What goes with the units of `removed` (bool [units]), of all towers or of the given ones."""

    @abstractmethod
    def path(self, removed: Any, order: NDArray[np.int64], towers: Towers = None) -> NDArray[np.int64]:
        """int64 [len(order) + 1]: what is gone after `removed` and the first k units of `order`, exactly; it never falls."""

    @abstractmethod
    def opening(self, removed: Any, towers: Towers = None) -> NDArray[np.float64]:
        """float64 [units]: what comes back when a unit of `removed` alone is opened again, or nearly so."""

    def kept(self, active: Any, counted: Any) -> nn.Module:
        """A module from open probabilities of the `active` units, [gates], to what is expected to stay of the `counted` ones, a scalar.

        Both are bool [units]. By default every unit stays with its own share, by its probability (EfficientVLM).
        """
        return Shares(self.costs * counted, active)

    @abstractmethod
    def said(self, amount: int, what: str = "") -> str:
        """`amount` in words, of `what` (e.g. prunable) things; rounded up where it is rounded."""

    def facts(self) -> dict[str, Any]:
        """What else the numbers hold for, JSON-ready."""
        return {}


class Shares(nn.Module):
    """Σ pᵢ cᵢ over the `active` units of `costs` [units], and all of the others; no matrix product, which autocast would round."""

    costs: torch.Tensor
    fixed: torch.Tensor

    def __init__(self, costs: torch.Tensor, active: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("costs", costs[active].float(), persistent=False)
        self.register_buffer("fixed", costs[~active].sum().float(), persistent=False)

    def forward(self, p_open: torch.Tensor) -> torch.Tensor:
        return (self.costs * p_open).sum() + self.fixed


class Elements(Cost):
    """Elements of the tensors: the weights that a unit takes with it.

    Args:
        whole: by default that of `anatomy`.
        rest: elements that belong to no unit.
    """

    budget = "parameters"

    def __init__(self, anatomy: Anatomy, whole: Mapping[str, int] | None = None, rest: int = 0) -> None:
        self._anatomy, self.totals, self.costs, self.rest = anatomy, anatomy.totals, anatomy.costs, rest
        self.whole = dict(anatomy.totals if whole is None else whole)

    def removed(self, removed: Any, towers: Towers = None) -> int:
        return self._anatomy.removed_elements(removed, towers)

    def path(self, removed: Any, order: NDArray[np.int64], towers: Towers = None) -> NDArray[np.int64]:
        return self._anatomy.removed_path(removed, order, towers)

    def opening(self, removed: Any, towers: Towers = None) -> NDArray[np.float64]:
        return self._anatomy.opening_costs(removed, towers)

    def said(self, amount: int, what: str = "") -> str:
        return number_of(amount, f"{what} element" if what else "parameter")
