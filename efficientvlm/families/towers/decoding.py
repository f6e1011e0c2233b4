"""Text that is written token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def greedy(step: Callable[[Tensor], Tensor], ids: Tensor, end: int, filler: int, most: int) -> Tensor:
    """The likeliest token after `ids` [B, L], the likeliest after that, and so on: [B, <= `most`], the given ones not among them.

    Args:
        step: next-token logits [B, L, V] of the tokens [B, L] that follow those of the calls before; it keeps the cache.
        end: token that ends a text; what stands behind it is `filler`.
    """
    said = [ids[:, :0]]
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(most):
        ids = step(ids)[:, -1:].argmax(-1).masked_fill(done[:, None], filler)
        said.append(ids)
        done |= ids[:, 0] == end
        if bool(done.all()):
            break
    return torch.cat(said, 1)
