"""What prune and its re-cut share: the scope of a configuration, the files beside the model, the report on the budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from efficientvlm.compression.accounting import count_sparsity
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.files import fsync_dir
from efficientvlm.progress import say
from efficientvlm.stages.common import settings_of
from efficientvlm.state import unshared

DENSE, GATES = "dense.safetensors", "gates.safetensors"


def scope_of(config: Any, family: Any, model: Any) -> Scope:
    """What `config` allows to be pruned of `model`, checked to be reachable.

    Raises:
        TargetMissed: floors, kinds or towers make the sparsity unreachable.
    """
    whole = {tower: part["initial"] for tower, part in count_sparsity(family, model)["by_tower"].items()}
    limits = settings_of(config, "kinds", "towers", "tower_sparsity", "min_heads", "min_neurons", "round_to")
    scope = Scope.of(Anatomy.of(family, model), config.sparsity, whole=whole, **limits)
    scope.check_feasible()
    return scope


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


def say_budget(budget: dict[str, dict[str, float]], quiet: bool) -> None:
    """A line for every budget of :func:`budget_report`."""
    for name, part in budget.items():
        say(f"prune: sparsity of {name}: {', '.join(f'{key} {value:.4f}' for key, value in part.items())}", quiet=quiet)
