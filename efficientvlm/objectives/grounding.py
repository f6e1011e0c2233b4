"""Phrases as boxes: where in its picture lies what a phrase means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import box_losses, giou
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import CachedBoxes
from efficientvlm.objectives.terms import Pairing, Term, of_fused
from efficientvlm.runtime import ranks


def boxes(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """L1, summed over the four numbers, and 1 - GIoU of the student's boxes [Q, 4] and the teacher's, a mean over boxes (ours)."""
    ours, theirs = ours.float(), theirs.float()
    return ranks.mean((ours - theirs).abs().sum(-1) + 1 - giou(ours, theirs))


class Grounding(Objective):
    """L1 and 1 - GIoU of the box that is said and the one that is meant, a mean over phrases (X-VLM).

    Use it to tune a network that grounds on phrases with their boxes; `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a batch of `data.kinds.expressions.expression_batch`, of which are read: pixels [I, 3, H, W]; image_index [Q],
    question_ids and question_mask [Q, L]; boxes [Q, 4] (centre, width, height as fractions) and, where it is there, is_whole_image [Q]:
    those are left out of both losses. Returns `box` and `giou`, and their sum as `loss`.

    Source: X-VLM (Zeng et al. 2022), visual grounding. There one box without area switches GIoU off for its whole batch, and a batch of
    whole images divides by zero; here each box counts for itself, the first is refused where data are read, and the second gives 0.
    The terms for a teacher are ours: those of question answering without the decoder, and boxes.

    Example: `Grounding(model)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        *of_fused("question_mask"),
        Term("boxes", "boxes", boxes),
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def cached(self, teacher: Any) -> CachedBoxes:
        """`teacher`, which answers for `boxes` alone and sees a phrase of a picture once."""
        return CachedBoxes(teacher)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are, beside the taps in `want`, `boxes` [Q, 4] and the mask of the phrases."""
        record: Record = model.ground(batch, {tap for tap in want if "." in tap})
        record["question_mask"] = batch["question_mask"]
        if model is not self.model:
            return Pass({}, record)
        whole = batch["is_whole_image"] if "is_whole_image" in batch else torch.zeros_like(batch["boxes"][:, 0])
        l1, overlap = box_losses(record["boxes"], batch["boxes"], whole)
        return Pass({"box": l1, "giou": overlap}, record)
