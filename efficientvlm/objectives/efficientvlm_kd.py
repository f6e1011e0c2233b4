"""EfficientVLM's general distillation: X-VLM pre-training losses plus layer-mapped terms against a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.families.base import CROSS_HEAD, HEAD, Record
from efficientvlm.objectives.distances import attention_mse, hidden_mse, logit_kl
from efficientvlm.objectives.mapping import TowerMap, of_teacher, tower_maps
from efficientvlm.objectives.pretraining import Negatives, Pretraining, even_texts
from efficientvlm.objectives.teacher_cache import CachedFeatures
from efficientvlm.settings.methods import DistillWeights, Quirks, RetrievalWeights
from efficientvlm.stopwatch import TEACHER

Weights = DistillWeights | RetrievalWeights


class Distillation(nn.Module):
    """L = (1 - kd) * L_hard + kd * L_KD (EfficientVLM: kd = 0.4).

    The student draws the hard negatives and the teacher sees the same ones; padding is left out of every term. `quirks` restores what the
    published release does instead. The teacher is kept in evaluation mode, outside the module's parameters. With `cache_teacher`, for which
    `itc_logits` is the only term that may have a weight and batches have no regions, it sees a picture and a caption once.
    """

    def __init__(
        self,
        hard: Pretraining,
        teacher: nn.Module,
        *,
        kd: float,
        weights: Weights,
        quirks: Quirks,
        cache_teacher: bool = False,
        **temperature: Any,
    ) -> None:
        super().__init__()
        self.hard, self.kd, self.weights, self.quirks, self.temperature = hard, kd, weights, quirks, temperature
        self._teacher = (teacher.eval().requires_grad_(False),)
        family = hard.family
        self.maps = tower_maps(family, hard.model.config, teacher.config)
        self.cached = CachedFeatures(family, teacher) if cache_teacher else None
        self.want, self.runs = wanted(weights), hard.losses & compared(weights)
        self.compared = of_teacher(self.want, self.maps)

    @property
    def model(self) -> nn.Module:
        """The student."""
        return self.hard.model

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        if not self.kd:
            return self.hard(batch, step)
        batch = even_texts(batch)
        losses, ours, negatives = self.hard.passes(self.hard.model, batch, step, self.want)
        shared = None if self.quirks.independent_negatives else negatives
        with torch.inference_mode(), TEACHER:
            theirs = self.cached(batch) if self.cached else self._taught(batch, step, shared)
        terms = kd_terms(ours, theirs, self.maps, batch, self.quirks, **self.temperature)
        hard = sum(losses.values(), torch.zeros(()))
        kd = weighted(terms, self.weights)
        return {"loss": (1 - self.kd) * hard + self.kd * kd, **losses, "kd": kd}

    def _taught(self, batch: dict[str, Any], step: int, negatives: Negatives | None) -> Record:
        return self.hard.passes(self._teacher[0], batch, step, self.compared, negatives, "teacher negatives", self.runs)[1]


def wanted(weights: Weights) -> frozenset[str]:
    """The taps that terms of non-zero weight need."""
    names = {"image": "vision", "text": "text", "fusion": "fusion"}
    taps = {f"{tower}.hidden" for name, tower in names.items() if getattr(weights, f"{name}_hidden")}
    taps |= {f"{tower}.self_attention" for name, tower in names.items() if getattr(weights, f"{name}_attention")}
    if weights.fusion_hidden:
        taps.add("text.hidden")
    if weights.fusion_attention:
        taps.add("text.self_attention")
    return frozenset(taps | ({"fusion.cross_attention"} if weights.cross_attention else set()))


def compared(weights: Weights) -> frozenset[str]:
    """The losses in whose passes terms of non-zero weight compare something; the teacher makes no others."""
    fusion = weights.fusion_hidden or weights.fusion_attention or weights.cross_attention
    logits = {"itc": weights.itc_logits, "itm": weights.itm_logits or fusion, "mlm": getattr(weights, "mlm_logits", 0) or fusion}
    return frozenset(name for name, weight in logits.items() if weight)


def kd_terms(
    ours: Record,
    theirs: Record,
    maps: dict[str, TowerMap],
    batch: dict[str, Any],
    quirks: Quirks,
    temperature: float = 1.0,
    scale: bool = False,
) -> dict[str, Tensor]:
    """Every distillation term that the two records allow, unweighted.

    Keys: `image_hidden`, `image_attention`, `text_*`, `itm_positive_*`, `itm_negative_*`, `mlm_*` (hidden, attention, and cross where
    recorded), `itm_logits`, `mlm_logits`, `itc_logits`. The MLM terms span the text and the fusion layers. A tower that `maps` lacks, since
    one of the networks has no layers there, has no terms.
    """
    terms: dict[str, Tensor] = {}
    text_mask = None if quirks.unmasked_padding else batch["text_mask"]

    def both(tap: str) -> tuple[Any, Any] | None:
        comparable = tap in ours and tap in theirs and ("." not in tap or tap.partition(".")[0] in maps)
        return (ours[tap], theirs[tap]) if comparable else None

    if pair := both("vision.hidden"):
        vision = maps["vision"]
        last = len(vision.hidden) - 1 if quirks.skip_last_hidden else None
        terms["image_hidden"] = hidden_mse(*_common_rows(*pair, vision.hidden[:last]))
    if pair := both("vision.self_attention"):
        vision = maps["vision"]
        terms["image_attention"] = attention_mse(*_common_rows(*pair, vision.attention), vision.heads[HEAD])
    if pair := both("text.hidden"):
        terms["text_hidden"] = hidden_mse(*pair, maps["text"].hidden, text_mask)
    if pair := both("text.self_attention"):
        terms["text_attention"] = attention_mse(*pair, maps["text"].attention, maps["text"].heads[HEAD], text_mask)
    for run in ("itm_positive", "itm_negative", "mlm"):
        mask = None if quirks.unmasked_padding else ours.get(f"text_mask@{run}")
        if pair := both(f"fusion.hidden@{run}"):
            fusion = maps["fusion"]
            terms[f"{run}_hidden"] = hidden_mse(*pair, fusion.hidden[1:] if run == "mlm" else fusion.hidden, mask)
        if pair := both(f"fusion.self_attention@{run}"):
            fusion = maps["fusion"]
            terms[f"{run}_attention"] = attention_mse(*pair, fusion.attention, fusion.heads[HEAD], mask)
        if pair := both(f"fusion.cross_attention@{run}"):
            fusion = maps["fusion"]
            terms[f"{run}_cross"] = attention_mse(*pair, fusion.attention, fusion.heads[CROSS_HEAD], mask)
    if (pair := both("text.hidden@mlm")) and "mlm_hidden" in terms:
        terms["mlm_hidden"] = terms["mlm_hidden"] + hidden_mse(*pair, maps["text"].hidden, text_mask)
    if (pair := both("text.self_attention@mlm")) and "mlm_attention" in terms:
        text = maps["text"]
        terms["mlm_attention"] = terms["mlm_attention"] + attention_mse(*pair, text.attention, text.heads[HEAD], text_mask)
    logits: dict[str, Any] = {"temperature": temperature, "scale": scale}
    if pair := both("itm_logits"):
        terms["itm_logits"] = logit_kl(*pair, **logits)
    if pair := both("mlm_logits"):
        slots = None if quirks.unmasked_padding else batch["masked_labels"] != -100
        terms["mlm_logits"] = logit_kl(*pair, **logits, valid=slots)
    if both("image_feature") and both("text_feature"):
        student, teacher = (r["image_feature"] @ r["text_feature"].T / r["temp"] for r in (ours, theirs))
        terms["itc_logits"] = (
            logit_kl(student, teacher, **logits, same_rows=True) + logit_kl(student.T, teacher.T, **logits, same_rows=True)
        ) / 2
    return terms


def _common_rows(
    ours: list[Tensor], theirs: list[Tensor], pairs: list[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Vision tensors by pair. In a region step one side of a pair may not hold regions yet; whole images come last in both."""
    rows = [min(len(ours[s]), len(theirs[t])) for s, t in pairs]
    students = [ours[s][-count:] for count, (s, _) in zip(rows, pairs, strict=True)]
    teachers = [theirs[t][-count:] for count, (_, t) in zip(rows, pairs, strict=True)]
    return students, teachers, [(i, i) for i in range(len(pairs))]


def weighted(terms: dict[str, Tensor], weights: Weights) -> Tensor:
    """L_KD: the terms times their weights; fusion weights apply to each of the three passes."""
    factors = dict(weights)
    for run in ("itm_positive", "itm_negative", "mlm"):
        factors |= {
            f"{run}_hidden": weights.fusion_hidden,
            f"{run}_attention": weights.fusion_attention,
            f"{run}_cross": weights.cross_attention,
        }
    return sum((factors[name] * term for name, term in terms.items() if factors[name]), torch.zeros(()))
