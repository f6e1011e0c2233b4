"""Students of another width: fewer columns, heads and neurons, and fewer layers that look across, out of a teacher's own weights.

The residual streams of a network are found, not listed: an axis of a tensor carries the stream of a tower if it grows with that tower's
width and belongs to no head or neuron. Source: ours; DLIP says no more than how large its students are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from efficientvlm.compression.importance import importance_scores
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import NEURON, Unit
from efficientvlm.families.checks import MOST
from efficientvlm.families.structure import Layered, Structure

Channels = Literal["important", "leading"]
Axis = tuple[str, int]
"""A state-dict name and one of its dimensions."""

TALLER = "a student takes its weights from its teacher"


class Preset(NamedTuple):
    """A known student: layers, of the images and of every tower of texts, columns, heads, neurons, and layers that look across.

    Texts without any stay as they are. Patches of `patch_size` pixels, and towers of which nothing is taken from the teacher, are
    those of students that were published so. `teacher` is whose student it is. `parameters` is its part of the 213 M that DLIP counts for
    BLIP base, of vision and text encoder alone, as the shape gives it.
    """

    layers: tuple[int, int | None]
    sizes: tuple[Layered, Layered | None]
    teacher: str
    fusion_layers: int | None = None
    patch_size: int | None = None
    redrawn: tuple[str, ...] = ()
    parameters: float | None = None


BLIP_TEACHER, CLIP_TEACHER = "a BLIP of base size or larger", "a CLIP of base size or larger"
PRESETS = {
    "dlip-small": Preset((12, 6), (Layered(384, 6, 1536), Layered(384, 6, 1536)), BLIP_TEACHER, 6, parameters=0.2243),
    "dlip-base": Preset((12, 8), (Layered(576, 9, 2304), Layered(576, 9, 2304)), BLIP_TEACHER, 8, parameters=0.5111),
    "dime-fm-vit-b32": Preset(
        (12, None), (Layered(768, 12, 3072), None), "a CLIP or SigLIP whose images are a multiple of 32 pixels", None, 32, ("vision",)
    ),
    "tinyclip-61m": Preset((12, 9), (Layered(640, 10, 2560), Layered(512, 8, 2048)), CLIP_TEACHER),
    "tinyclip-39m": Preset((12, 6), (Layered(512, 8, 2048), Layered(512, 8, 2048)), CLIP_TEACHER),
    "tinyclip-8m": Preset((10, 3), (Layered(256, 4, 1024), Layered(256, 4, 1024)), CLIP_TEACHER),
}


@dataclass
class Origin:
    """Where the tensors of a student come from, by their names: whole from the teacher, cut, or drawn at random; and why some are."""

    whole: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    def add(self, name: str, taken: Tensor | None, teacher: Tensor | None) -> None:
        """Note that the tensor `name` is `taken` of that of the teacher, or of nothing."""
        whole = taken is not None and teacher is not None and taken.shape == teacher.shape
        (self.random if taken is None else self.whole if whole else self.cut).append(name)

    def said(self) -> dict[str, Any]:
        """For the manifest."""
        return {"whole": len(self.whole), "cut": len(self.cut), "random": sorted(self.random), "why": self.why}

    def __str__(self) -> str:
        lines = f"{len(self.whole)} tensors are the teacher's, {len(self.cut)} are cut out of its, {len(self.random)} are drawn at random"
        return "; ".join([lines, *self.why])


def resolve_sizes(
    config: Structure, width: Mapping[str, int], heads: Mapping[str, int], neurons: Mapping[str, int], redrawn: Iterable[str] = ()
) -> dict[str, Layered]:
    """Tower → what its layers are to have, of the towers that change; sizes given for a tower hold for those that share its columns.

    With another width heads keep their size by default, so that their number follows, and neurons their ratio to the width. Towers that
    are `redrawn` may be larger than the teacher's.

    Raises:
        BadInput: towers that are not there, contradictions, sizes that do not divide, or that the teacher does not have.
    """
    given = {"width": width, "heads": heads, "neurons": neurons}
    there = {tower: count for tower, count in config.layers().items() if count}
    for name, values in given.items():
        for tower in values:
            if tower not in there and not {*_companions(config, tower)} & {*there}:
                raise BadInput(f"{name}: no such tower: {tower}", f"there are {', '.join(there)}", "use one of these")
    found = {}
    for tower, count in there.items():
        each = {config.layered(tower, layer) for layer in range(count)}
        wanted = {name: _for_tower(config, name, values, tower) for name, values in given.items()}
        if all(value is None for value in wanted.values()):
            continue
        if len(each) > 1:
            why = "its layers differ in width, and each stage hangs on the one before"
            raise BadInput(f"{tower} cannot be made narrower", why, "change its layers, or another tower")
        found[tower] = _layered(tower, each.pop(), largest=MOST if tower in {*redrawn} else 0, **wanted)
    return {tower: chosen for tower, chosen in found.items() if chosen != config.layered(tower, 0)}


def _companions(config: Structure, tower: str) -> tuple[str, ...]:
    return next((towers for towers in config.together if tower in towers), (tower,))


def _for_tower(config: Structure, name: str, values: Mapping[str, int], tower: str) -> int | None:
    said = {other: values[other] for other in _companions(config, tower) if other in values}
    if len({*said.values()}) > 1:
        text = " and ".join(f"{value} in {other}" for other, value in said.items())
        raise BadInput(f"{name} is {text}", "these towers are of one size", "give one of them")
    return next(iter(said.values()), None)


def _layered(tower: str, old: Layered, width: int | None, heads: int | None, neurons: int | None, largest: int) -> Layered:
    """What is asked for, filled up from `old`; nothing is larger than there, or than `largest` if that is more."""
    each = old.width // old.heads
    wide = old.width if width is None else width
    if heads is None and wide % each:
        raise BadInput(f"{tower} width is {wide}", f"heads have {each} columns each", f"use a multiple of {each}, or give heads too")
    chosen = Layered(wide, wide // each if heads is None else heads, old.neurons * wide // old.width if neurons is None else neurons)
    for name, (new, before) in zip(Layered._fields, zip(chosen, old, strict=True), strict=True):
        if not 1 <= new <= max(before, largest):
            why = f"no layer has more than {largest}" if largest else f"{TALLER}, which has {before}"
            raise BadInput(f"{tower} {name} is to be {new}", why, f"ask for 1 to {max(before, largest)}")
    if chosen.width % chosen.heads:
        why = "a head has a whole number of columns"
        raise BadInput(f"{tower} has {chosen.heads} heads in {chosen.width} columns", why, "choose numbers that divide")
    return chosen


def resize_model(
    model: Any,
    sizes: Mapping[str, Layered],
    fusion_layers: int | None = None,
    *,
    channels: Channels = "important",
    redrawn: Iterable[str] = (),
    depth: Mapping[str, int] | None = None,
    seed: int = 0,
) -> tuple[Any, Origin]:
    """A network with `sizes`, whose tensors are cut out of `model`; and where each of them comes from.

    Heads and neurons are those with the largest squared weights in their layer, in their order. Of a residual stream one choice of columns
    holds for all tensors that it passes: the first ones, or those with the largest squared weights, each tensor counted alike. What fits
    nothing there is drawn as in a new network.

    Args:
        sizes: of :func:`resolve_sizes`; towers that are not named stay as they are.
        fusion_layers: so many of the last layers of each tower look across, of a family where layers may differ in that.
        redrawn: towers of which nothing is taken from `model`; they may be larger than its.
        depth: layers of towers that are redrawn, where they are not as many as those of `model`.
        seed: of what is drawn.

    Raises:
        BadInput: the family has no such students, or `model` has lost heads or neurons that would be needed.
    """
    config = model.config.with_sizes(sizes, fusion_layers).with_depth(depth or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(model)(config)
    own, target = model.state_dict(), student.state_dict()
    origin, towers = Origin(), {*redrawn}
    places, heads = _of_units(model, student, towers)
    student.config.head_source = heads or None
    narrower = {tower: size for tower, size in sizes.items() if size.width < model.config.layered(tower, 0).width}
    places |= _of_streams(model, narrower, own, places, channels)
    state: dict[str, Tensor] = {}
    for name, empty in target.items():
        tensor = None if model.tower_of(name) in towers else _taken(own.get(name), name, empty, places)
        origin.add(name, tensor, own.get(name))
        state[name] = empty if tensor is None else tensor
    origin.why = _reasons(model.config, sizes, towers)
    example = next(model.parameters())
    student.to(device=example.device, dtype=example.dtype)
    student.load_state_dict(state, strict=True)
    return student.train(model.training), origin


def _taken(tensor: Tensor | None, name: str, target: Tensor, places: Mapping[Axis, Tensor]) -> Tensor | None:
    """What fits `target`, the student's tensor `name`, out of the teacher's; None where something of it has no place there."""
    if tensor is None or tensor.dim() != target.dim():
        return None
    for dim, size in enumerate(target.shape):
        index = places.get((name, dim))
        if (index is None and tensor.shape[dim] != size) or (index is not None and bool((index < 0).any())):
            return None
        if index is not None and not torch.equal(index, torch.arange(tensor.shape[dim], device="cpu")):
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _reasons(config: Structure, sizes: Mapping[str, Layered], redrawn: Iterable[str]) -> list[str]:
    found = [f"{tower} is drawn at random, as asked for" for tower in sorted(redrawn)]
    for tower, new in sizes.items():
        if tower in {*redrawn}:
            continue
        before, after = (size.width // size.heads for size in (config.layered(tower, 0), new))
        if before != after:
            found.append(f"heads of {tower} have {after} columns instead of {before}, so that their attention is drawn at random")
    return found


def _of_units(model: Any, student: Any, redrawn: Iterable[str]) -> tuple[dict[Axis, Tensor], dict[str, list[int]]]:
    """Axis of the student → place of each entry there in the teacher's tensor, -1 for none, of the axes of heads and neurons; and group →
    the teacher's heads that are kept, where some are not. Both of towers that are not `redrawn`."""
    redrawn, known = {*redrawn}, {*model.config.original_counts()}
    groups = _by_group([*model.units(), *model.whole_units()])
    units = [unit for group in groups.values() for unit in group]
    shapes = next(model.parameters()).is_meta  # of which any will do
    values = [0.0] * len(units) if shapes else importance_scores("magnitude", model, units).tolist()
    scores = dict(zip(((unit.group, unit.index) for unit in units), values, strict=True))
    target = student.state_dict()
    places: dict[Axis, Tensor] = {}
    heads: dict[str, list[int]] = {}
    for group, wanted in _by_group([*student.units(), *student.whole_units()]).items():
        if group.partition(".")[0] in redrawn:
            continue
        there = groups.get(group, [])
        if len(there) < len(wanted):
            why = f"{len(wanted)} are asked for, and the teacher has {len(there)} left"
            raise BadInput(f"{group}: too few are there", why, "ask for fewer, or begin with a network that was not pruned")
        best = sorted(there, key=lambda unit: -scores[unit.group, unit.index])[: len(wanted)]
        best.sort(key=lambda unit: unit.index)
        alike = best and wanted[0].sites[0].stop - wanted[0].sites[0].start == best[0].sites[0].stop - best[0].sites[0].start
        if alike and len(best) < len(there) and wanted[0].kind != NEURON and group in known:
            heads[group] = [unit.index for unit in best]
        for new, old in zip(wanted, best, strict=True):
            for here, before in zip(new.sites, old.sites, strict=True):
                axis = here.tensor, here.dim
                index = places.setdefault(axis, torch.full((target[here.tensor].shape[here.dim],), -1, device="cpu"))
                if here.stop - here.start == before.stop - before.start:
                    index[here.start : here.stop] = torch.arange(before.start, before.stop, device="cpu")
    return places, heads


