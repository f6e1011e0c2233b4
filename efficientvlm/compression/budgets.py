"""Budgets by name: what parameters, multiply-accumulates or milliseconds units account for, and what may be cut of a network by that."""

from __future__ import annotations

from typing import Any

from efficientvlm.compression.accounting import count_parameters, count_sparsity
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.costs import Cost, Elements
from efficientvlm.compression.latency import LatencyTable, Milliseconds
from efficientvlm.compression.macs import MultiplyAdds
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import BadInput


def cost_of(
    model: Any, budget: str = "parameters", *, text_length: int | None = None, table: LatencyTable | None = None, round_to: int = 1
) -> Cost:
    """What `budget` counts of `model`, which may be shapes on the meta device.

    Args:
        budget: `parameters`; `macs`: multiply-accumulates of one image and one text of `text_length` tokens, by default 12 or as many as
            are read; or `latency`: nanoseconds by `table`, of layers that keep neurons in multiples of `round_to`.

    Raises:
        BadInput: another budget; no table, or one of another network.
    """
    if budget == "latency":
        if table is None:
            raise BadInput("a latency budget needs a table", "milliseconds are measured", "make one with evlm bench --table")
        return Milliseconds(model, table, round_to=round_to)
    if budget == "macs":
        return MultiplyAdds(model, text_length=text_length or model.config.sizes().usual_text)
    if budget != "parameters":
        raise BadInput(f"no such budget: {budget}", "there are parameters, macs and latency", "use one of them")
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
