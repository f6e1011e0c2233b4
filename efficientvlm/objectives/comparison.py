"""Statements about two images that are true or false."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import choice_loss
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import CachedVerdicts
from efficientvlm.objectives.terms import Term, attention, logits, of_fused


class Comparison(Objective):
    """Cross-entropy of false and true (X-VLM and BLIP, NLVR2).

    Use it to tune a network that reads two images on statements about them; `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a batch of `data.kinds.statements.statement_batch`, of which are read: pixels and second_pixels [P, 3, H, W];
    pair_index and labels [S]; text_ids and text_mask [S, L].
    Returns `task`, and the same as `loss`.

    Source: X-VLM (Zeng et al. 2022) and BLIP (Li et al. 2022), fine-tuning on NLVR2; the terms are those of EfficientVLM (Wang et
    al. 2022).

    Example: `Comparison(model)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        *of_fused("text_mask"),
        Term("text_cross_attention", "text.cross_attention", attention, "text_mask"),
        Term("logits", "logits", logits),
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.terms = tuple(term for term in self.terms if not term.tower or term.tap in model.taps)

    def cached(self, teacher: Any) -> CachedVerdicts:
        """`teacher`, which answers for `logits` alone and sees a sample once."""
        return CachedVerdicts(teacher)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are, beside the taps in `want`, `logits` [S, 2] and the mask of the statements.

        States and maps of images are those of all left, then of all right images [2 P, ...].
        """
        record: Record = model.run(batch, {tap for tap in want if "." in tap})
        record["text_mask"] = batch["text_mask"]
        losses = {"task": choice_loss(record["logits"], batch["labels"])} if model is self.model else {}
        return Pass(losses, record)
