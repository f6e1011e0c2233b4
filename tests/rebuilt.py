"""Networks and batches whose values follow from names and places alone, so that they are the same on every machine."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

SPREAD = 2003  # a prime: values of one tensor repeat no pattern that a matrix product would see


def values(name: str, shape: Any, scale: float = 1.0) -> Tensor:
    """Numbers in [-scale, scale) of `shape`, from integers."""
    count = torch.Size(shape).numel()
    places = torch.arange(count, dtype=torch.int64)
    mixed = (places * 7919 + places.square() % 104_729 * 31 + zlib.crc32(name.encode())) % SPREAD
    return ((2 * mixed.double() / SPREAD - 1) * scale).float().view(torch.Size(shape))


def rebuilt(model: nn.Module) -> nn.Module:
    """`model` with all its parameters filled: matrices by their inputs, scales of norms near 1; single numbers stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(values(name, parameter.shape, 2.0 / parameter[0].numel() ** 0.5))
            elif parameter.ndim == 1:
                parameter.copy_(values(name, parameter.shape, 0.2) + name.endswith(".weight"))
    return model.eval()


def tokens(name: str, shape: tuple[int, int], vocabulary: int, first: int = 1) -> Tensor:
    """Token ids [B, L] from 5 on; each text begins with `first`."""
    ids = 5 + (values(name, shape).abs() * (vocabulary - 5)).long().clamp(max=vocabulary - 6)
    ids[:, 0] = first
    return ids
