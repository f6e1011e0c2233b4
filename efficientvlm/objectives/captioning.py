"""Captions as sequences of tokens, of which each is predicted from the image and those before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import caption_loss, predicting
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import CachedCaptions
from efficientvlm.objectives.terms import Term, attention, hidden, logits


class Captions(Objective):
    """The smoothed likelihood of the captions of images (X-VLM, captioning).

    Use it to tune a network that describes images; `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a `data.kinds.pairs.caption_batch`, of which are read: pixels [I, 3, H, W]; image_index [C]; text_ids, text_mask
    and target_mask [C, L].
    Returns `caption`, and the same as `loss`.

    Args:
        smoothing: part of a target that all tokens share.
        published: whether that part is left out of the true token's target, as in the published code; see `losses.caption_loss`.

    Source: X-VLM (Zeng et al. 2022), fine-tuning on captioning.

    Example: `Captions(model, smoothing=0.1)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        Term("vision_hidden", "vision.hidden", hidden),
        Term("vision_self_attention", "vision.self_attention", attention),
        Term("text_hidden", "text.hidden", hidden, "text_mask"),
        Term("text_self_attention", "text.self_attention", attention, "text_mask"),
        Term("fusion_hidden", "fusion.hidden", hidden, "text_mask", first=1, skips_last=True),  # its input is the last state of text
        Term("fusion_self_attention", "fusion.self_attention", attention, "text_mask"),
        Term("fusion_cross_attention", "fusion.cross_attention", attention, "text_mask"),
        Term("decoder_hidden", "decoder.hidden", hidden, "text_mask", skips_last=True),
        Term("decoder_self_attention", "decoder.self_attention", attention, "text_mask"),
        Term("decoder_cross_attention", "decoder.cross_attention", attention, "text_mask"),
        Term("logits", "logits", logits, "predicts"),
    )

    def __init__(self, model: Any, smoothing: float = 0.0, *, published: bool = False) -> None:
        super().__init__()
        self.model, self.smoothing, self.published = model, smoothing, published
        layers = model.config.layers()
        self.terms = tuple(term for term in self.terms if not term.tower or (term.tap in model.taps and layers.get(term.tower)))

    def cached(self, teacher: Any) -> CachedCaptions:
        """`teacher`, which answers for `logits` alone and sees a sample once."""
        return CachedCaptions(teacher)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are, beside the taps in `want`, `logits` [C, L, V], `text_mask`, and `predicts` [C, L], True where the
        next token is to be said."""
        record: Record = model.run(batch, {tap for tap in want if "." in tap})
        record |= {"text_mask": batch["text_mask"], "predicts": predicting(batch["target_mask"])}
        if model is not self.model:
            return Pass({}, record)
        loss = caption_loss(record["logits"], batch["text_ids"], batch["target_mask"], self.smoothing, published=self.published)
        return Pass({"caption": loss}, record)
