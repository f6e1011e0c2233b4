"""Samples and batches with all their arrays and tensors in one buffer, as they go from one process to another."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64  # bytes: any type may be seen in place


class Place(NamedTuple):
    """Where an array or tensor lies in the buffer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    array: bool


def packed(value: Any) -> tuple[Tensor, Any]:
    """`value` as uint8 `[bytes]` in memory that processes share, and all the rest, with a :class:`Place` for every array and tensor.

    These are found in lists, tuples, dictionaries and dataclasses.

    Raises:
        OSError, RuntimeError: there is no room in the memory that processes share.
    """
    found: list[Tensor] = []
    size = 0

    def put(part: Any) -> Any:
        nonlocal size
        if isinstance(part, np.ndarray | Tensor) and not (isinstance(part, np.ndarray) and part.dtype.hasobject):
            tensor = part.detach().contiguous() if isinstance(part, Tensor) else torch.from_numpy(_plain(part))
            place = Place(size, tuple(part.shape), tensor.dtype, not isinstance(part, Tensor))
            found.append(tensor.reshape(-1).view(torch.uint8))
            size += -(-found[-1].numel() // ALIGNED) * ALIGNED
            return place
        return _mapped(part, put)

    rest = put(value)
    buffer = torch.empty(size, dtype=torch.uint8)
    if size:
        buffer.share_memory_()
    start = 0
    for part in found:
        buffer[start : start + part.numel()] = part
        start += -(-part.numel() // ALIGNED) * ALIGNED
    return buffer, rest


def unpacked(buffer: Tensor, rest: Any) -> Any:
    """What :func:`packed` was given; arrays and tensors are views of `buffer`."""

    def take(part: Any) -> Any:
        if isinstance(part, Place):
            count = int(np.prod(part.shape, dtype=np.int64)) * part.dtype.itemsize
            seen = buffer[part.start : part.start + count].view(part.dtype).view(part.shape)
            return seen.numpy() if part.array else seen
        return _mapped(part, take)

    return take(rest)


def _plain(array: Any) -> Any:
    """`array` row by row in memory, where torch may see it."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


def _mapped(value: Any, change: Any) -> Any:
    """`value` with `change` made to what it holds; itself where nothing changes."""
    if isinstance(value, list):
        return [change(part) for part in value]
    if isinstance(value, tuple):
        parts = [change(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {name: change(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: change(getattr(value, field.name)) for field in fields(value) if field.init})
    return value
