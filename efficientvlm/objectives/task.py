"""A task's loss, with or without distillation from a teacher tuned for the same task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm import ranks
from efficientvlm.families.base import CROSS_HEAD, HEAD, Record
from efficientvlm.objectives.distances import attention_mse, hidden_mse, logit_kl
from efficientvlm.objectives.mapping import TowerMap, of_teacher, tower_maps
from efficientvlm.objectives.teacher_cache import CachedAnswers
from efficientvlm.settings.methods import Quirks, TaskWeights
from efficientvlm.stopwatch import TEACHER
from efficientvlm.tasks.vqa import answer_loss


class VQA(nn.Module):
    """L = (1 - kd) * CE + kd * L_KD on a question-answering batch (EfficientVLM: kd = 0.4); without a teacher, CE alone.

    Inputs of `forward`: a batch of `data.collate.vqa_batch`. Returns `task`, with a teacher `kd`, and their sum `loss`.
    The teacher sees the same batch, is kept in evaluation mode, and is not part of the module's parameters. With `cache_teacher`, for which
    `logits` is the only term that may have a weight, it sees a sample once.
    """

    def __init__(
        self,
        family: Any,
        model: nn.Module,
        teacher: nn.Module | None,
        *,
        kd: float,
        weights: TaskWeights,
        quirks: Quirks,
        cache_teacher: bool = False,
        **temperature: Any,
    ) -> None:
        super().__init__()
        self.family, self.model, self.kd, self.weights, self.quirks = family, model, kd, weights, quirks
        self.temperature = temperature
        self._teacher: tuple[nn.Module, ...] = (teacher.eval().requires_grad_(False),) if teacher is not None and kd > 0 else ()
        self.maps = tower_maps(family, model.config, teacher.config) if teacher is not None else {}
        self.want = frozenset(tap for term, tap in family.vqa_terms.items() if getattr(weights, term)) if self._teacher else frozenset()

        self.compared = of_teacher(self.want, self.maps)
        self.cached = CachedAnswers(family, self._teacher[0]) if self._teacher and cache_teacher else None
        decodes = any(weight for term, weight in weights if term == "logits" or term.startswith("decoder_"))
        self.unseen = frozenset() if decodes else frozenset({"answer_ids"})

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        ours = self.family.forward(self.model, batch, self.want)
        questions = ranks.share_of(len(batch["question_ids"]))
        task = answer_loss(ours["logits"], batch["answer_ids"], batch["answer_mask"], batch["answer_weights"], questions)
        if not self._teacher:
            return {"loss": task, "task": task}
        with torch.inference_mode(), TEACHER:
            theirs = self.cached(batch) if self.cached else self._taught(batch)
        terms = kd_terms(self.family.vqa_terms, ours, theirs, self.maps, batch, self.quirks, **self.temperature)
        kd = sum((getattr(self.weights, name) * term for name, term in terms.items()), torch.zeros(()))
        return {"loss": (1 - self.kd) * task + self.kd * kd, "task": task, "kd": kd}

    def _taught(self, batch: dict[str, Any]) -> Record:
        record: Record = self.family.forward(self._teacher[0], {name: batch[name] for name in batch.keys() - self.unseen}, self.compared)
        return record


def kd_terms(
    taps: Mapping[str, str],
    ours: Record,
    theirs: Record,
    maps: dict[str, TowerMap],
    batch: dict[str, Any],
    quirks: Quirks,
    temperature: float = 1.0,
    scale: bool = False,
) -> dict[str, Tensor]:
    """Every term of `TaskWeights` in `taps` (term → tap) that the records hold, unweighted (EfficientVLM, VQA objective).

    The fusion hidden terms leave out index 0, which is the last text state and counted there. Padding is left out unless the quirk is on.
    A tower that `maps` lacks, since one of the networks has no layers there, has no terms.
    """
    masks = {"vision": None, "text": batch["question_mask"], "fusion": batch["question_mask"], "decoder": batch["answer_mask"]}
    terms: dict[str, Tensor] = {}
    for term, tap in taps.items():
        tower, kind = tap.split(".")
        if tap not in ours or tower not in maps:
            continue
        layers, mask = maps[tower], None if quirks.unmasked_padding else masks[tower]
        if kind == "hidden":
            last = -1 if quirks.skip_last_hidden and tower == "vision" else None
            terms[term] = hidden_mse(ours[tap], theirs[tap], layers.hidden[1 if tower == "fusion" else 0 : last], mask)
        else:
            heads = layers.heads[CROSS_HEAD if kind == "cross_attention" else HEAD]
            terms[term] = attention_mse(ours[tap], theirs[tap], layers.attention, heads, mask)
    valid = None if quirks.unmasked_padding else batch["answer_mask"]
    if "logits" in theirs:
        terms["logits"] = logit_kl(ours["logits"], theirs["logits"], temperature=temperature, scale=scale, valid=valid)
    return terms
