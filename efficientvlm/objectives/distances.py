"""Distances between a student's and a teacher's logits, hidden states and attention maps, all computed in float32.

Over several processes a mean is one over all their items, in the sense of `ranks.share_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm import ranks


def logit_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, scale: bool = False, valid: Tensor | None = None, same_rows: bool = False
) -> Tensor:
    """KL(teacher ‖ student) over the last axis, averaged over rows (EfficientVLM: `batchmean`, no T² factor unless `scale`).

    `student`, `teacher` [..., C]; `valid` [...] keeps only the rows that are True. `same_rows`: every process holds the rows of all.
    """
    if valid is not None:
        student, teacher = student[valid.bool()], teacher[valid.bool()]
    count = student.shape[:-1].numel()
    rows = max(1, count) if same_rows else ranks.share_of(count)
    log_p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    divergence = F.kl_div(log_p, q, reduction="sum", log_target=True) / rows
    return divergence * temperature**2 if scale else divergence


def hidden_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[tuple[int, int]], mask: Tensor | None = None
) -> Tensor:
    """Sum over layer `pairs` (student index, teacher index) of the mean squared error of states [B, T, W]; `mask` [B, T] keeps tokens."""
    total = torch.zeros((), device=student[0].device)
    for s, t in pairs:
        error = (student[s].float() - teacher[t].float()).square()
        total = total + (ranks.mean(error) if mask is None else _token_mean(error.mean(-1), mask))
    return total


def attention_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    heads: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sum over layer `pairs` of the mean squared error of attention maps [B, H, T, S], times the number of keys S.

    `heads[i]` are the positions in the student's and in the teacher's map of the heads they share at student layer i (all, in order, by
    default); `mask` [B, T] keeps queries. Masked keys have probability 0 in both maps.
    """
    total = torch.zeros((), device=student[0].device if student else None)
    for s, t in pairs:
        ours, theirs = student[s], teacher[t]
        if heads is not None:
            mine, same = heads[s]
            if len(mine) < ours.shape[1]:
                ours = ours.index_select(1, _positions(tuple(mine), ours.device))
            if len(same) < theirs.shape[1]:
                theirs = theirs.index_select(1, _positions(tuple(same), theirs.device))
        if not ours.shape[1]:
            continue
        error = (ours.float() - theirs.float()).square().sum(-1)
        total = total + (ranks.mean(error) if mask is None else _token_mean(error.mean(1), mask))
    return total


def _token_mean(error: Tensor, mask: Tensor) -> Tensor:
    keep = mask.float()
    return (error * keep).sum() / ranks.share_of(keep.sum())


@lru_cache(maxsize=1024)
def _positions(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used where gradients are needed
        return torch.tensor(heads, dtype=torch.long, device=device)
