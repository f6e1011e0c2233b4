"""Budgets by name: what parameters or multiply-accumulates the units of a network account for, and what may be cut of it by that."""

from __future__ import annotations

from typing import Any

from efficientvlm.compression.accounting import count_parameters, count_sparsity
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.costs import Cost, Elements
from efficientvlm.compression.macs import MultiplyAdds
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import BadInput

TEXT_LENGTH = 12


def cost_of(model: Any, budget: str = "parameters", *, text_length: int = TEXT_LENGTH) -> Cost:
    """What `budget` counts of `model`, which may be shapes on the meta device.

    Args:
        budget: `parameters`, or `macs`: multiply-accumulates of one image and one text of `text_length` tokens.

    Raises:
        BadInput: another budget.
    """
    if budget == "macs":
        return MultiplyAdds(model, text_length=text_length)
    if budget != "parameters":
        raise BadInput(f"no such budget: {budget}", "there are parameters and macs", "use one of them")
    anatomy = Anatomy.of(model)
    whole = {tower: part["initial"] for tower, part in count_sparsity(model)["by_tower"].items()}
    return Elements(anatomy, whole, count_parameters(model)["total"] - anatomy.total)


def reachable(model: Any, sparsity: float, cost: Cost | None, **limits: Any) -> Scope:
    """The :class:`Scope` of `model`, checked to be reachable; `limits` are those of :meth:`Scope.of`.

    Raises:
        BadInput: as :meth:`Scope.of`.
        TargetMissed: floors, kinds or towers make the target unreachable, or the last path of an input would have to go.
    """
    scope = Scope.of(Anatomy.of(model), sparsity, cost=cost, **limits)
    scope.check_feasible()
    return scope
