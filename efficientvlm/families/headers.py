"""What the weights of a folder say of themselves before any is read: names and shapes, from the headers of its safetensors files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from efficientvlm.checkpoints.files import open_plain
from efficientvlm.errors import BadInput
from efficientvlm.families.family import Family
from efficientvlm.families.structure import Structure
from efficientvlm.families.weights import renewed, weight_files

SPARE = 2  # tensors that a file calls by other names are counted as missing at first; more than so many times what is there cannot be


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the safetensors of `folder`, in one file or in shards; empty where there are none.

    Raises:
        BadInput: a file that is damaged, or no regular file.
    """
    return dict(entry for file in weight_files(folder) for entry in _entries(file))


def _entries(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    open_plain(file).close()
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                yield renewed(name), tuple(opened.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{file} is damaged or cut short", reason, "restore it, or make the folder again") from None


def check_shapes(family: Family, config: Structure, folder: Path) -> None:
    """Compare the network that `config` describes with the weights in `folder`, before either takes memory. No weights, no opinion.

    Raises:
        BadInput: a tensor of another shape, or a network far larger than its weights; damaged headers.
    """
    if not (found := header_shapes(folder)):
        return
    layers = sum(config.layers().values())
    if layers > len(found):
        why = f"config.json describes {layers:,} layers, the weights have {len(found):,} tensors"
        raise BadInput(f"{folder}: weights do not fit config.json", why, "restore config.json, or make the folder again")
    try:
        with torch.device("meta"):
            model = family.build(config)
    except (RuntimeError, ValueError, TypeError, OverflowError, ArithmeticError) as error:  # sizes whose product is no size any more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{folder / 'config.json'} describes no network that can be built", reason, "correct its sizes") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if name in found and shape != found[name]]
    if wrong:
        why = f"{len(wrong)} mismatched keys, first {wrong[0]}: {list(found[wrong[0]])} there, {list(wanted[wrong[0]])} by config.json"
        raise BadInput(f"{folder}: weights do not fit config.json", why, "restore config.json, or make the folder again")
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(shape) for shape in found.values())
    if needed > SPARE * held:
        why = f"config.json describes {needed:,} parameters, the weights hold {held:,}"
        raise BadInput(f"{folder}: weights do not fit config.json", why, "restore config.json, or make the folder again")
