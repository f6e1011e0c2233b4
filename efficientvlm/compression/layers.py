"""Which layers a shallower student takes from its teacher, and which teacher layer each of its layers imitates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from efficientvlm.errors import BadInput
from efficientvlm.families.structure import Structure


def resolve_layers(config: Structure, wanted: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """Source layers of every tower: a count means the odd-layer map, a list is taken as it is, half (at least one) by default.

    Args:
        config: of the network that the layers are taken of.
        wanted: tower → count or 0-based list; a tower with layers keeps at least one unless 0 or an empty list is asked for.

    Raises:
        BadInput: unknown towers, counts or layers out of range, lists that are not strictly increasing; names all of them.
    """
    counts = config.layers()
    problems = [
        BadInput(f"no such tower: {tower}", f"there are {', '.join(counts)}", "use one of these") for tower in wanted if tower not in counts
    ]
    layers: dict[str, list[int]] = {}
    for tower, total in counts.items():
        choice = wanted.get(tower)
        if choice is not None and (problem := _wrong_choice(tower, total, choice)):
            problems.append(problem)
            continue
        try:
            layers[tower] = list(choice) if isinstance(choice, Sequence) else config.choose(tower, choice)
        except BadInput as problem:
            problems.append(problem)
    if len(problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise BadInput(f"{len(problems)} of the layers asked for are not there", lines, "correct them")
    if problems:
        raise problems[0]
    config.with_layers(layers)  # refuses what does not fit together
    return layers


def _wrong_choice(tower: str, total: int, choice: int | Sequence[int]) -> BadInput | None:
    there = f"the model has layers 0 to {total - 1}" if total else "the model has none there"
    if isinstance(choice, int):
        return None if 0 <= choice <= total else BadInput(f"{choice} {tower} layers", f"the model has {total}", f"ask for 0 to {total}")
    if wrong := [layer for layer in choice if not 0 <= layer < total]:
        return BadInput(f"{tower} layer {wrong[0]}", there, "leave it out")
    if any(b <= a for a, b in pairwise(choice)):
        return BadInput(f"{tower} layers {list(choice)}", "they must increase, without repeats", "sort them")
    return None


def layer_map(source_layers: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Student → teacher index of hidden states (0 is the input of the first layer) and of attention maps (EfficientVLM).

    >>> layer_map([1, 3])
    ({0: 0, 1: 2, 2: 4}, {0: 1, 1: 3})
    """
    hidden = {0: 0} | {i + 1: layer + 1 for i, layer in enumerate(source_layers)}
    return hidden, dict(enumerate(source_layers))


def shrink_model(teacher: Any, layers: Mapping[str, list[int]]) -> Any:
    """A model with only the given layers of `teacher`, every tensor a copy of the teacher's.

    Args:
        layers: tower → 0-based source layers, as :func:`resolve_layers` returns them.

    Raises:
        ValueError: the family names a source tensor that is missing or used twice.
        RuntimeError: a tensor has another shape there.
    """
    chosen = {tower: list(part) for tower, part in layers.items()}
    student = type(teacher)(teacher.config.with_layers(chosen))
    source = teacher.state_dict()
    sources = {name: teacher.source_name(name, chosen) for name in student.state_dict()}
    if missing := sorted({name for name in sources.values() if name not in source}):
        raise ValueError(f"the teacher has no tensor {missing[0]}")
    if len(set(sources.values())) < len(sources):
        raise ValueError("two tensors of the student come from one tensor of the teacher")
    state = {name: source[name_there] for name, name_there in sources.items()}
    reference = next(iter(source.values()), torch.empty(0))
    student.to(reference.device)
    student.load_state_dict(state, strict=True)  # refuses other shapes
    return student.train(teacher.training)
