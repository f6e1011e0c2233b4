"""The features of all images of a source, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import stack
from efficientvlm.errors import Diverged
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.families.weights import finite
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.progress import Bar


@torch.inference_mode()
def features_of(loaded: Loaded, pixels: Tensor, *, projected: bool = True) -> Tensor:
    """Images [B, 3, H, W] to unit vectors [B, E], in blocks that fit the device; not `projected`: what becomes them, at length 1.

    Raises:
        Diverged: one is no finite number.
    """
    model = loaded.model.eval()
    at_once = max(1, room(model.device) // Footprint.of(loaded.config).encoding)
    found = torch.cat([_features(model, part.to(model.device), projected) for part in pixels.split(at_once)])
    if not finite(found):
        what = "the features of some images are no finite numbers"
        raise Diverged(what, "the network overflows, though its weights are finite", "train it with a smaller --lr, in fp32, or anew")
    return found


def _features(model: Any, pixels: Tensor, projected: bool) -> Tensor:
    states, vectors = model.embed_images(pixels)
    return vectors.float() if projected else normalize(model.pooled_image(states).float(), dim=-1)


def encoded(
    loaded: Loaded, source: Any, batch_size: int, title: str, quiet: bool, *, projected: bool = True
) -> Iterator[tuple[Sequence[Any], Tensor]]:
    """The samples of `source` that can be read, and the features [B, E] of their images."""
    starts = range(0, len(source), batch_size)
    with Bar(title, len(source), quiet=quiet) as bar:
        for start, items in zip(starts, usable_batches(source, starts, len(source)), strict=True):
            if items:
                yield items, features_of(loaded, stack([item.image for item in items]), projected=projected)
            bar.update(min(len(source), start + batch_size))