def _by_group(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.group, []).append(unit)
    return found


def _of_streams(
    model: Any, sizes: Mapping[str, Layered], own: Mapping[str, Tensor], taken: Mapping[Axis, Tensor], channels: Channels
) -> dict[Axis, Tensor]:
    """Axis of the student → the teacher's columns that it keeps, of the axes that carry a residual stream that becomes narrower."""
    found: dict[Axis, Tensor] = {}
    done: set[str] = set()
    for tower, new in sizes.items():
        old = model.config.layered(tower, 0)
        if tower in done or new.width == old.width:
            continue
        done |= {*_companions(model.config, tower)}
        axes = [axis for axis in stream(model, tower) if axis not in taken]
        leading = channels == "leading" or any(own[name].is_meta for name, _ in axes)
        columns = torch.arange(new.width, device="cpu") if leading else _strongest(axes, own, old.width, new.width)
        for name, dim in axes:
            times = own[name].shape[dim] // old.width  # several outputs of the width may lie side by side
            found[name, dim] = torch.cat([columns + at * old.width for at in range(times)])
    return found


def stream(model: Any, tower: str) -> list[Axis]:
    """The axes that grow with the width of `tower`, those of its heads among them."""
    config = model.config
    wider = {
        other: size._replace(width=2 * size.width)
        for other in _companions(config, tower)
        if config.layers().get(other)
        for size in [config.layered(other, 0)]
    }
    with torch.device("meta"):
        plain, grown = (type(model)(config.with_sizes(change)).state_dict() for change in ({}, wider))
    return [
        (name, dim)
        for name, tensor in plain.items()
        for dim, (before, after) in enumerate(zip(tensor.shape, grown[name].shape, strict=True))
        if before != after
    ]


def _strongest(axes: Iterable[Axis], own: Mapping[str, Tensor], width: int, count: int) -> Tensor:
    """The `count` of the `width` columns of a stream with the largest squared weights, each tensor counted alike, ascending."""
    total: Tensor | None = None
    for name, dim in axes:
        squares = own[name].detach().double().square().movedim(dim, 0).flatten(1).sum(1) if own[name].dim() > 1 else None
        if squares is not None:
            squares = squares.unflatten(0, (-1, width)).sum(0)
            part = (squares / squares.mean().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
            total = part if total is None else total + part
    assert total is not None  # every stream enters a matrix
    return total.topk(count).indices.sort().values
