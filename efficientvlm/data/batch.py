"""Parts of which batches are made: tensors that a model takes, with every draw seeded by (seed, step, sample, purpose)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientvlm.data.draw import Key, generator, seed_of
from efficientvlm.data.items import Pixels

Batch = dict[str, Any]


def stack(images: Sequence[Pixels]) -> Tensor:
    """Images `[H, W, 3]` of one size as a uint8 tensor `[B, 3, H, W]`."""
    height, width, channels = images[0].shape
    pixels = torch.empty(len(images), channels, height, width, dtype=torch.uint8)
    for row, image in zip(pixels.numpy(), images, strict=True):
        row[:] = image.transpose(2, 0, 1)
    return pixels


def on_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`."""
    return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}


def uniform(names: Sequence[str], count: int, seed: int, *purpose: Key) -> Tensor:
    """Numbers in [0, 1), float64 `[len(names), count]`: those of a row follow from `seed`, its name and the purpose alone."""
    return torch.from_numpy(np.stack([generator(seed, name, *purpose).random(count) for name in names]))


def keys(names: Sequence[str]) -> Tensor:
    """Numbers that are equal where names are, int64 `[len(names)]`."""
    return torch.tensor([seed_of(0, name) for name in names], dtype=torch.int64)
