"""What prune and its re-cut share: the scope of a configuration, the files beside the model, the report on the budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from efficientvlm.checkpoints.files import fsync_dir
from efficientvlm.compression.accounting import count_sparsity
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.runtime.progress import say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.stages import Prune
from efficientvlm.training.state import unshared

DENSE, GATES = "dense.safetensors", "gates.safetensors"


def scope_of(config: Prune, model: Any) -> Scope:
    """What `config` allows to be pruned of `model`, checked to be reachable.

    Raises:
        TargetMissed: floors, kinds or towers make the sparsity unreachable, or the last path of an input would have to go.
    """
    whole = {tower: part["initial"] for tower, part in count_sparsity(model)["by_tower"].items()}
    limits = settings_of(config, "kinds", "towers", "tower_sparsity", "min_heads", "min_neurons", "round_to", "allow_blind")
    scope = Scope.of(Anatomy.of(model), config.sparsity, whole=whole, **limits)
    scope.check_feasible()
    return scope


def cut_report(scope: Scope, keep: Tensor, gates: Gates | None) -> dict[str, Any]:
    """What the manifest says of a cut: `budget`, and where an input is cut off on purpose `cut_off`, else None.

    `cut_off` names `pairs` of input and output, the `towers` that then reach nothing, and the `share` of what is removed that was theirs.
    """
    anatomy, cut = scope.anatomy, scope.cut_off(keep)
    removed = anatomy.removed_mask(keep)
    towers = anatomy.reach.dead_towers(anatomy.standing(keep))
    share = anatomy.removed_elements(removed, towers) / max(anatomy.removed_elements(removed), 1)
    found = {"pairs": [list(pair) for pair in sorted(cut)], "towers": towers, "share": share} if cut else None
    return {"budget": budget_report(scope, keep, gates), "cut_off": found}


def budget_report(scope: Scope, keep: Tensor, gates: Gates | None) -> dict[str, dict[str, float]]:
    """Target, expected (of the gates, L0 only) and achieved sparsity of every budget."""
    report = {target.name: {"target": target.sparsity, "achieved": scope.achieved(keep)[target.name]} for target in scope.targets}
    if gates is not None:
        expected = Budget(scope).expected(gates.p_open().detach().cpu()).tolist()
        for name, value in zip(report, expected, strict=True):
            report[name]["expected"] = value
    return report


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


def say_cut(report: dict[str, Any], quiet: bool) -> None:
    """A line for every budget of :func:`cut_report`, and what is cut off."""
    for name, part in report["budget"].items():
        say(f"prune: sparsity of {name}: {', '.join(f'{key} {value:.4f}' for key, value in part.items())}", quiet=quiet)
    if cut := report["cut_off"]:
        lost = ", ".join(f"the {name} to the {output}" for name, output in cut["pairs"])
        gone = f"; {cut['share']:.1%} of what is removed is of {', '.join(cut['towers'])}, which reaches nothing" if cut["towers"] else ""
        say(f"WARNING: prune: no path is left from {lost}{gone}")
