"""The features of all images of a source, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import stack
from efficientvlm.errors import Diverged
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.families.weights import finite
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.progress import Bar


@torch.inference_mode()
def features_of(loaded: Loaded, pixels: Tensor) -> Tensor:
    """Images [B, 3, H, W] to unit vectors [B, E], in blocks that fit the device.

    Raises:
        Diverged: one is no finite number.
    """
    model = loaded.model.eval()
    at_once = max(1, room(model.device) // Footprint.of(loaded.config).encoding)
    found = torch.cat([model.embed_images(part.to(model.device))[1].float() for part in pixels.split(at_once)])
    if not finite(found):
        what = "the features of some images are no finite numbers"
        raise Diverged(what, "the network overflows, though its weights are finite", "train it with a smaller --lr, in fp32, or anew")
    return found


def encoded(loaded: Loaded, source: Any, batch_size: int, title: str, quiet: bool) -> Iterator[tuple[Sequence[Any], Tensor]]:
    """The samples of `source` that can be read, and the features [B, E] of their images."""
    starts = range(0, len(source), batch_size)
    with Bar(title, len(source), quiet=quiet) as bar:
        for start, items in zip(starts, usable_batches(source, starts, len(source)), strict=True):
            if items:
                yield items, features_of(loaded, stack([item.image for item in items]))
            bar.update(min(len(source), start + batch_size))
