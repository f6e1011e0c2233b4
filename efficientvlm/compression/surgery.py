"""Cutting units out of a model, and putting zeros where they were; all by the family's anatomy.

Masked (gates 0), sliced, reloaded and zero-padded models compute one function, for any subset of units, empty layers included.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from efficientvlm.compression.anatomy import Anatomy, Mask
from efficientvlm.families.anatomy import Unit


def slice_model(model: Any, keep: torch.Tensor | Collection[Unit]) -> Any:
    """A new, smaller model that holds only the units of `keep`; `model` is not changed.

    Args:
        keep: bool [units] over `model.units()`, or the units themselves. Units keep their original indices in the new config.

    Raises:
        ValueError: `keep` does not fit the model.
        RuntimeError: the family builds other shapes than the slices have.
    """
    anatomy = Anatomy.of(model)
    removed = anatomy.removed_mask(keep)
    kept: dict[str, list[int]] = {name: [] for name in anatomy.groups.names}
    for unit, gone in zip(anatomy.units, removed, strict=True):
        if not gone:
            kept[unit.group].append(unit.index)
    freed = anatomy.freed(removed)
    state = {}
    for name, tensor in model.state_dict().items():
        for dim, free in freed.get(name, {}).items():
            tensor = tensor.index_select(dim, _indices(~free).to(tensor.device))
        if tensor.numel() or name not in freed:
            state[name] = tensor
    return _like(type(model)(model.config.with_kept(kept)), state, model)


def pad_model(sliced: Any) -> Any:
    """The model of original shape that computes what `sliced` does: its tensors at their original places, zeros elsewhere."""
    dense = type(sliced)(sliced.config.with_kept(whole(sliced.config)))
    state = sliced.state_dict()
    anatomy = Anatomy.of(dense)
    freed = anatomy.freed(~mask_vector(anatomy.units, sliced.config.kept_indices()))
    padded = {}
    for name, target in dense.state_dict().items():
        cuts = freed.get(name)
        if cuts is None:
            padded[name] = state[name]
            continue
        padded[name] = torch.zeros_like(target)
        places = [_indices(~cuts[dim] if dim in cuts else np.ones(size, dtype=bool)) for dim, size in enumerate(target.shape)]
        if all(map(len, places)):
            open_grid = [place.view([-1 if here == dim else 1 for here in range(target.dim())]) for dim, place in enumerate(places)]
            padded[name][tuple(open_grid)] = state[name].to(target)
    return _like(dense, padded, sliced)


def whole(config: Any) -> dict[str, list[int]]:
    """`kept` of a network from which nothing was removed."""
    return {group: list(range(count)) for group, count in config.original_counts().items()}


def mask_vector(units: Collection[Unit], kept: dict[str, list[int]]) -> torch.Tensor:
    """bool [units]: whether the original index of each unit is in `kept` (group → indices)."""
    sets = {group: set(indices) for group, indices in kept.items()}
    return torch.tensor([unit.index in sets.get(unit.group, ()) for unit in units], dtype=torch.bool)


def _indices(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask))


def _like(model: Any, state: dict[str, torch.Tensor], source: Any) -> Any:
    """`model` with exactly the tensors of `state`, on the device, in the dtype and in the mode of `source`."""
    example = next(source.parameters())
    model.to(device=example.device, dtype=example.dtype)
    model.load_state_dict(state, strict=True)
    return model.train(source.training)
