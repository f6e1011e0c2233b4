"""What prune and its re-cut share: the scope of a configuration, the files beside the model, the report on the budget."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from efficientvlm.checkpoints.files import fsync_dir
from efficientvlm.compression.budgets import cost_of, reachable
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.latency import LatencyTable
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.runtime.progress import say
from efficientvlm.settings.amounts import amount_of
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.stages import Prune
from efficientvlm.training.state import unshared

DENSE, GATES = "dense.safetensors", "gates.safetensors"
FAR = 0.05
"""Of what can be removed: gates that are further from the target than this when they become final are told."""


def scope_of(config: Prune, model: Any, table: LatencyTable | None = None) -> Scope:
    """What `config` allows to be pruned of `model`, checked to be reachable.

    A latency budget without its `table` yet is stood in for by multiply-adds, at its sparsity, or with nothing gone where it is an absolute
    one, or one that so many multiply-adds do not reach: `scope.cost.budget` says so.

    Raises:
        BadInput: the model costs no more than the target already, or as much is gone of it; `text_length` is more than it reads.
        TargetMissed: floors, kinds or towers make the target unreachable, or the last path of an input would have to go.
    """
    limits = settings_of(config, "kinds", "towers", "tower_sparsity", "min_heads", "min_neurons", "round_to", "allow_blind")
    to = None if config.to is None else amount_of(config.budget, config.to)
    if config.budget != "parameters" and table is None and config.text_length > (most := model.config.sizes().max_positions):
        why = f"the network reads {most}"
        raise BadInput(f"texts of {config.text_length} tokens are too long", why, "use a smaller --text-length")
    if config.budget == "latency" and table is None:
        cost = cost_of(model, "macs", text_length=config.text_length)
        with suppress(TargetMissed):  # milliseconds may be reached where multiply-adds are not
            return reachable(model, config.sparsity if to is None else 0.0, cost, **limits)
        return reachable(model, 0.0, cost, **limits | {"tower_sparsity": {}})
    cost = cost_of(model, config.budget, text_length=config.text_length, table=table, round_to=config.round_to)
    scope = reachable(model, config.sparsity, cost, to=to, **limits)
    asked = [target for target in scope.targets if target.sparsity]
    if asked and not config.from_gates and not any(target.need for target in asked):
        gone = ", ".join(f"{target.gone / target.whole:.4f} of {target.name}" for target in asked)
        raise BadInput(
            f"nothing would be removed of {config.model}", f"by {config.budget} {gone} is gone already", "ask for more than that"
        )
    return scope


def cut_report(scope: Scope, keep: Tensor, gates: Gates | None) -> dict[str, Any]:
    """What the manifest says of a cut: `budget`, and where an input is cut off on purpose `cut_off`, else None.

    `cut_off` names `pairs` of input and output, the `towers` that then reach nothing, and the `share` of what is removed that was theirs.
    """
    anatomy, cost, cut = scope.anatomy, scope.cost, scope.cut_off(keep)
    removed = anatomy.removed_mask(keep)
    towers = anatomy.reach.dead_towers(anatomy.standing(keep))
    share = cost.removed(removed, towers) / max(cost.removed(removed), 1)
    found = {"pairs": [list(pair) for pair in sorted(cut)], "towers": towers, "share": share} if cut else None
    return {"budget": budget_report(scope, keep, gates), "cost": cost_report(scope, keep), "cut_off": found}


def cost_report(scope: Scope, keep: Tensor) -> dict[str, Any]:
    """What the budget counts: of the whole network `before` and `after` the cut, `rest` of it what no cut removes, and by tower what units
    had before anything was removed (`initial`) and have now (`kept`). `to` is what was asked of the whole network, else None.

    `whole` is that of the network before anything was removed, and `part` what of it is promised: `to`, or else `after`. Where the speed of
    a machine drifts, a promise of milliseconds holds as that part.
    """
    cost, removed = scope.cost, scope.anatomy.removed_mask(keep)
    to, after = next((target.to for target in scope.targets), None), cost.now - cost.removed(removed)
    whole = cost.rest + sum(cost.whole.values())
    kept = {tower: cost.totals.get(tower, 0) - cost.removed(removed, [tower]) for tower in cost.whole}
    return {
        "budget": cost.budget,
        "to": to,
        "before": cost.now,
        "after": after,
        "whole": whole,
        "part": (after if to is None else to) / max(whole, 1),
        "rest": cost.rest,
        "by_tower": {tower: {"initial": initial, "kept": kept[tower]} for tower, initial in cost.whole.items()},
        **cost.facts(),
    }


def budget_report(scope: Scope, keep: Tensor, gates: Gates | None) -> dict[str, dict[str, float]]:
    """Target, expected (of the gates, L0 only) and achieved sparsity of every budget."""
    report = {target.name: {"target": target.sparsity, "achieved": scope.achieved(keep)[target.name]} for target in scope.targets}
    if gates is not None:
        expected = Budget(scope).expected(gates.p_open().detach().cpu()).tolist()
        for name, value in zip(report, expected, strict=True):
            report[name]["expected"] = value
    return report


def counted_as(cost: dict[str, Any], amount: int) -> str:
    """An amount of :func:`cost_report` as a person reads it."""
    return f"{amount / 1e6:,.2f} ms" if cost.get("unit") == "ns" else f"{amount:,}"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file as a whole or not at all, so that it outlives a crash of the machine."""
    temporary = path.with_name(f".{path.name}.tmp")
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(unshared(plain), temporary, metadata={"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def say_lag(report: dict[str, Any], quiet: bool) -> None:
    """Whether gates were still far from the target of a budget when the structure was made final (by :func:`cut_report`)."""
    for name, part in report["budget"].items():
        if abs(lag := part["target"] - part["expected"]) > FAR:
            where = "short of" if lag > 0 else "past"
            why = "their order, not their learning, chose the rest; give it more steps, or another gates.multiplier_lr"
            say(f"prune: sparsity of {name}: gates were {abs(lag):.2f} {where} the target when they became final: {why}", quiet=quiet)


def say_cut(report: dict[str, Any], quiet: bool) -> None:
    """What is left of the cost, a line for every budget of :func:`cut_report`, and what is cut off."""
    cost = report["cost"]
    before, after, to = (None if cost[key] is None else counted_as(cost, cost[key]) for key in ("before", "after", "to"))
    asked = "" if to is None else f", {to} asked"
    when = " when the table was made" if cost["budget"] == "latency" else ""
    part = f"{cost['part']:.2f} of the whole's {counted_as(cost, cost['whole'])}{when}"
    say(f"prune: {cost['budget']}: {before} before, {after} now{asked}, which is {part}", quiet=quiet)
    for name, part in report["budget"].items():
        say(f"prune: sparsity of {name}: {', '.join(f'{key} {value:.4f}' for key, value in part.items())}", quiet=quiet)
    if cut := report["cut_off"]:
        lost = ", ".join(f"the {name} to the {output}" for name, output in cut["pairs"])
        gone = f"; {cut['share']:.1%} of what is removed is of {', '.join(cut['towers'])}, which reaches nothing" if cut["towers"] else ""
        say(f"WARNING: prune: no path is left from {lost}{gone}")
