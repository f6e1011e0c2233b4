"""Answers as sequences of tokens, of which each is predicted from those before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import answer_loss, predicting
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import CachedAnswers
from efficientvlm.objectives.terms import Term, attention, hidden, logits, of_fused
from efficientvlm.runtime import ranks


class Generation(Objective):
    """The weighted likelihood of accepted answers (X-VLM, BLIP; VQA).

    Use it to tune a network with an answer decoder on questions; `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a batch of `data.kinds.questions.vqa_batch`, of which are read: pixels [I, 3, H, W]; image_index [Q], question_ids
    and question_mask [Q, L]; answer_index and answer_weights [A], answer_ids and answer_mask [A, La].
    Returns `task`, and the same as `loss`.

    Args:
        smoothing: part of a target that all tokens share; 0.1 in BLIP.

    Source: X-VLM (Zeng et al. 2022) and BLIP (Li et al. 2022), fine-tuning on VQA. BLIP's code divides by the images, each of which has
    one question there.

    Example: `Generation(model)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        *of_fused("question_mask"),
        Term("text_cross_attention", "text.cross_attention", attention, "question_mask"),
        Term("decoder_hidden", "decoder.hidden", hidden, "answer_mask"),
        Term("decoder_self_attention", "decoder.self_attention", attention, "answer_mask"),
        Term("decoder_cross_attention", "decoder.cross_attention", attention, "answer_mask"),
        Term("logits", "logits", logits, "answer_mask"),
    )

    def __init__(self, model: Any, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing
        self.terms = tuple(term for term in self.terms if not term.tower or term.tap in model.taps)

    def cached(self, teacher: Any) -> CachedAnswers:
        """`teacher`, which answers for `logits` alone and sees a sample once."""
        return CachedAnswers(teacher)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are, beside the taps in `want`, `logits` [A, L, V], the masks of questions and answers, and `predicts`
        [A, L], True where the next token of an answer is to be said."""
        want = frozenset(want)
        taps = {tap for tap in want if "." in tap}
        if model is not self.model and not any(tap == "logits" or tap.startswith("decoder.") for tap in want):
            batch = {name: value for name, value in batch.items() if name != "answer_ids"}  # a teacher that need not decode
        record: Record = model.run(batch, taps)
        record |= {name: batch[name] for name in ("question_mask", "answer_mask")} | {"predicts": predicting(batch["answer_mask"])}
        if model is not self.model:
            return Pass({}, record)
        questions = ranks.share_of(len(batch["question_ids"]))
        answers = batch["answer_ids"], batch["answer_mask"], batch["answer_weights"]
        task = answer_loss(record["logits"], *answers, questions, self.smoothing)
        return Pass({"task": task}, record)
