"""How a configuration records which heads and neurons are still there: `kept`, group (`vision.3.neuron`) → ranges of original indices."""

from __future__ import annotations

from collections.abc import Mapping

from efficientvlm.errors import BadInput


def kept_indices(counts: Mapping[str, int], named: Mapping[str, str] | None) -> dict[str, list[int]]:
    """Original indices still present of every group of `counts`; groups that `named` leaves out are whole.

    Raises:
        BadInput: `named` has a group or index that the sizes do not have.
    """
    given = {} if named is None else named
    if not isinstance(given, Mapping):
        raise BadInput("config.json: kept is not a mapping of groups to ranges", repr(given)[:80])
    if unknown := sorted(map(str, set(given) - set(counts))):
        raise BadInput("config.json: kept structure names unknown groups", ", ".join(unknown[:5]))
    return {group: parse_ranges(given[group], count, group) if group in given else list(range(count)) for group, count in counts.items()}


def kept_ranges(counts: Mapping[str, int], kept: Mapping[str, list[int]]) -> dict[str, str] | None:
    """The `kept` entry of a configuration: groups that lost something, or None."""
    return {group: format_ranges(indices) for group, indices in kept.items() if len(indices) < counts[group]} or None


def kept_of_layers(named: Mapping[str, str] | None, layers: Mapping[str, list[int]]) -> dict[str, str] | None:
    """`kept` of the network that has only `layers` (tower → old numbers in their new order)."""
    moved = {}
    for group, ranges in (named or {}).items():
        tower, number, kind = group.split(".")
        if int(number) in layers.get(tower, ()):
            moved[f"{tower}.{layers[tower].index(int(number))}.{kind}"] = ranges
    return moved or None


def parse_ranges(text: str, count: int, group: str) -> list[int]:
    """`"0-3,7"` as ascending indices below `count`; :class:`BadInput` if it is anything else."""
    indices: list[int] = []
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            if int(last or first) >= count:  # before it is counted out
                raise BadInput(f"config.json: kept.{group} is not ascending within 0-{count - 1}", repr(text)[:80])
            indices.extend(range(int(first), int(last or first) + 1))
    except (ValueError, AttributeError):
        raise BadInput(f"config.json: kept.{group} is not a list of ranges", repr(text)[:80], "write it as 0-3,7") from None
    if indices != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < count):
        raise BadInput(f"config.json: kept.{group} is not ascending within 0-{count - 1}", repr(text)[:80])
    return indices


def format_ranges(indices: list[int]) -> str:
    """Ascending indices as `"0-3,7"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
