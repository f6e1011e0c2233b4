"""Importance criteria to compare the gates with: Torch-Pruning's own scores, on the units of a family's anatomy.

Torch-Pruning normally finds coupled channels by tracing. Here the anatomy says which they are, so its criteria also work where tracing
does not (fused qkv, empty layers); tests compare the two where both work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import Dependency, Group, Node

from efficientvlm.compression.anatomy import Groups
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import Unit

Method = Literal["magnitude", "taylor", "random"]

CRITERIA: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer=None),
    "taylor": lambda: tp.importance.GroupTaylorImportance(group_reduction="mean", normalizer=None),
    "random": tp.importance.RandomImportance,
}


def importance_scores(method: Method, model: nn.Module, units: Sequence[Unit], *, seed: int = 0) -> torch.Tensor:
    """float64 [units]: how much each unit matters, comparable between layers and kinds (the mean of every group is 1).

    The score of a unit is the sum over its channels. Order and budget are then `snapping.snap_scores`.

    Args:
        method: `magnitude` (squared weights), `taylor` (|weight · gradient|: `.grad` must be filled) or `random`.
        units: those that may be removed (`Scope.units`).
        seed: of `random`.

    Raises:
        ValueError: Taylor without gradients.
        BadInput: a unit cuts something that is not a Linear.
    """
    criterion, parts = CRITERIA[method](), [torch.empty(0, dtype=torch.float64)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in Groups(units).slices.values():
            group = pruning_group(model, units[part])
            if method == "taylor":
                _check_gradients(group)
            if method == "random":
                # One draw a unit: the sum over the channels of a head would vary less than a neuron's single draw.
                group[0].idxs[:] = range(part.stop - part.start)
            scores = criterion(group)[: part.stop - part.start].detach().cpu().double()
            parts.append(scores / scores.mean().clamp_min(torch.finfo(torch.float64).tiny))
    return torch.cat(parts)


def pruning_group(model: nn.Module, units: Sequence[Unit]) -> Group:
    """Torch-Pruning's description of the channels that leave with `units` (all of one group).

    The root index of a channel is the position of its unit, so that Torch-Pruning's reduction adds up the channels of a unit.
    """
    channels: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for position, unit in enumerate(units):
        for tensor, dim, start, stop in unit.sites:
            module, _, kind = tensor.rpartition(".")
            if kind == "weight":  # a bias goes with its weight's rows
                channels.setdefault((module, dim), []).extend((index, position) for index in range(start, stop))
    group = Group()
    for (name, dim), pairs in channels.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise BadInput(f"no importance criterion for {name}", f"it is a {type(layer).__name__}", "use --method l0")
        handler = tp.prune_linear_in_channels if dim else tp.prune_linear_out_channels
        node = Node(layer, None, name)
        pairs = sorted(pairs)  # the Taylor criterion sorts the indices itself
        group.add_dep(Dependency(handler, handler, source=node, target=node), [index for index, _ in pairs])
        group[len(group) - 1].root_idxs = [position for _, position in pairs]
    return group


def _check_gradients(group: Group) -> None:
    for dependency, _ in group:
        if dependency.layer.weight.grad is None:
            raise ValueError(f"the Taylor criterion needs a gradient of {dependency.target.name}")
