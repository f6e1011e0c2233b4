"""Contrast alone: how two towers that are compared by their features are trained on pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.data.batch import Batch
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.terms import Term, attention, contrast, hidden
from efficientvlm.runtime.exchange import Rows


class Contrastive(Objective):
    """The loss with which a CLIP or a SigLIP was trained, over the pairs of all processes.

    Use it for a network that compares images with texts by their features and does nothing else. Captions and pictures that are equal
    belong to one another, so that they are no wrong partners (ours; the published losses know the pairs alone).

    Inputs of `forward`: a `data.kinds.pairs.pair_batch`, of which pixels, text_ids, text_mask, image_ids and caption_ids are read. Returns
    `itc`, and the same as `loss`.

    Source: CLIP (Radford et al. 2021): cross-entropy over images and over texts; SigLIP (Zhai et al. 2023): a logistic loss a pair.

    Example: `Contrastive(model)(batch, step=0)["loss"].backward()`
    """

    terms = (
        Term("itc_logits", "itc_logits", contrast),
        Term("vision_hidden", "vision.hidden", hidden),
        Term("vision_self_attention", "vision.self_attention", attention),
        Term("text_hidden", "text.hidden", hidden, "text_mask"),
        Term("text_self_attention", "text.self_attention", attention, "text_mask"),
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def passes(self, model: Any, batch: Batch, step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are `itc_logits` [B, B] of the pairs of all processes, their features, and the towers' taps."""
        rows = Rows(len(batch["text_ids"]))
        record = model.run(batch, [tap for tap in want if "." in tap])
        record["text_mask"] = batch["text_mask"]
        record["itc_logits"] = model.similarity(*(rows.gather(record[f"{side}_features"].float()) for side in ("image", "text")))
        images, texts = (rows.gather(batch[name]) for name in ("image_ids", "caption_ids"))
        same = (images[:, None] == images) | (texts[:, None] == texts)
        losses = {"itc": model.loss(record["itc_logits"], same)} if model is self.model else {}
        return Pass(losses, record)

    def after_step(self, step: int) -> None:
        self.model.limit_scale()
